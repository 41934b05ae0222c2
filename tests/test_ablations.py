"""The studies: every row is there, no two variants train the same model, and each refuses what it is not for."""
from dataclasses import replace
from functools import partial

import pytest
import torch
from common import prepared

import trigger
from lab import ablations


@pytest.fixture
def tiny(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "HEATMAP", dict(v_thr_t=(0.8, 1.5), v_thr_a=(1.0, 1.2), tau_a=(0.4, 0.5)))
    monkeypatch.setattr(ablations, "POISON_RATIOS", (0.1, 0.2))
    monkeypatch.setattr(ablations, "POWERS", (1.0, 4.0))
    return partial(prepared, epochs=1, v_thr_a=(1.0, 1.1), data=digits, runs=tmp_path)


def test_studies(tiny, tmp_path, capsys):
    """On a fresh disk no variant finds a model of another: two processes would train it at once."""
    rows = {}
    for study, n_models in dict(threshold=1, heatmap=2, poison=2, power=2, plif=4).items():
        result = ablations.ablate(*tiny(runs=tmp_path / study), study)
        out, rows[study] = capsys.readouterr().out, result["rows"]
        assert result["study"] == study and out.count(" parameters, ") == n_models and "finished earlier" not in out
    assert len(rows["heatmap"]) == 8 == len({(r["v_thr_t"], r["v_thr"], r["tau"]) for r in rows["heatmap"]})
    assert [row["n_poison"] for row in rows["poison"]] == [2, 4]
    assert [(row["neuron"], row["v_thr"]) for row in rows["plif"]] == [
        ("lif", 1.0), ("lif", 1.1), ("plif", 1.0), ("plif", 1.1)]
    assert rows["plif"][0]["mean_tau"] == 0.5 and 0 < rows["plif"][2]["mean_tau"] < 1
    assert [(r["q"], r["renormalize"]) for r in rows["power"]] == [(1, False), (1, True), (4, False), (4, True)]
    assert all(0 <= row[key] <= 100 for row in rows["power"] for key in ("asr_p", "asr_p_clean_model", "read"))
    same = rows["power"][1]                                     # re-normalised, q = 1 changes nothing
    assert same["asr_p"] == same["target_rate"]
    assert len(rows["threshold"]) == 33 and rows["threshold"][0]["spikes"] > rows["threshold"][-3]["spikes"] > 0


def test_magnitude(tiny, monkeypatch):
    """With a T_o of 0.1 everywhere: m scales it; and DeepFool's length is of the images that it moves."""
    monkeypatch.setattr(ablations, "train_trigger", lambda *args: (
        lambda x, magnitude=1.0: (x + 0.1 * magnitude).clamp(0, 1), {}))
    monkeypatch.setattr(trigger, "deepfool", lambda net, x, target: (
        3.0 * torch.eye(len(x), x[0].numel()).view(x.shape) * (torch.arange(len(x)) % 2).view(-1, 1, 1, 1)))
    rows = ablations.magnitude(*tiny())
    assert [row["magnitude"] for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
    assert rows[0]["asr_o"] == rows[0]["target_rate"] and [rows[i]["linf"] for i in (0, 4, 7)] == [0, 0.1, 0.2]
    assert rows[0]["l2_deepfool"] == rows[0]["l2_deepfool_clean_model"] == 3.0


def test_events(tiny, monkeypatch):
    data, s = tiny("ndigits", T=4, poison_ratio=5, n_test=50)
    assert len(ablations.variants("events", s)) == 3 == len(set(ablations.variants("events", s)))
    assert len(ablations.variants("events", replace(s, T=10))) == 2
    monkeypatch.setattr(ablations, "variants", lambda study, s: [s])
    rows = ablations.ablate(data, s, "events")["rows"]
    assert len({(row["attack"], row["trigger"]) for row in rows}) == len(rows) == 3 * 7
    assert all(0 <= row["asr"] + row["silent"] <= 100 for row in rows)


def test_the_event_trigger_adds_events():
    frames = torch.randint(3, (2, 4, 2, 34, 34)).float()
    added = ablations.event_trigger(frames, 50, seed=1) - frames
    assert (added >= 0).all() and torch.equal(added.sum((2, 3, 4)), torch.full((2, 4), 50.0))
    assert torch.equal(added, ablations.event_trigger(frames, 50, seed=1) - frames)
    assert not torch.equal(added, ablations.event_trigger(frames, 50, seed=2) - frames)


@pytest.mark.parametrize("study, neuron", [("events", "lif"), ("heatmap", "plif"), ("plif", "plif")])
def test_a_study_refuses_what_it_is_not_made_for(tiny, tmp_path, study, neuron):
    with pytest.raises(ValueError, match=study):
        ablations.ablate(*tiny(neuron=neuron), study)
    assert not list(tmp_path.rglob("*.pt"))
