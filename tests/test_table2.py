"""Table 2 and the story: every row is there once, says what it was measured with, and is not measured again."""
from dataclasses import replace
from functools import partial

import pytest
import torch
from common import prepared

import badsnn
import trigger
from lab import baselines, detectors, story, table2
from lif import neurons

BUDGET = dict(fine_tune=dict(epochs=1), anp=dict(iterations=1), tsbd=dict(epochs=1, max_unlearn=1),
              nad=dict(epochs=1, teacher_epochs=1))


@pytest.fixture
def tiny(digits, tmp_path, monkeypatch):
    """Makes data and settings of tiny runs; defences are short."""
    for name, budget in BUDGET.items():
        monkeypatch.setitem(table2.DEFENSES, name, partial(table2.DEFENSES[name], **budget))
    monkeypatch.setattr(baselines, "pgd", partial(baselines.pgd, steps=2))
    monkeypatch.setattr(trigger, "wanted_perturbations", partial(trigger.wanted_perturbations, max_iter=5))
    monkeypatch.setattr(detectors, "strip", partial(detectors.strip, overlays=4))
    return partial(prepared, epochs=1, n_test=200, data=digits, runs=tmp_path)


def test_defend(tiny):
    """Rows as the table wants them; a second run reads its parts; another defender is another part."""
    data, s = tiny()
    result = table2.defend(data, s)
    rows, first = result["rows"], result["rows"][0]
    assert result["n_defender"] == 80 and 0 <= result["clean_ca"] <= 100 and 0 < result["scan_clean_model"] <= 1
    found = [tuple(row[key] for key in ("attack", "defense", "model", "setting", "trigger")) for row in rows]
    triggers = sorted({row["trigger"] for row in rows if row["attack"] == "badsnn"})
    expected = [("badsnn", defense, model, setting, t) for defense in table2.DEFENSES for model in ("attacked", "clean")
                for setting in ("shipped", "nominal") for t in triggers]
    expected += [(attack, defense, "attacked", "shipped", attack) for attack in baselines.IMAGE_ATTACKS
                 for defense in table2.DEFENSES]
    expected += [(attack, "none", "clean", "shipped", attack) for attack in baselines.IMAGE_ATTACKS]
    assert sorted(found) == sorted(expected) and triggers[-1] == "T_p"
    for row in rows:
        assert all(0 <= row[key] <= 100 for key in ("ca", "target_rate", "asr")) and row["seed"] == 0
        assert row["v_thr"] == (first["v_thr"] if row["attack"] == "badsnn" and row["setting"] == "shipped" else 1.0)
        assert row["defender_at"] == "S_a"
    assert first["v_thr"] > 1 and [(d["attack"], d["trigger"]) for d in result["detectors"]][-4:] == [
        (attack, attack) for attack in baselines.IMAGE_ATTACKS]
    assert all(0 <= d[key] <= 1 for d in result["detectors"] for key in ("strip_auroc", "spikes_auroc", "scan_score"))
    kept = {path: path.stat().st_mtime_ns for path in s.runs.rglob("table2/*.json")}
    assert len(kept) == 5 and table2.defend(data, s)["rows"] == rows
    fewer = table2.defend(data, s, ["badsnn"], "S_n")["rows"]
    assert {row["attack"] for row in fewer} == {"badsnn"} and {row["defender_at"] for row in fewer} == {"S_n"}
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in s.runs.rglob("table2/*.json")}.items()


def test_the_defender_trains_where_the_switch_says(tiny, monkeypatch):
    """At V_a or at 1.0; and what it leaves is scored at V_a and at 1.0 in both cases."""
    data, s = tiny()
    (x, y, scored), model = table2.split_test(data, s), badsnn.fresh_model(data, s)
    at, scored_at = [], []
    monkeypatch.setitem(table2.DEFENSES, "none", lambda net, x, y, **options: at.append(net.lif.v_thr) or net)
    monkeypatch.setattr(table2, "asr", lambda net, data, s, v_thr, *args: scored_at.append(v_thr) or 0.0)
    for where in ("S_a", "S_n"):
        same = dict(attack="badsnn", defense="none", defender_at=where, model="attacked")
        table2.rows_of(same, table2.as_shipped(model, 1.2, s), 1.2, {"T_p": None}, x, y, scored, s)
    assert at == [1.2, 1.0] and scored_at == [1.2, 1.0] * 2 and model.lif.v_thr == 1.0


def test_defend_on_events(tiny):
    """Events have their own attacks, and two defences fewer."""
    result = table2.defend(*tiny("ndigits", T=4, poison_ratio=5), ["static", "badsnn"])
    assert [(d["attack"], d["trigger"]) for d in result["detectors"]] == [("badsnn", "T_s"), ("static", "static")]
    assert {row["defense"] for row in result["rows"]} == {"none", "fine_tune", "clp", "anp"}
    assert len(result["rows"]) == 4 * 4 + 4 + 1


def test_defend_refuses_before_it_trains(tiny, monkeypatch):
    data, s = tiny()
    few = replace(data, x_test=data.x_test[:2], y_test=data.y_test[:2])
    for arguments, message in (((few, s), "--n-test"), ((data, s, ["static"]), "blend"), ((data, s, None, "S"), "S_n")):
        with pytest.raises(ValueError, match=message):
            table2.defend(*arguments)
    monkeypatch.setattr(table2.dist, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="torchrun"):
        table2.defend(data, s)
    assert not list(s.runs.rglob("*.pt"))


def test_the_defenders_images_are_drawn_per_class_and_never_scored(tiny):
    """As many of every unbalanced class, at most ten; others for another seed; and none of them is scored."""
    y_test = torch.cat([torch.full((12 + 3 * label,), label) for label in range(10)])
    x_test = torch.arange(len(y_test)).view(-1, 1, 1, 1).to(torch.uint8)
    data, found = replace(tiny()[0], x_test=x_test, y_test=y_test[torch.randperm(len(y_test))]), []
    for seed in (0, 0, 1):
        x, y, scored = table2.split_test(data, tiny(seed=seed)[1])
        rows = x.flatten().mul(255).round().long()
        assert y.bincount().tolist() == [6] * 10 and torch.equal(y, data.y_test[rows])
        assert sorted([*rows.tolist(), *scored.x_test.flatten().tolist()]) == list(range(len(y_test)))
        found.append(rows.tolist())
    assert found[0] == found[1] != found[2]


def test_story(tiny):
    """Every seed has every answer; each is scored at its own setting; nothing is done twice."""
    data, s = tiny(seeds=2)
    told = story.story(data, s, attack := badsnn.attack(data, s))
    assert [(row["seed"], row["answer"]) for row in told["rows"]] == [(i, a) for i in (0, 1) for a in story.ANSWERS]
    assert all(0 <= row[key] <= 100 for row in told["rows"] for key in ("ca", "target_rate", "asr_p"))
    assert [scan["seed"] for scan in told["scan"]] == [0, 1] and all(0 < scan["clean"] <= 1 for scan in told["scan"])
    assert {"at_chosen", "base_ca", "clean_ca", "chosen", "rows"} == set(told["attack"])
    model, scored = table2.train(data, s, "badsnn"), table2.split_test(data, s)[2]
    with neurons(model, 1.0, 0.5), torch.no_grad():
        guess = model(scored.x_test / 255).argmax(1)
    assert told["rows"][1]["ca"] == pytest.approx(100 * (guess == scored.y_test).float().mean().item(), abs=0.01)
    assert story.story(data, s, attack)["rows"] == told["rows"] and len(list(s.runs.rglob("story/*.json"))) == 2
