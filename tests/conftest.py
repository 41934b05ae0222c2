import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from kit import machine  # noqa: E402

pytest_plugins = ["grading"]
collect_ignore = ["test_exercises.py"]      # unless it is named: unsolved exercises fail there


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    import data
    folder = tmp_path_factory.mktemp("data")
    data.load("digits", folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, digits):
    """An empty folder to run in, with the digits at hand."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, "data")
    return tmp_path


@pytest.fixture(autouse=True)
def compile_only_where_it_matters(request, monkeypatch):
    """The neuron is compiled in the tests of the neuron and where networks learn. Elsewhere, and in the processes
    that tests start, the same code runs uncompiled: a compilation costs seconds, and what is tested there does not
    depend on it."""
    if (request.module.__name__ not in ("test_lif", "test_fused")
            and not request.node.name.startswith("test_a_small_batch_can_be_learned")):
        monkeypatch.setitem(machine._compiling, "possible", False)
        monkeypatch.setenv("BADSNN_COMPILE", "0")
