import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import LEARNS, prepared  # noqa: E402

import badsnn  # noqa: E402
import data  # noqa: E402

torch.set_num_threads(1)                    # as the command line does where there are few cores
collect_ignore = ["test_exercises.py"]      # unless it is named: unsolved exercises fail there


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder that holds digits.npz."""
    folder = tmp_path_factory.mktemp("data")
    data.load("digits", folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, digits):
    """An empty folder to run in, with the digits at hand."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/digits.npz").symlink_to(digits / "digits.npz")
    return tmp_path


@pytest.fixture(scope="session")
def tiny(digits, tmp_path_factory):
    """A clean and a backdoored network, trained once; their data and settings. Nobody changes them."""
    found, s = prepared(**LEARNS, data=digits, runs=tmp_path_factory.mktemp("tiny"))
    return SimpleNamespace(data=found, s=s, clean=badsnn.train(found, s), backdoored=badsnn.train(found, s, "badsnn"))
