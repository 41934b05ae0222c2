#!/usr/bin/env bash
# One command: sets up, runs, tests. Stop it whenever you like; the same command goes on where it stopped.
#
#   bash run_all.sh                         the story in minutes: one attack on digits, what stops it, a verdict
#   bash run_all.sh all [options]           every table and figure of the paper in small (digits, ndigits)
#   bash run_all.sh DATASET [options]       Table 1's row of another data set; options go to badsnn.py attack
#   bash run_all.sh test [options]          the tests; options go to pytest
#   bash run_all.sh setup                   only the installation
#   bash run_all.sh notebooks               opens the notebooks in a browser
#   bash run_all.sh handout [FOLDER]        a folder for students: notebooks without outputs, no tests, no solutions
set -euo pipefail
unset PYTHONSAFEPATH            # it hides the files beside badsnn.py from it
cd "$(dirname "$0")"

has_packages() {
    "$1" -c 'import importlib.util as u, sys
sys.exit(any(u.find_spec(m) is None for m in ("torch", "torchvision", "tonic", "sklearn", "matplotlib", "tqdm", "pytest", "xdist", "nbconvert", "jupyterlab")))' 2>/dev/null
}

fail() { echo "run_all.sh: $1" >&2; exit 2; }

set_up() {      # .venv always exists afterwards; a broken or half-finished one is made anew or completed
    has_packages .venv/bin/python && return
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || fail "Python 3.10 or newer is needed (python3)"
    local site=""
    has_packages python3 && site=--system-site-packages          # the packages are on this system: no download
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        if [ -n "$site" ] && ! python3 -c 'import ensurepip' 2>/dev/null; then
            site="$site --without-pip"
        fi
        python3 -m venv --clear $site .venv >/dev/null 2>&1 || { rm -rf .venv
            fail "python3 cannot make a virtual environment; install it (Debian, Ubuntu: apt install python3-venv) and run this again"; }
    fi
    has_packages .venv/bin/python && return
    echo "Installing requirements.txt into .venv: once, 2 to 10 minutes, several GB."
    .venv/bin/python -m pip install --quiet -r requirements.txt || fail "the installation did not finish; run this again to go on"
}

set_up
python=.venv/bin/python
started=$SECONDS
command=${1:-story}
[ "${command#-}" = "$command" ] || command=story         # options alone belong to the story
[ "$command" = "${1:-}" ] && shift
results=runs/results before=
for option in "$@"; do
    [ "$before" = --results ] && results=$option
    before=$option
done
case $command in
    setup)
        echo "Set up: .venv/bin/python has everything." ;;
    test)
        echo "Running the tests: minutes on 2 cores."
        OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:logging -n 2 --dist worksteal tests "$@" ;;
    notebooks)
        exec "$python" -m jupyter lab --LabApp.default_url=/lab/tree/notebooks "$@" ;;
    handout)
        folder=${1:-handout}
        [ ! -e "$folder" ] || fail "$folder is there already: remove it, or name another folder"
        mkdir -p "$folder/notebooks"
        cp -r ./*.py kit lab results docs requirements.txt run_all.sh README.md LICENSE "$folder"
        cp notebooks/README.md notebooks/exercises.py notebooks/*.ipynb "$folder/notebooks"
        find "$folder" -name __pycache__ -prune -exec rm -r {} +
        "$python" -m nbconvert --log-level WARN --clear-output --inplace "$folder"/notebooks/*.ipynb
        echo "For students: $folder/. The course's page is $folder/notebooks/README.md."
        exit ;;
    story)
        echo "One attack on digits, and what stops it: minutes on 2 cores."
        "$python" badsnn.py story "$@" ;;
    all)
        echo "Every table and figure in small, on digits and ndigits; the story first."
        "$python" badsnn.py story "$@"
        "$python" badsnn.py attack --dataset ndigits "$@"
        "$python" badsnn.py defend --dataset ndigits "$@"
        "$python" badsnn.py defend --dataset digits "$@"
        "$python" badsnn.py ablate --dataset digits --study plif heatmap poison magnitude threshold power "$@"
        "$python" badsnn.py report --results "$results" ;;
    *)
        "$python" badsnn.py attack --dataset "$command" "$@"
        "$python" badsnn.py report --results "$results" ;;
esac
echo "Done in $((SECONDS - started)) s. Results of your own are in $results/."
