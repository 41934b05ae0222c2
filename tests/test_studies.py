"""Table 2 and the studies: every cell and row, kept and not run again."""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from common import TINY, attack, prepared, refused

import badsnn
import baselines
import settings
import studies
import trigger


def test_studies_and_report(workplace, monkeypatch, capsys):
    monkeypatch.setattr(studies, "HEATMAP", dict(v_thr_t=(0.8, 1.5), v_thr_a=(1.0, 1.2), tau_a=(0.4, 0.5)))
    monkeypatch.setattr(studies, "POISON_RATIOS", (0.1, 0.2))
    monkeypatch.setattr(studies, "POWERS", (2.0, 4.0))
    monkeypatch.setattr(trigger, "wanted_perturbations", partial(trigger.wanted_perturbations, max_iter=5))
    short = ["--epochs", "1"]
    attack("--v-thr-a", "1.1", *short)
    together = ["threshold", "heatmap", "poison", "power", "plif"]
    for study in (together, ["magnitude"], ["trigger"], ["recipe"]):
        try:
            badsnn.main(["ablate", "--study", *study, *TINY, *short, "--v-thr-a", "1.0", "1.1"])
        except SystemExit:
            assert study in (["magnitude"], ["trigger"])        # a network this small may leave nothing to blend
    written = {study: Path(f"runs/results/digits/{study}.json").stat().st_mtime_ns for study in together}
    capsys.readouterr()
    badsnn.main(["ablate", "--study", *together, *TINY, *short, "--v-thr-a", "1.0", "1.1"])
    assert capsys.readouterr().out.count("finished earlier, see") == 5
    assert written == {study: Path(f"runs/results/digits/{study}.json").stat().st_mtime_ns for study in together}
    rows = json.loads(Path("runs/results/digits/heatmap.json").read_text())["rows"]
    assert len(rows) == 8 and len({(row["v_thr_t"], row["v_thr"], row["tau"]) for row in rows}) == 8
    rows = json.loads(Path("runs/results/digits/poison.json").read_text())["rows"]
    assert [row["n_poison"] for row in rows] == [2, 4]
    rows = json.loads(Path("runs/results/digits/plif.json").read_text())["rows"]
    assert [(row["neuron"], row["v_thr"]) for row in rows] == [("lif", 1.0), ("lif", 1.1), ("plif", 1.0), ("plif", 1.1)]
    assert rows[0]["mean_tau"] == 0.5 and 0 < rows[2]["mean_tau"] < 1
    rows = json.loads(Path("runs/results/digits/power.json").read_text())["rows"]
    assert [(row["q"], row["renormalize"]) for row in rows] == [(2.0, False), (2.0, True), (4.0, False), (4.0, True)]
    assert all(0 <= row[key] <= 100 for row in rows for key in ("asr_p", "asr_p_clean_model", "read"))
    rows = json.loads(Path("runs/results/digits/threshold.json").read_text())["rows"]
    assert len(rows) == 33 and rows[0]["spikes"] > rows[-3]["spikes"] > 0       # a higher threshold, fewer spikes
    badsnn.main(["report"])
    assert Path("runs/results/digits/attack.png").stat().st_size > 10_000
    assert all(Path(f"runs/results/digits/{study}.png").exists()
               for study in ("threshold", "heatmap", "poison", "plif", "power"))


def test_defend(workplace, capsys, monkeypatch):
    """Every cell is filled, finished cells are not run again, and the report draws them. (What the defences do:
    test_defenses.py.)"""
    for name, budget in dict(fine_tune=dict(epochs=1), anp=dict(iterations=2), tsbd=dict(epochs=1, max_unlearn=1),
                             nad=dict(epochs=1, teacher_epochs=1)).items():
        monkeypatch.setitem(studies.DEFENSES, name, partial(studies.DEFENSES[name], **budget))
    monkeypatch.setattr(baselines, "pgd", partial(baselines.pgd, steps=2))
    monkeypatch.setattr(trigger, "wanted_perturbations", partial(trigger.wanted_perturbations, max_iter=5))
    monkeypatch.setattr(studies.defenses, "strip", partial(studies.defenses.strip, overlays=4))
    arguments = ["defend", *TINY, "--epochs", "1", "--n-test", "200", "--n-o", "40", "--epochs-o", "1"]
    badsnn.main(arguments)
    result = json.loads(Path("runs/results/digits/defend.json").read_text())
    assert [(row["attack"], row["defense"]) for row in result["rows"]] == [
        (attack, defense) for attack in ("badsnn", *settings.ATTACKS) for defense in studies.DEFENSES]
    assert result["n_defender"] == 80                        # of every class half of what the smallest has
    for row in result["rows"]:
        assert {"v_thr", "ca", "asr", "target_rate", "destroyed"} <= set(row) and 0 <= row["asr"] <= 100
        assert row["v_thr"] == (result["v_thr_d"] if row["attack"] == "badsnn" and row["defense"] != "restore" else 1.0)
        assert ("asr_clean_model" in row) == (row["defense"] == "none")
        assert ("restored" in row) == ("clean_model" in row) == (row["attack"] == "badsnn")
        assert (row["pruned"] is not None) == (row["defense"] in ("clp", "anp"))
    assert {d["attack"] for d in result["detectors"]} == {"badsnn", *settings.ATTACKS}
    assert all(0 <= d[key] <= 1 for d in result["detectors"] for key in ("strip_auroc", "spikes_auroc"))
    assert "defense" in capsys.readouterr().out
    cells = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("cells/*.json")}
    assert len(cells) >= 40
    badsnn.main(arguments)
    assert cells == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("cells/*.json")}
    assert json.loads(Path("runs/results/digits/defend.json").read_text())["rows"] == result["rows"]
    badsnn.main([*arguments, "--attacks", "badnets", "--seeds", "2"])
    result = json.loads(Path("runs/results/digits/defend.json").read_text())
    assert {row["attack"] for row in result["rows"]} == {"badnets"} and len(result["runs"]) == 2
    for row, one, other in zip(result["rows"], *(run["rows"] for run in result["runs"])):       # mean and spread
        for key in ("ca", "asr", "target_rate"):
            assert row[key] == pytest.approx((one[key] + other[key]) / 2, abs=0.006)
            assert row["spread"][key] == pytest.approx(abs(one[key] - other[key]) / 2 ** 0.5, abs=0.006)
    assert all(path.stat().st_mtime_ns == time for path, time in cells.items()), "seed 0 was there"


def test_a_mean_is_of_one_trigger():
    """A seed whose images could not be blended has no T_o: its rows are T_p's and stay out of T_o's mean."""
    parts = [dict(seed=i, rows=[dict(trigger=name)]) for i, name in enumerate(("T_p", "T_o", "T_o"))]
    assert [part["seed"] for part in studies.with_one_trigger(parts)] == [1, 2]
    assert studies.with_one_trigger(parts[:1]) == parts[:1]


def test_the_defenders_images_are_drawn_per_class_and_never_scored(workplace):
    data, s = prepared()
    x, y, scored = studies.split_test(data, s)
    assert y.bincount(minlength=10).unique().numel() == 1 and len(y) + len(scored.y_test) == len(data.y_test)
    seen = {tuple(image.flatten().tolist()) for image in x.mul(255).round().byte()}
    assert not seen & {tuple(image.flatten().tolist()) for image in scored.x_test}
    tiny = replace(data, x_test=data.x_test[:2], y_test=data.y_test[:2])
    with pytest.raises(ValueError, match="--n-test"):
        studies.split_test(tiny, s)


def test_defend_refuses_too_few_test_images(workplace, capsys):
    for n in ("1", "2"):
        assert "--n-test" in refused(capsys, "defend", *TINY, "--n-test", n)


def test_story(workplace, capsys):
    """The whole story: table, five sentences, times, and the figure."""
    badsnn.main(["story", *TINY, "--epochs", "1", "--n-test", "200"])
    told = json.loads(Path("runs/results/digits/story.json").read_text())
    assert [row["answer"] for row in told["rows"]] == ["none", "restore", "fine_tune", "clean"]
    assert all(0 <= row[key] <= 100 for row in told["rows"] for key in ("ca", "target_rate", "asr_p"))
    assert set(told["scan"]) == {"backdoored", "clean"} and 0 <= told["scan"]["clean"]["score"] <= 1
    assert told["rows"][1]["target_rate"] <= 100 and Path("runs/results/digits/story.png").stat().st_size > 10_000
    assert "Where the time went" in capsys.readouterr().out


@pytest.mark.parametrize("command, models", [("attack", 2), ("story", 2), ("defend", 3), ("ablate", 2)])
def test_fresh_trains_every_model_once(workplace, capsys, monkeypatch, command, models):
    monkeypatch.setattr(studies, "DEFENSES", {"none": studies.DEFENSES["none"]})
    monkeypatch.setattr(baselines, "pgd", partial(baselines.pgd, steps=2))
    tiny = [command, *TINY, "--epochs", "1", "--n-test", "200"]
    tiny += dict(defend=["--attacks", "clean_label", "badsnn"], ablate=["--study", "power", "trigger"]).get(command, [])
    badsnn.main(tiny)
    capsys.readouterr()
    badsnn.main([*tiny, "--fresh"])
    assert capsys.readouterr().out.count(" parameters, ") == models


def test_no_variant_of_the_events_study_runs_twice():
    for changes in ({}, dict(T=10), dict(frames="binary"), dict(neuron="lif_atan")):
        variants = studies.event_variants(settings.preset("ndigits", **changes))
        assert len(variants) == len(set(variants)) >= 3


def test_no_recipe_runs_twice():
    """The preset of CIFAR-100 has no shifts to leave out."""
    for name, n in (("digits", 4), ("cifar10", 4), ("cifar100", 3)):
        variants = studies.recipes(settings.preset(name))
        assert len(variants) == len(set(variants)) == n


def test_defend_and_study_on_events(workplace, monkeypatch):
    """Events have their own attacks and defences, and a study in which T_s meets them."""
    for name, budget in dict(fine_tune=dict(epochs=1), anp=dict(iterations=1)).items():
        monkeypatch.setitem(studies.DEFENSES, name, partial(studies.DEFENSES[name], **budget))
    monkeypatch.setattr(studies.defenses, "strip", partial(studies.defenses.strip, overlays=4))
    tiny = ["--dataset", "ndigits", *TINY, "--epochs", "1", "--n-test", "200"]
    badsnn.main(["defend", *tiny])
    result = json.loads(Path("runs/results/ndigits/defend.json").read_text())
    assert [(row["attack"], row["defense"]) for row in result["rows"]] == [
        (attack, defense) for attack in ("badsnn", *settings.EVENT_ATTACKS)
        for defense in ("none", "fine_tune", "clp", "anp", "restore")]
    assert [d["trigger"] for d in result["detectors"]] == ["T_s", *settings.EVENT_ATTACKS]
    assert all(0 < d["scan_score"] <= 1 for d in result["detectors"]) and 0 < result["scan_clean_model"] <= 1
    monkeypatch.setitem(studies.STUDIES, "events", (lambda s: [s, replace(s, frames="binary")], studies.events))
    badsnn.main(["ablate", "--study", "events", *tiny, "--T", "4"])
    rows = json.loads(Path("runs/results/ndigits/events.json").read_text())["rows"]
    assert [row["attack"] for row in rows[:4]] == list(settings.EVENT_ATTACKS) and len(rows) == 4 + 2 * 3 * 7
    assert all(0 <= row["asr"] + row["silent"] <= 100 for row in rows)
    badsnn.main(["report"])
    assert all(Path(f"runs/results/ndigits/{name}.png").exists() for name in ("defend", "events"))
