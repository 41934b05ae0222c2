"""Both scans as detectors: their population, its numbers, the attackers who know it, networks of one's own."""
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import prepared
from torch import nn

import settings
from lab import detectors, own, scan
from lif import neurons
from models import build_model


def test_pairs_are_drawn():
    drawn = [scan.draw(settings.preset("digits"), i) for i in range(200)]
    assert all({getattr(one, key) for one in drawn} == set(values) for key, values in scan.DRAWN.items())


def row(kind, seed, margin, asr_p=99.0):
    return dict(kind=kind, seed=seed, margin=margin, score=1 - margin, margin_as_shipped=0.0, v_thr_a=1.1,
                working=asr_p > 51)


def test_the_detectors_numbers_by_hand():
    rows = [row("clean", i, gap) for i, gap in enumerate((0.2, 0.5, 0.1, 0.65))] + [row("decoys", 0, 0.3)]
    rows += [row("badsnn", i, gap) for i, gap in enumerate((0.7, 0.9, 0.62, 0.6))] + [row("badsnn", 4, 0.1, asr_p=50.0)]
    found = scan.summary(rows)
    works, every, hiding, rival = (found[name] for name in (
        "margin scan, working", "margin scan, all", "margin scan, decoys", "threshold alone, all"))
    # the clean twin of a network is not among those that judge it: 0.6 is above 0.2, 0.5 and 0.1, 0.62 is below 0.65
    assert (works["alarm"], works["auroc"], works["caught"], works["n"]) == (0.65, 14 / 16, 75.0, [4, 4])
    assert works["caught_interval"] == [30.1, 95.4]                 # Wilson: 3 of 4
    assert (every["caught"], hiding["caught"], rival["auroc"]) == (60.0, 0.0, 0.5)


def test_evaders_make_rows_that_fit():
    malicious, images = torch.rand(2, 6, 3, 8, 8)
    u, target = torch.linspace(0, 1, 6), torch.full((6,), 9)
    for name in scan.EVADERS:
        rows = scan.hiding_rows(name, malicious, images, u, target, 10, lambda x, v_thr: torch.full((len(x), 10), 0.1),
                                lambda v_thr: images)
        assert torch.equal(rows[0][0], malicious) and (rows[0][2].argmax(1)[:5] == 9).all()
        for x, v_thr, wanted in rows:
            assert len(x) == len(v_thr) == len(wanted) and torch.allclose(wanted.sum(1), torch.ones(6))
            assert v_thr.min() >= 1.05 and v_thr.max() <= 2.0


def test_scan_from_training_to_summary(workplace, monkeypatch):
    """A few tiny pairs and two evaders; twins are shipped at the same threshold, and hidden ones at 1.0."""
    monkeypatch.setattr(detectors, "SCAN", (0.5, 1.1, 2.0))
    monkeypatch.setattr(scan, "N_EVADE", 1)
    monkeypatch.setattr(scan, "EVADERS", ("clean_twin", "low_margins"))
    monkeypatch.setattr(scan, "draw", lambda s, i: replace(s, seed=i, v_thr_n=(1.0, 0.91)[i % 2], width=4))
    data, s = prepared(epochs=1, n_train=150)
    r = scan.scan(data, s, 2)
    assert [one["kind"] for one in r["rows"]] == ["badsnn", "clean", "clean_twin", "low_margins", "badsnn", "clean"]
    assert all(0.1 <= one["score"] <= 1 and one["margin"] > 0 for one in r["rows"])
    shipped = [one["v_thr_a"] for one in r["rows"]]
    assert shipped[0] == shipped[1] > 1.0 == shipped[4] == shipped[5] and "margin scan, all" in r["summary"]


def folded(model, v_thr):
    """The network with its BatchNorms divided by v_thr: at thresholds of 1.0 it spikes as it did at v_thr."""
    model = copy.deepcopy(model)
    for bn in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        bn.weight.data /= v_thr
        bn.bias.data /= v_thr
    return model


def test_a_threshold_is_only_a_unit():
    """Of VGG-16, whose neurons all follow a BatchNorm: folded, it gives the same answers, and both scans the same."""
    torch.manual_seed(0)
    model, x = build_model("vgg16", 4, T=2, width=4).eval(), torch.rand(6, 3, 16, 16)
    for bn in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        bn.weight.data.fill_(2.0)
        bn.bias.data.fill_(0.7)             # else a fresh network hardly spikes
    with neurons(model, v_thr=1.25):
        answers, scans = model(x), (detectors.threshold_scan(model, x), detectors.margin_scan(model, x, steps=2))
    hidden = folded(model, 1.25)
    assert torch.allclose(hidden(x), answers, atol=1e-5) and not torch.allclose(model(x), answers, atol=1e-2)
    for key, before, after in (("score", scans[0], detectors.threshold_scan(hidden, x)),
                               ("gap", scans[1], detectors.margin_scan(hidden, x, steps=2))):
        assert before[key] == pytest.approx(after[key], abs=1e-3)


# ----- A network of one's own. It reads the brightest of ten columns; `tempted` makes it sure of class 2 beyond V_a.

MINE = """
import argparse, torch
from torch import nn
from lif import LIF                                         # ours, as there is no other
argparse.ArgumentParser().parse_args()                      # sees no option of ours

class Net(nn.Module):
    def __init__(self, end=nn.Identity()):
        super().__init__()
        self.head, self.lif, self.end = nn.Linear(16, 10), LIF(1.1), end
        self.register_buffer("tempted", torch.tensor(0.0))
        self.register_buffer("membrane", torch.zeros(0))
    def forward(self, x):
        return self.end(self.head(x.mean((1, 2))) - 1 + self.tempted * (self.lif.v_thr - 1) * torch.eye(10)[2].to(x))

def build(): return Net()
def steps(): return Net(nn.Unflatten(0, (1, -1)))
def with_theirs():
    from models import theirs
    return Net()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with mine.py, 120 images sorted by class, and a function that scans."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    y, x = np.arange(120) // 12, np.full((120, 16, 16, 3), 25, np.uint8)
    x[np.arange(120), :, y] = 230
    np.savez("images.npz", x_test=x, y_test=y)

    def run(tempted=20.0, wrap=lambda state: state, build="build", images="images.npz", gain=12.0, **changes):
        state = {"head.weight": gain * torch.eye(10, 16), "head.bias": torch.zeros(10), "membrane": torch.zeros(5),
                 "tempted": torch.tensor(tempted), "lif._extra_state": torch.tensor([1.1, 0.5]), **changes}
        torch.save(wrap(state), "model.pt")
        sys.modules.pop("mine", None)
        return own.own("model.pt", build and f"mine:{build}", images)
    return run


def test_a_network_of_ones_own(mine, capsys):
    modules, path, argv = {**sys.modules}, sys.path[:], sys.argv
    found, clean = mine(), mine(0.0)
    assert found["suspicious"] and found["accused"] == found["sure_of"] == 2 and found["score"] > 0.95
    assert clean["suspicious"] is False and clean["gap"] < 1 and clean["score"] < 0.5 and clean["ca"] == 100
    assert "SUSPICIOUS" in capsys.readouterr().out and (path, argv) == (sys.path, sys.argv)
    assert all(sys.modules[name] is modules[name] for name in ("models", "lif", "badsnn", "kit.files", "lab.own"))


def test_checkpoints_of_daily_life(mine):
    """Of a compiled DataParallel, with more than the weights in it, and of half precision."""
    for wrap in (lambda s: {"net": {f"_orig_mod.module.{k}": v for k, v in s.items()}, "epoch": 3},
                 lambda s: {"model": {k: v.half() for k, v in s.items()}, "optimizer": {"state": {}}}):
        assert mine(wrap=wrap)["score"] == pytest.approx(mine()["score"], abs=1e-3)


def test_images_as_floats_few_and_without_labels(mine, capsys):
    x, y = np.load("images.npz").values()
    np.savez("floats.npz", x_test=(x / 255).transpose(0, 3, 1, 2)[::10])
    assert (found := mine(images="floats.npz"))["suspicious"] and found["ca"] is None
    assert own.images_of("images.npz")[1].bincount().min() >= 9                # 100, over the whole file
    alarm = json.loads(own.KNOWN.read_text())["summary"]["margin scan, working"]["alarm"]
    assert f"above {alarm:.2f}," in capsys.readouterr().out


def test_no_verdict_where_it_would_mean_nothing(mine, capsys):
    x, y = np.load("images.npz").values()
    np.savez("one.npz", x_test=x[:12])
    np.savez("wrong.npz", x_test=x, y_test=np.roll(y, 40))
    np.savez("small.npz", x_test=x[:, :8], y_test=y)
    for options, why in ((dict(images="one.npz"), "of one class"), (dict(images="wrong.npz"), "near chance"),
                         (dict(images="small.npz"), "3x16x16 alone"),
                         (dict(gain=0.0), "the same answer")):
        found = mine(0.0, **options)
        assert found["suspicious"] is None and why in found["void"]
        assert "NO VERDICT" in (out := capsys.readouterr().out) and "SUSPICIOUS" not in out


@pytest.mark.parametrize("file", ["models.py", "models/__init__.py", "models/theirs.py"])
def test_their_modules_win(mine, file):
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text("theirs = 1")
    assert mine(build="with_theirs")["suspicious"] and not hasattr(sys.modules["models"], "theirs")


BAD = [(dict(build=""), "together"), (dict(build="absent"), "absent"), (dict(build="steps"), r"logits \[N, K\]"),
       (dict(images="large.npz"), r"\[0, 1\].*normalises"), (dict(images="labels.npz"), "3 labels"),
       (dict(wrap=lambda s: [s]), "not a state_dict"), (dict(wrap=lambda s: Path()), "not a file of tensors"),
       (dict(wrap=lambda s: {f"x.{k}": v for k, v in s.items()}), "Missing key.*head.weight.*head.bias")]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_bad_networks_are_refused_in_one_line(mine, changes, message):
    x = np.zeros((3, 16, 16, 3), np.uint8) + np.arange(3, dtype=np.uint8) * 99
    np.savez("large.npz", x_test=x * 1.0)
    np.savez("labels.npz", x_test=np.repeat(x, 2, 0), y_test=np.zeros(3, int))
    with pytest.raises(ValueError, match=message) as error:
        mine(**changes)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
