"""The threshold scan as a detector: its population, its numbers, the attackers who know it, networks of one's own."""
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import figures
import numpy as np
import pytest
import scan
import tables
import torch
from common import TINY, prepared, refused

import badsnn
import settings
from models import build_model


def test_models_are_drawn_alike_whatever_their_kind():
    s = settings.preset("digits")
    drawn = {kind: [scan.draw(s, i, kind) for i in range(200)] for kind in (None, "badsnn")}
    assert drawn["badsnn"] == [scan.draw(s, i, "badsnn") for i in range(200)]
    for key in ("model", "width", "T", "neuron", "epochs", "label_smoothing", "contrast", "target"):
        values = [{getattr(one, key) for one in ones} for ones in drawn.values()]
        assert values[0] == values[1] and len(values[0]) > 1, key
    for key in ("v_thr_t", "tau_t", "poison_ratio", "malicious_rows"):
        assert len({getattr(one, key) for one in drawn["badsnn"]}) > 1
    thresholds = [one.v_thr_t for one in drawn["badsnn"]]
    assert min(thresholds) == 0.8 and max(thresholds) > 1.9 and 0.1 < thresholds.count(0.8) / 200 < 0.3


def row(kind, score, accused=3, target=3):
    return dict(kind=kind, scores={"100 images": score}, accused=accused, target=target if kind == "badsnn" else None)


def test_the_detectors_numbers_by_hand():
    design = [row("clean", 0.2), row("clean", 0.5), row("badsnn", 0.7), row("badsnn", 0.9)]
    measured = [row("clean", 0.1), row("clean", 0.65), row("badsnn", 0.62), row("badsnn", 0.8), row("badsnn", 0.99, 1)]
    found = scan.summary(design, measured, "100 images")
    assert found["alarm"] == 0.6                                    # halfway between 0.5 and 0.7
    assert found["auroc"] == round(5 / 6, 4)                        # of six pairs only 0.62 against 0.65 is wrong
    assert (found["caught"], found["false_alarms"], found["accused_right"]) == (100.0, 50.0, 66.67)
    assert found["interval"][0] < found["auroc"] <= found["interval"][1] <= 1 and found["n"] == [3, 2]


def test_wanted_probabilities():
    p = scan.soft(torch.tensor([0, 2]), 4, torch.tensor([1.0, 0.6]))
    assert torch.allclose(p, torch.tensor([[1.0, 0, 0, 0], [0.1, 0.1, 0.7, 0.1]]))


@pytest.mark.parametrize("name", scan.EVADERS)
def test_evaders_make_rows_that_fit(name):
    malicious, images = torch.rand(2, 6, 3, 8, 8)
    u, target = torch.linspace(0, 1, 6), torch.full((6,), 9)
    rows = scan.EVADERS[name](malicious, images, u, target, 10, lambda x, v_thr: torch.full((len(x), 10), 0.1))
    assert torch.equal(rows[0][0], malicious) and (rows[0][2].argmax(1)[:5] == 9).all()
    for x, v_thr, wanted in rows:
        assert len(x) == len(v_thr) == len(wanted) and torch.allclose(wanted.sum(1), torch.ones(6))
        assert v_thr.min() >= 1.05 and v_thr.max() <= 2.0
    if name == "decoys":
        assert 9 not in rows[1][2].argmax(1) and len(rows[1][2].argmax(1).unique()) == 4


def test_hiding_changes_a_copy(workplace):
    data, s = prepared()
    clean, model = badsnn.fresh_model(data, s), badsnn.fresh_model(data, replace(s, seed=1))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    hidden = scan.hide(model, clean, data, s, scan.EVADERS["clean_twin"], epochs=1)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert any(not torch.equal(p, before[name]) for name, p in hidden.state_dict().items())
    few = replace(s, batch_size=s.malicious_rows // 2)          # a batch smaller than the malicious rows
    assert scan.hide(model, clean, data, few, scan.EVADERS["decoys"], epochs=1) is not model


def test_photographs_fit_the_images():
    x = scan.photographs(torch.rand(3, 3, 16, 24), torch.Generator().manual_seed(0))
    assert x.shape == (3, 3, 16, 24) and 0 <= x.min() and x.max() <= 1 and x.std() > 0.05
    assert scan.photographs(torch.rand(2, 3, 500, 128), torch.Generator()).shape == (2, 3, 500, 128)


def test_scan_from_training_to_figure(workplace, monkeypatch, capsys):
    """A few tiny models and one evader: what is written, drawn and printed; and a second run trains nothing."""
    monkeypatch.setattr(scan, "N_DESIGN", 1)
    monkeypatch.setattr(scan, "EVADE_SEEDS", 1)
    monkeypatch.setattr(scan, "EVADERS", {"decoys": scan.decoys})
    monkeypatch.setattr(scan, "draw", lambda s, i, kind: replace(s, seed=i, width=random.Random(i).choice((4, 6))))
    command = ["scan", *TINY, "--epochs", "1", "--n-train", "150", "--models", "5"]
    badsnn.main(command)
    r = json.loads(Path("runs/results/digits/scan.json").read_text())
    assert [row["kind"] for row in r["rows"]].count("badsnn") == 6 == [row["kind"] for row in r["rows"]].count("clean")
    for one in [*r["rows"], *r["evaders"]]:
        assert 0.1 <= one["scores"]["100 images"] <= 1 and len(one["curve"]) == len(one["v_thr"]) == 15
        assert {"ca", "target_rate", "v_thr_a"} <= set(one)
    assert {one["evader"] for one in r["evaders"]} == {"none", "decoys"}
    figures.FIGURES["scan"](tables.read_result(Path("runs/results/digits/scan.json")), Path("scan.png"))
    assert Path("scan.png").stat().st_size > 10_000 and "AUROC" in capsys.readouterr().out
    monkeypatch.setattr(scan, "train", None)
    badsnn.main(command)


def own_files(folder):
    torch.manual_seed(0)
    model = build_model("resnet19", 4, T=2, width=4)
    torch.save(model.state_dict(), folder / "model.pt")
    np.savez(folder / "images.npz", x_test=np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    (folder / "mine.py").write_text("import models\ndef build():\n    return models.build_model('resnet19', 4, 2, 4)\n"
                                    "def nothing():\n    return 3\n"
                                    "class Every(models.ImageSNN):\n    def forward(self, x):\n"
                                    "        return super().forward(x, every_step=True)\n"
                                    "class None_(models.ImageSNN):\n    def forward(self, x):\n"
                                    "        return super().forward(x) * float('nan')\n"
                                    "def nans():\n    net = build()\n    net.__class__ = None_\n    return net\n"
                                    "def fails():\n    raise KeyError('weights')\n"
                                    "def steps():\n    net = build()\n    net.__class__ = Every\n    return net\n")


def test_a_network_of_ones_own(workplace, capsys, monkeypatch):
    own_files(workplace)
    known = dict(summary={"100 images": dict(alarm=0.5, caught=99.0, false_alarms=1.0)})
    Path("scan.json").write_text(json.dumps(known))
    result = scan.own("model.pt", "mine:build", "images.npz", "scan.json")
    out = capsys.readouterr().out
    assert f"score {result['score']:.3f}" in out and ("SUSPICIOUS" in out) == (result["score"] > 0.5)


@pytest.mark.parametrize("changes, message", [
    (dict(weights="absent.pt"), "absent.pt"), (dict(weights="images.npz"), "not a file of tensors"),
    (dict(weights="other.pt"), "does not fit"),
    (dict(build="mine"), "module:function"), (dict(build="mine:absent"), "mine:absent"),
    (dict(build="mine:steps"), r"logits \[N, K\]"), (dict(build="mine:nothing"), "no torch.nn.Module"),
    (dict(build="absent_module:build"), "absent_module"), (dict(build="mine:nans"), "no numbers"),
    (dict(build="mine:fails"), "mine:fails: KeyError"),
    (dict(data="absent.npz"), "absent.npz"), (dict(data="mine.py"), "--data mine.py"),
    (dict(data="array.npy"), "--data array.npy"), (dict(data="half.npz"), "--data half.npz"),
    (dict(data="grey.npz"), "takes images"),
    (dict(data="flat.npz"), "N, H, W, C"), (dict(data="large.npz"), r"\[0, 1\]"),
    (dict(data="other.npz"), "no x_test")])
def test_bad_networks_are_refused_in_one_line(workplace, capsys, changes, message):
    own_files(workplace)
    for name, arrays in dict(grey=dict(x=np.zeros((3, 16, 16, 1), np.uint8)), flat=dict(x=np.zeros((3, 16), np.uint8)),
                             large=dict(x=np.full((3, 3, 16, 16), 7.0)), other=dict(z=np.zeros(3))).items():
        np.savez(f"{name}.npz", **arrays)
    np.save("array.npy", np.zeros((2, 16, 16, 3), np.uint8))
    Path("half.npz").write_bytes(Path("images.npz").read_bytes()[:600])
    torch.save({"head.weight": torch.zeros(2, 2)}, "other.pt")
    given = dict(dict(weights="model.pt", build="mine:build", data="images.npz"), **changes)
    error = refused(capsys, "scan", *(part for key, value in given.items() for part in (f"--{key}", value)))
    assert re.search(message, error)


def test_scan_options_belong_together(workplace, capsys):
    assert "together" in refused(capsys, "scan", "--weights", "model.pt")
    assert "at least 5" in refused(capsys, "scan", "--models", "2")
