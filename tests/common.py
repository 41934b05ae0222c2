"""What several test files share: tiny settings, and running the command line."""
import json
from pathlib import Path

import pytest

import badsnn
import data as datasets
import settings

ROOT = Path(badsnn.__file__).parent
TINY = ("--width 4 --T 2 --epochs 2 --warmup 0 --seeds 1 --n-train 300 --n-test 100 --poison-ratio 0.1 "
        "--malicious-rows 8 --q 8 --processes 1 --n-o 40 --epochs-o 1 --amp off").split()


def attack(*options):
    badsnn.main(["attack", *TINY, *options])
    return json.loads(Path("runs/results/digits/attack.json").read_text())


def prepared(*options):
    """Data and settings of a tiny run with these options."""
    return prepared_as(*TINY, *options)


def prepared_as(*options):
    s = settings.parse(["attack", *options])[1]
    return datasets.load_for(s), s


def refused(capsys, *arguments):
    """The one line on stderr with which the command line refuses these arguments: exit code 2, nothing written."""
    before = sorted(Path(".").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        badsnn.main(list(arguments))
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert len(err.strip().splitlines()) == 1 and err.startswith("badsnn: ") and "Traceback" not in err
    assert sorted(Path(".").rglob("*")) == before
    return err
