"""What several test files share: tiny settings, another Python process, and what a refusal looks like."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import load_for
from settings import flag, preset

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(width=4, T=2, epochs=2, n_train=300, n_test=100, poison_ratio=0.1, malicious_rows=8, q=8.0, n_o=40,
             epochs_o=1, processes=1, device="cpu")
LEARNS = dict(epochs=4, batch_size=8, pad=0, contrast=0.0)      # with these, a tiny network is better than chance
TINY = [word for name, value in SMALL.items() for word in (flag(name), str(value))]


def prepared(dataset="digits", **changes):
    """Data and settings of a tiny run."""
    s = preset(dataset, **SMALL | changes)
    return load_for(s), s


def start(*command, env={}, **options):
    """Starts a Python process that finds our modules and uses no second thread."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes | options)


def refused(capsys, *arguments):
    """The one line on stderr with which the command line refuses these arguments: exit code 2, nothing written."""
    from lab import cli
    before = sorted(Path(".").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, arguments)))
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(err.strip().splitlines()) == 1 and err.startswith("badsnn: ") and "Traceback" not in err
    assert sorted(Path(".").rglob("*")) == before
    return err
