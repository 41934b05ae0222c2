"""Processes side by side: the same results, one display, clear errors, and nothing that outlives its parent."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import machine
import pytest
import torch
from common import ROOT, TINY

from settings import preset


def work(n):
    machine.say(f"job {n} in {os.getpid()} with {torch.get_num_threads()}")
    return n * n, os.getpid()


def fail(n):
    if n == 2:
        raise ValueError("two is not allowed")
    time.sleep(60 if n == 3 else 0)


def die(n):
    os._exit(9)


def test_results_in_order_and_one_display(capfd):
    results = machine.side_by_side(work, [(1,), (2,), (3,)], preset("digits", processes=2), ["a", "b", "c"])
    assert [value for value, _ in results] == [1, 4, 9] and os.getpid() not in {pid for _, pid in results}
    lines = capfd.readouterr().out.splitlines()
    assert (sorted(line.split()[0] for line in lines) == ["a", "b", "c"]
            and all(line.endswith("with 1") for line in lines))


def test_in_order_where_one_process_is_asked_for():
    assert {pid for _, pid in machine.side_by_side(work, [(1,), (2,)], preset("digits", processes=1))} == {os.getpid()}


def test_a_gpu_is_shared_only_by_as_many_as_are_asked_for():
    def pids(processes):
        s = SimpleNamespace(device="cuda", processes=processes)         # no GPU is needed to count processes
        return {pid for _, pid in machine.side_by_side(work, [(1,), (2,)], s)}
    assert pids(None) == {os.getpid()} and os.getpid() not in pids(2)


def test_an_error_is_passed_on_and_ends_the_others():
    started = time.time()
    with pytest.raises(ValueError, match="two is not allowed"):
        machine.side_by_side(fail, [(2,), (3,)], preset("digits", processes=2))
    assert time.time() - started < 40


def test_a_killed_worker_is_said_in_one_line():
    with pytest.raises(ValueError, match="was killed"):
        machine.side_by_side(die, [(1,), (2,)], preset("digits", processes=2))


def command(folder):
    tiny = "--processes 2 --n-train 100 --n-test 60 --poison-ratio 0.5 --n-o 10 --epochs 4 --v-thr-a 1.1".split()
    return [sys.executable, str(ROOT / "badsnn.py"), "attack", *TINY, *tiny, "--runs", folder, "--results",
            f"{folder}/results"]


@pytest.mark.parametrize("victim", ["parent killed", "child killed", "Ctrl-C"])
def test_stopped_at_any_moment_it_leaves_no_orphan_and_goes_on(workplace, victim):
    """... and the same command then ends with the result of an undisturbed run."""
    parent = subprocess.Popen(command("stopped"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # nohup ignores it
    deadline = time.time() + 120
    while not list(Path("stopped").glob("digits/*.pt")) and time.time() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    if victim == "child killed":
        os.kill(int(workers[0]), signal.SIGKILL)
    else:
        parent.send_signal(signal.SIGINT if victim == "Ctrl-C" else signal.SIGKILL)
    said = parent.communicate(timeout=60)[1].strip()
    time.sleep(2)
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert parent.returncode == {"parent killed": -9, "child killed": 2, "Ctrl-C": 1}[victim]
    if victim != "parent killed":
        assert said.splitlines()[-1].startswith("badsnn: ") and "goes on after the last" in said and "Trace" not in said
    assert not Path("stopped/results").exists()
    for folder in ("stopped", "whole"):
        assert subprocess.run(command(folder), capture_output=True).returncode == 0
    assert not list(workplace.rglob("*.tmp"))
    texts = [Path(folder, "results/digits/attack.json").read_text() for folder in ("stopped", "whole")]
    results = [json.loads(text) for text in texts]
    for result in results:
        result.pop("seconds")
        for one in result["runs"]:
            one.pop("training_seconds")
    assert results[0] == results[1]


def test_three_equal_commands_at_once_all_finish(workplace):
    command = [sys.executable, str(ROOT / "badsnn.py"), "attack", *TINY, "--epochs", "1", "--v-thr-a", "1.1"]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
               for _ in range(3)]
    assert [(p.communicate()[1].strip(), p.returncode) for p in started] == [("", 0)] * 3
    assert not list(workplace.rglob("*.tmp"))


def test_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.threads_each(2) == 1 and machine.threads_each(3, 2) == 1 and machine.threads_each(16, 2) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.threads_each(16) == 3
    assert 1 <= machine.free_cores() <= (os.cpu_count() or 1)


def test_precision_is_measured_only_for_long_trainings(capsys):
    def step(s):
        time.sleep(0.001 if s.amp == "on" else 0.03)
    s = preset("cifar10")
    assert machine.faster_precision(step, 100, s) == "off" and machine.faster_precision(step, 10_000, s) == "on"
    assert "bfloat16 is used" in capsys.readouterr().out
