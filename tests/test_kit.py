"""Machinery: whole files, reuse, checkpoints, processes side by side and together, nothing that outlives its parent."""
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from common import start

import badsnn
from kit import files, machine, training
from kit.files import replace_file
from lab.results import kept, read_json, write_json, write_text
from settings import preset

# ----- Files

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """Under a name that nobody else has: not another process, not the same PID on another host."""
    path = tmp_path / "sub" / "r.json"
    write_json(path, dict(a=1))
    with pytest.raises(TypeError):
        write_text(path, 5)
    assert read_json(path) == dict(a=1)
    with replace_file(path) as mine:
        mine.write_text("half")
        with replace_file(path) as theirs:
            theirs.write_text("theirs")
        assert mine != theirs and mine.parent == path.parent and path.read_text() == "theirs" and mine.exists()
        mine.write_text('{"a": 1')
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]
    with pytest.raises(ValueError, match="r.json: not a readable result"):
        read_json(path)


def test_a_result_is_kept_only_for_what_decides_it(tmp_path, tiny):
    path, calls = tmp_path / "r.json", []

    def run():
        calls.append(1)
        return dict(value=len(calls))

    def again(a, **changes):
        return kept(path, tiny.data, replace(tiny.s, **changes), "code", run, a=a)
    assert again(1) == (read_json(path), False)
    assert again(1) == (read_json(path), True) and len(calls) == 1
    assert again(2)[0]["value"] == 2 and again(2, fresh=True)[0]["value"] == 3 and again(2, lr=0.3)[0]["value"] == 4
    for content in ("{", "[]"):
        path.write_text(content)
        assert again(2)[0]["value"] == len(calls)
    assert len(calls) == 6


def test_means():
    rows = [dict(v_thr=1.1, ca=90.0, tau=0.5, name="x", asr_o=None),
            dict(v_thr=1.12, ca=94.0, tau=0.5, name="x", asr_o=None)]
    assert files.mean_of(rows) == dict(v_thr=1.11, ca=92.0, tau=0.5, name="x", asr_o=None)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_network_is_not_taken_from_other_data_settings_or_code(workplace, tiny, monkeypatch):
    """Nor from a damaged file, nor from one that holds code, which is not run."""
    def path_of(data=tiny.data, attack="badsnn", **changes):
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            patch.setattr(training, "read_checkpoint", read := Mock(side_effect=KeyboardInterrupt))
            badsnn.train(data, replace(tiny.s, runs=Path("."), **changes), attack)
        return read.call_args.args[0]
    path, good = path_of(), next(tiny.s.runs.rglob("backdoored*.pt"))
    found = {path, path_of(replace(tiny.data, y_train=tiny.data.y_train.flip(0))), path_of(attack=None),
             path_of(seed=1), path_of(malicious_weight=0.5)}
    with monkeypatch.context() as patch:
        patch.setattr(badsnn, "CODE", "another")
        assert len(found | {path_of()}) == 6
    path.parent.mkdir()
    state = torch.load(good, weights_only=True)
    for bad, message in ((dict(state, config=dict(state["config"], width=99)), "other settings"),
                         (dict(config=Bomb()), "not a checkpoint"), (None, "not a checkpoint")):
        torch.save(bad, path) if bad else path.write_bytes(good.read_bytes()[:1000])
        with pytest.raises(ValueError, match=f"{path}: .*{message}"):
            badsnn.train(tiny.data, replace(tiny.s, runs=Path(".")), "badsnn")
    assert not Path("exploded").exists()


# ----- Side by side

def work(n):
    machine.say(f"job {n} in {os.getpid()} with {torch.get_num_threads()}")
    if n == 9:
        os._exit(9)
    if n == 2:
        raise ValueError("two is not allowed")
    time.sleep(60 if n == 3 else 0)
    return n * n, os.getpid()


def test_results_in_order_and_one_display(capfd):
    two = preset("digits", processes=2, device="cpu")
    results = machine.side_by_side(work, [(1,), (4,), (5,)], two)
    assert [value for value, _ in results] == [1, 16, 25] and os.getpid() not in {pid for _, pid in results}
    shown = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert sorted(words[1] for words in shown) == ["1", "4", "5"] and {words[-1] for words in shown} == {"1"}
    for alone in (replace(two, processes=1), SimpleNamespace(device="cuda", processes=None)):     # one GPU, one model
        assert {pid for _, pid in machine.side_by_side(work, [(1,), (4,)], alone)} == {os.getpid()}


@pytest.mark.parametrize("job, message", [(2, "two is not allowed"), (9, "out of memory.*goes on")])
def test_an_error_or_a_killed_worker_ends_the_others(job, message):
    started = time.time()
    with pytest.raises(ValueError, match=message):
        machine.side_by_side(work, [(job,), (3,)], preset("digits", processes=2, device="cpu"))
    assert time.time() - started < 55


SIDE_BY_SIDE = """
import os, time
from pathlib import Path
from types import SimpleNamespace
from kit import machine
def work(n):
    Path(str(os.getpid())).touch()
    time.sleep(600)
if __name__ == "__main__":
    machine.side_by_side(work, [(1,), (2,)], SimpleNamespace(device="cpu", processes=2))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(workplace, how):
    Path("program.py").write_text(SIDE_BY_SIDE)
    parent = start("program.py", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # nohup ignores it
    deadline = time.time() + 120
    while len(workers := list(Path(".").glob("[0-9]*"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    parent.send_signal(how)
    parent.wait(60)
    while any(Path("/proc", pid.name).exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2 and not any(Path("/proc", pid.name).exists() for pid in workers)


# ----- Together

TOGETHER = """
import sys
from pathlib import Path
from common import prepared
import badsnn
from kit import machine
from kit.files import fingerprint
data, s = prepared(data=Path(sys.argv[1]), runs=Path("runs"))
with machine.processes(s) as s:
    rank = machine.rank()
    first, again = (badsnn.train(data, s, "badsnn") for _ in range(2))      # the second is read
    Path(f"rank{rank}").write_text(f"{fingerprint(list(first.parameters()))} {fingerprint(again)}")
"""


def test_two_processes_train_one_model(workplace):
    """Equal weights in both (on CPUs each has statistics of its own), written once, and both read what is written."""
    Path("together.py").write_text(TOGETHER)
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 together.py".split()
    done = start(*command, Path("data").absolute())
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err[-2000:]
    first, second = (Path(f"rank{rank}").read_text().split() for rank in (0, 1))
    assert first == second and len(first[0]) == len(first[1]) == 16
    assert len(list(Path("runs").rglob("*.*"))) == 1
    assert out.count("model, seed 0") == 2                                   # rank 0 speaks


# ----- Threads, cores, compiling

def test_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for quota, wanted in (("150000 100000", 2), ("max 100000", 64)):
        monkeypatch.setattr(Path, "read_text", lambda path, *_, **__: quota)     # a container's share of a larger host
        assert machine.cores() == wanted


def test_where_nothing_can_be_compiled_the_same_function_runs(workplace):
    """Here, without a C++ compiler: quietly, as nobody can do much about it."""
    program = ("import torch; from kit import machine; double = machine.compiled(lambda x: 2 * x)\n"
               "with machine.compiling(True):\n    print(double(torch.ones(2)).tolist())")
    done = start("-c", program, env=dict(CXX="none", TORCHINDUCTOR_CACHE_DIR="cache"))
    assert done.communicate() == ("[2.0, 2.0]\n", "")
