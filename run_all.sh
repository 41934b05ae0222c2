#!/usr/bin/env bash
# One command: sets up, runs, tests. Stop it whenever you like; the same command goes on where it stopped.
#
#   bash run_all.sh                         digits and ndigits: train, attack, defend, every study, tables and figures
#   bash run_all.sh --seeds 3 [options]     the same with options, here as for the results in this repository
#   bash run_all.sh cifar10 [options]       another data set; options go to badsnn.py attack
#   bash run_all.sh test [options]          the tests; options go to pytest
set -euo pipefail
cd "$(dirname "$0")"

has_packages() {
    "$1" -c 'import importlib.util as u, sys
sys.exit(any(u.find_spec(m) is None for m in ("torch", "torchvision", "tonic", "sklearn", "matplotlib", "tqdm", "pytest", "xdist", "nbconvert")))' 2>/dev/null
}

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
if ! has_packages "$python"; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "run_all.sh: Python 3.10 or newer is needed" >&2; exit 2; }
    echo "Installing requirements.txt into .venv: once, 2 to 10 minutes, several GB."
    [ -x .venv/bin/python ] || python3 -m venv .venv
    python=.venv/bin/python
    "$python" -m pip install --quiet -r requirements.txt
fi

started=$SECONDS
if [ "${1:-}" = test ]; then
    shift
    echo "Running the tests: 3 to 5 minutes on 2 cores."
    OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:logging -n 2 --dist worksteal tests "$@"
elif [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    dataset=$1
    shift
    "$python" badsnn.py attack --dataset "$dataset" "$@"
    "$python" badsnn.py report
else
    echo "The whole paper in small, on digits and ndigits: 30 to 90 minutes on 2 cores, Table 1 first. Stop it whenever you like."
    for dataset in digits ndigits; do
        "$python" badsnn.py attack --dataset "$dataset" "$@"
    done
    echo "Table 1 took $((SECONDS - started)) s. Now Table 2 and the studies; stop here if Table 1 is all you want."
    "$python" badsnn.py defend --dataset digits "$@"
    for study in threshold magnitude power heatmap plif poison; do
        "$python" badsnn.py ablate --dataset digits --study "$study" "$@"
    done
    "$python" badsnn.py report
fi
echo "Done in $((SECONDS - started)) s."
