"""Files, reuse, checkpoints, and several processes."""
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from baselines import badnets
from common import ROOT, TINY, prepared
from runs import code_of, fingerprint, kept, read_json, replace_file

import badsnn


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    runs.write_text(path, "old")
    with pytest.raises(RuntimeError):
        with replace_file(path) as part:
            part.write_text("half")
            raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Not what a running one is about to write, nor the temporary files of other results."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = f"a.json.{ended.pid}.tmp", f"a.json.{os.getppid()}.tmp", f"b.json.{ended.pid}.tmp", "a.json.old.tmp"
    for name in names:
        (tmp_path / name).touch()
    with replace_file(tmp_path / "a.json") as part:
        part.touch()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *names[1:]}


def test_two_processes_write_under_their_own_names(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    with replace_file(path) as mine:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with replace_file(path) as theirs:
            theirs.write_text("theirs")
        assert mine != theirs and path.read_text() == "theirs"
        mine.write_text("mine")
    assert path.read_text() == "mine"


def test_readers_name_their_file(tmp_path):
    (tmp_path / "r.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match="r.json: not a readable result"):
        read_json(tmp_path / "r.json")


def test_fingerprints_tell_things_apart():
    x = torch.arange(6)
    same, other = fingerprint(x), [x.view(2, 3), x.float(), x + 1, [x, x], "x", 6, dict(a=1), dict(a=2), 1, [1], [[1]]]
    assert fingerprint(x.clone()) == same
    found = [same] + [fingerprint(thing) for thing in other]
    assert len(set(found)) == len(found)
    assert (fingerprint(partial(test_readers_name_their_file, a=x))
            != fingerprint(partial(test_readers_name_their_file, a=x + 1)))
    assert fingerprint(dict(a=1, b=2)) == fingerprint(dict(b=2, a=1))
    own = "import runs, baselines; print(runs.fingerprint([baselines.badnets]))"     # in two processes: two addresses
    assert len({subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, cwd=ROOT, check=True).stdout
                for _ in range(2)} | {fingerprint([badnets]) + "\n"}) == 1 != fingerprint([badnets, own])
    model = torch.nn.Linear(2, 2)
    before = fingerprint(model)
    model.weight.data += 1
    assert fingerprint(model) != before


def test_code_is_what_runs_not_how_it_is_written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for i, text in enumerate(('def f(x):\n    """Old."""\n    return x + 1  # one\n',
                              'def f(x):\n    """New text."""\n\n    return x + 1\n',
                              'def f(x):\n    """Old."""\n    return x + 2\n')):
        (tmp_path / f"m{i}.py").write_text(text)
        hashes.append(code_of(__import__(f"m{i}")))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_result_is_kept_only_for_what_decides_it(tmp_path):
    path, calls = tmp_path / "r.json", []

    def run():
        calls.append(1)
        return dict(value=len(calls))
    assert kept(path, dict(a=1), run) == (read_json(path), False)
    assert kept(path, dict(a=1), run) == (read_json(path), True) and len(calls) == 1
    assert kept(path, dict(a=2), run)[0]["value"] == 2
    assert kept(path, dict(a=2), run, fresh=True)[0]["value"] == 3
    path.write_text("{")
    assert kept(path, dict(a=2), run)[0]["value"] == 4


def test_a_result_of_another_shape_is_made_anew(tmp_path):
    for content in ("[]", "null", "5", "half a fi"):
        (tmp_path / "r.json").write_text(content)
        assert runs.earlier(tmp_path / "r.json", dict(a=1)) is None


def test_refuses_damaged_and_foreign_checkpoints(workplace, capsys):
    data, s = prepared("--epochs", "1")
    badsnn.train(data, s)
    (path,) = Path("runs/digits").iterdir()
    good = path.read_bytes()
    for bad, message in ((good[:100], "not a checkpoint of this run"), (b"", "not a checkpoint"),
                         (None, "other settings")):
        if bad is None:
            state = torch.load(path, weights_only=True) if path.write_bytes(good) else None
            state["config"]["width"] = 99
            torch.save(state, path)
        else:
            path.write_bytes(bad)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            badsnn.main(["attack", *TINY, "--epochs", "1"])
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert not Path("results").exists()


def _stop(paths, path):
    paths.append(path)
    raise RuntimeError


def test_a_checkpoint_with_code_in_it_is_not_run(workplace, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)
    data, s = prepared("--epochs", "1")
    paths = []
    with monkeypatch.context() as m, pytest.raises(RuntimeError):
        m.setattr(runs, "read_checkpoint", lambda path, *args, **parts: _stop(paths, path))
        badsnn.train(data, s)
    paths[0].parent.mkdir(parents=True)
    torch.save(dict(config=Bomb()), paths[0])
    with pytest.raises(ValueError, match="not a checkpoint"):
        badsnn.train(data, s)
    assert not Path("exploded").exists()


def test_results_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "r" / "s.json"
    runs.write_json(path, dict(a=1))
    with pytest.raises(TypeError):
        runs.write_json(path, dict(a=SimpleNamespace()))
    assert json.loads(path.read_text()) == dict(a=1)


WORKER = """
import sys, json, torch
sys.path.insert(0, {root!r})
import dataclasses
import badsnn, data, machine, settings
s = settings.parse(json.loads(sys.argv[1]))[1]
with machine.processes(s) as s:
    rank = machine.rank_and_ranks()[0]
    digits = machine.in_turn(data.load_for, s)
    s = dataclasses.replace(s, runs=s.runs / str(rank))      # as on two machines, each with a disk of its own
    model = badsnn.train(digits, s, "badsnn")
    again = badsnn.train(digits, s, "badsnn")                # finished: rank 1 learns that from rank 0
    weights = [[*one.state_dict().values()] for one in (model, again)]
    print("SAME", rank, all(map(torch.equal, *weights)))
    if rank == 0:
        print("LOSSES", json.dumps([
            row["loss"] for row in torch.load(next(s.runs.rglob("*.pt")), weights_only=True)["history"]]))
"""


def torchrun(n, script, *arguments, timeout=150):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", str(script),
               *arguments]
    env = dict(os.environ, OMP_NUM_THREADS="1", BADSNN_COMPILE="0")
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def test_two_processes_train_the_same_model(workplace):
    """The same global batch on one and on two processes: the same losses, up to the order of float32 sums."""
    script = workplace / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    same = "--no-augment --amp off --batch-size 60 --lr 0.01".split()
    data, s = prepared(*same, "--runs", "one")
    badsnn.train(data, s, "badsnn")
    (path,) = Path("one").rglob("*.pt")
    losses = [[row["loss"] for row in torch.load(path, weights_only=True)["history"]]]
    done = torchrun(2, script, json.dumps(["attack", *TINY, *same, "--runs", "two"]))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("SAME") == 2 == done.stdout.count("True") and not Path("two/1").exists()
    losses.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))[7:]))
    assert len(losses[0]) == 2
    assert (losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
            and losses[0][1] == pytest.approx(losses[1][1], rel=2e-2))


def test_a_dead_process_ends_the_run(workplace):
    script = workplace / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)).replace(
        "    model = badsnn.train",
        "    import os; os.environ['RANK'] == '1' and os._exit(9)\n    model = badsnn.train"))
    started = time.time()
    done = torchrun(2, script, json.dumps(["attack", *TINY, "--batch-size", "60"]))
    assert done.returncode != 0 and time.time() - started < 120
