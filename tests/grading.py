"""The grading of notebooks/exercises.py: a pytest plugin, which conftest.py loads.

    python -m pytest tests/test_exercises.py --exercises SUBMISSION.py --grade OUT.json

Every check runs in a process of its own, killed after --limit seconds: an endless loop, exit() or a crash costs its
exercise only. OUT.json is written at the start, with 0 points, and anew after every check: it is never an older run's.
"""
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

from kit.files import ROOT
from kit.training import generator
from lab.results import write_json


def seed():
    return os.environ.get("GRADE_SEED", "0")


def pytest_addoption(parser):
    parser.addoption("--exercises", default=ROOT / "notebooks" / "exercises.py", help="the exercises.py to grade")
    parser.addoption("--grade", metavar="OUT.json", help="write the points of tests/test_exercises.py to this file")
    parser.addoption("--limit", type=float, default=30, metavar="SECONDS", help="for each check (default: 30)")


def pytest_configure(config):
    config.addinivalue_line("markers", "points(exercise, n): what a test of tests/test_exercises.py is worth")
    config.grades = {}      # exercise: points, of, said
    if config.getoption("--grade"):
        Path(config.getoption("--grade")).unlink(missing_ok=True)
        if getattr(config.option, "dist", "no") != "no":
            raise pytest.UsageError("--grade counts the points of one process: leave out -n")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("points"):
            item.obj = functools.partial(apart, item.obj, config.getoption("--limit"))


def pytest_collection_finish(session):
    grades = session.config.grades
    for exercise, n in (mark.args for item in session.items for mark in item.iter_markers("points")):
        grades.setdefault(exercise, dict(points=0, of=0, said="not reached"))["of"] += n
    if session.config.getoption("--grade") and not grades:
        raise pytest.UsageError("--grade goes with tests/test_exercises.py")
    write(session.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for exercise, n in (mark.args for mark in item.iter_markers("points")):
        grade = item.config.grades[exercise]
        if report.failed:
            grade["said"] = report.longreprtext.splitlines()[0]
        elif call.when == "call":
            grade["points"] += n
            grade["said"] = "right" if grade["said"] == "not reached" else grade["said"]
        write(item.config)
    return report


def write(config):
    if config.getoption("--grade"):
        points, of = (sum(grade[key] for grade in config.grades.values()) for key in ("points", "of"))
        write_json(config.getoption("--grade"), dict(file=str(config.getoption("--exercises")), seed=seed(),
                                                     points=points, of=of, exercises=config.grades))


def apart(check, limit, **arguments):
    """Runs a check in a process of its own, which is killed after `limit` seconds; fails as it does."""
    if not hasattr(os, "fork"):         # Windows: without these limits
        return check(**arguments)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(check, arguments, there))
    process.start()
    there.close()
    try:
        said = here.recv() if here.poll(limit) else f"not finished after {limit:g} seconds"
    except EOFError:
        said = "the process has ended before its answer: os._exit(), or a crash"
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)      # what the answer has started
        process.join()
    if said:
        pytest.fail(said, pytrace=False)


def run(check, arguments, pipe):
    """The process of a check: sends what went wrong, or nothing."""
    os.setsid()
    torch.set_num_threads(1)            # a forked process has no pool of threads
    try:
        check(**arguments)
        said = ""
    except BaseException as error:      # SystemExit, KeyboardInterrupt and pytest.exit() are wrong answers, too
        said = f"{type(error).__name__}: {error}".splitlines()[0] + "\n" + traceback.format_exc()
    pipe.send(said)


@functools.cache
def imported(path):
    """The module in a file, known by its name to what looks there for it, as dataclasses do."""
    spec = importlib.util.spec_from_file_location("exercises", path)
    module = sys.modules["exercises"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Answers:
    """A student's functions; the file is imported in the process that first asks for one."""

    def __init__(self, path):
        self.path = path

    def __getattr__(self, name):
        return getattr(imported(self.path), name)


@pytest.fixture(scope="session")
def exercises(request):
    path, limit = (request.config.getoption(name) for name in ("--exercises", "--limit"))
    apart(imported, limit, path=path)       # what cannot be imported is said once
    return Answers(path)


@pytest.fixture
def draw(request):
    """Random numbers that the test's name and GRADE_SEED decide."""
    return generator(seed(), "exercise", request.node.name)
