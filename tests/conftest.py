import importlib.util
import json
import os
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


def pytest_addoption(parser):
    parser.addoption("--exercises", default=ROOT / "notebooks" / "exercises.py", help="the exercises.py to grade")
    parser.addoption("--grade", metavar="OUT.json", help="write the points of tests/test_exercises.py to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "points(exercise, n): what a test of tests/test_exercises.py is worth")
    config.grades = {}      # exercise: [points, of]


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [mark.args for mark in item.iter_markers("points")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for exercise, n in item.user_properties:
        grade = item.config.grades.setdefault(exercise, [0, 0])
        grade[1] += n * (call.when == "setup")
        grade[0] += n * (call.when == "call" and report.passed)
    return report


def pytest_sessionfinish(session):
    path, grades = session.config.getoption("--grade"), session.config.grades
    if path:
        Path(path).write_text(json.dumps(dict(
            file=str(session.config.getoption("--exercises")), seed=os.environ.get("GRADE_SEED", "0"),
            points=sum(p for p, _ in grades.values()), of=sum(of for _, of in grades.values()),
            exercises={name: dict(points=p, of=of) for name, (p, of) in grades.items()}), indent=1) + "\n")


@pytest.fixture(scope="session")
def exercises(request):
    """The module with a student's answers."""
    spec = importlib.util.spec_from_file_location("exercises", request.config.getoption("--exercises"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def draw(request):
    """Random numbers that the test's name and GRADE_SEED decide."""
    from kit.training import generator
    return generator(os.environ.get("GRADE_SEED", "0"), "exercise", request.node.name)


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
