"""The settings and the command line made from them: one run per command; bad input is one line, exit code 2, nothing
written."""
import json
import os
import shutil
from dataclasses import FrozenInstanceError, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from common import LEARNS, ROOT, SMALL, TINY, refused, start

from lab import ablations, cli, report, scan, story, table2
from settings import KNOBS, PRESETS, Settings, flag, preset


def test_the_command_line_gives_the_same_as_preset(capsys):
    own, s = cli.parse("attack --epochs 5 --v-thr-a 1.1 1.0 1.1 --flip --neuron plif --seed 7".split())
    assert s == preset("digits", epochs=5, v_thr_a=(1.0, 1.1), flip=True, neuron="plif", seed=7)
    assert own.command == "attack" and cli.parse(["attack"])[1] == preset("digits")
    assert cli.parse(["ablate", "--study", "power", "plif"])[0].study == ["power", "plif"]
    assert set(KNOBS) == set(Settings.__dataclass_fields__) and all(map(all, KNOBS.values()))
    for dataset in ("gtsrb", "nmnist"):             # the help page shows the values that the set really has
        with pytest.raises(SystemExit) as stop:
            cli.parse(["attack", "--help", "--dataset", dataset])
        shown = " ".join(capsys.readouterr().out.split())
        assert not stop.value.code and f"(default: {preset(dataset).model})" in shown


def test_presets_and_settings():
    assert all(preset(name).dataset == name for name in PRESETS) and len(PRESETS) == 6
    s, learned = preset("gtsrb", v_thr_t=0.8), preset("digits", neuron="plif")
    assert (s.model, s.tau_t, s.v_thr_t_low) == ("vgg16", 0.8, None) and preset("digits").v_thr_t_low == 1.15
    assert isinstance(s.of()["v_thr_a"], list) and "device" not in s.of() and "epochs" not in s.of("network")
    assert learned.tau_t is None and learned.of()["tau_a"] is None      # no label says a tau that was not used
    with pytest.raises(FrozenInstanceError):
        s.seed = 3
    for wrong in (partial(replace, s, epochs=0), partial(preset, "", e=3)):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("arguments, message", [
    ("attack --nonsense", "unrecognized"), ("attack --dataset mnist", "unknown dataset"),
    ("attack --v-thr-a 1.0 -1", "--v-thr-a must"), ("attack --device meta", "not usable"),
    ("attack --runs data/digits.npz", "not a writable folder"), ("ablate --study events", "events"),
    ("attack --variant ../up", "--variant"), ("report", "no attack.json")])
def test_refuses(workplace, capsys, arguments, message):
    assert message in refused(capsys, *arguments.split())


def test_attack_and_report(workplace, tiny, capsys):
    """Every result carries what it was made with; the same command again reads it; the report draws it."""
    learns = [word for name, value in LEARNS.items() for word in (flag(name), str(value))]
    command = ["attack", *TINY, *learns, "--runs", str(tiny.s.runs), "--v-thr-a", "1.0", "1.5"]
    cli.main(command)
    path = Path("runs/results/digits/attack.json")
    result, written = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert set("""dataset model width T n_train n_test epochs seed seeds device seconds target poison_ratio n_poison q
        v_thr_t tau_t clean_ca base_ca chosen rows at_chosen runs""".split()) <= set(result)
    assert [result[key] for key in ("n_train", "n_test", "width", "q", "n_poison")] == [300, 100, 4, 8.0, 2]
    out = capsys.readouterr().out
    assert out.count("finished earlier, read from") >= 4 and "target_rate" in out        # the tiny networks were there
    shown = np.load("runs/results/digits/triggers.npz", allow_pickle=False)
    assert shown["t_o"].shape == shown["t_p"].shape == shown["clean"].shape == (8, 16, 16, 3)
    cli.main(command)
    assert path.stat().st_mtime_ns == written and "finished earlier (" in capsys.readouterr().out
    cli.main(["report"])
    assert path.with_suffix(".png").stat().st_size > 10_000 and not list(workplace.rglob("*.tmp"))


def test_attack_on_ones_own_events(workplace):
    """The clip alone changes nothing where frames are binary."""
    x, y = np.random.default_rng(0).poisson(0.3, (80, 2, 2, 34, 34)).astype(np.uint8), np.arange(80) % 10
    np.savez("own.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
    command = ["attack", *TINY, "--dataset", "own.npz", "--n-train", "80", "--n-test", "40", "--poison-ratio", "0.5",
               "--v-thr-a", "1.1", "--epochs", "1", "--model", "nmnist_net"]
    cli.main([*command, "--frames", "binary"])
    result = json.loads(Path("runs/results/own-own-binary/attack.json").read_text())
    row = result["rows"][0]
    assert row["asr_o"] is None and result["model"] == "nmnist_net" and result["beta"] == 0.03 and result["q"] is None
    assert row["asr_clip_only"] == row["target_rate"]


def test_story_defend_ablate_and_scan_write_what_is_computed(workplace, monkeypatch):
    """The computations have tests of their own."""
    computed = {name: Mock(return_value=dict(rows=[dict(ca=1.0)])) for name in ("story", "defend", "scan", "attack")}
    for module, name in ((story, "story"), (table2, "defend"), (scan, "scan"), (cli.badsnn, "attack")):
        monkeypatch.setattr(module, name, computed[name])
    monkeypatch.setattr(ablations, "ablate", lambda data, s, study: dict(rows=[dict(ca=1.0)]))
    for name in ("print_story", "print_scan"):
        monkeypatch.setattr(report, name, Mock())
    for command in ("story", "defend --attacks badsnn blend --defender-at S_n", "ablate --study power plif power",
                    "scan --models 3"):
        cli.main([*command.split(), *TINY])
    assert computed["defend"].call_args.kwargs == dict(attacks=["badsnn", "blend"], defender_at="S_n")
    assert computed["scan"].call_args.kwargs == dict(n_models=3) and computed["attack"].call_count == 1
    for name in ("attack", "story", "defend", "power", "plif", "scan"):
        result = json.loads(Path(f"runs/results/digits/{name}.json").read_text())
        assert result["rows"] == [dict(ca=1.0)] and result["width"] == SMALL["width"] and result["seconds"] >= 0


def test_stopped(workplace, monkeypatch, capsys):
    """Ctrl-C and lacking memory are one line; a bug is a traceback."""
    for error, shown in ((KeyboardInterrupt(), SystemExit), (RuntimeError("CUDA out of memory"), SystemExit),
                         (RuntimeError("shapes"), RuntimeError), (KeyError("x"), KeyError)):
        monkeypatch.setattr(report, "report", Mock(side_effect=error))
        with pytest.raises(shown):
            cli.main(["report"])
    assert capsys.readouterr().err == "badsnn: CUDA out of memory\n"


def test_a_reader_who_leaves_ends_it_quietly(workplace):
    """report | head -1"""
    Path("runs/results/digits").mkdir(parents=True)
    shutil.copy(ROOT / "results/digits/attack.json", "runs/results/digits")
    reader, writer = os.pipe()
    process = start(ROOT / "badsnn.py", "report", stdout=writer)
    os.close(reader), os.close(writer)
    assert process.communicate()[1] == "" and process.returncode == 0
