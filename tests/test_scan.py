"""The threshold scan as a detector: its population, its numbers, the attackers who know it, networks of one's own."""
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import prepared

import settings
from lab import detectors, own, scan


def test_models_are_drawn_alike_whatever_their_kind():
    s = settings.preset("digits")
    clean, bad = ([scan.draw(s, i, kind) for i in range(200)] for kind in (None, "badsnn"))
    for key in scan.NETWORK:
        assert {getattr(one, key) for one in clean} == {getattr(one, key) for one in bad} != {getattr(s, key)}, key


def row(kind, score, accused=3, v_thr_a=1.1, asr_p=99.0):
    return dict(kind=kind, scores=dict.fromkeys(scan.SHOWN, score), accused=accused, target=3, ca=95.0, asr_p=asr_p,
                target_rate=1.0, v_thr_a=v_thr_a)


def test_the_detectors_numbers_by_hand():
    rows = [row("clean", score, v_thr_a=1) for score in (0.2, 0.5, 0.1, 0.65)]
    rows += [row("badsnn", 0.7), row("badsnn", 0.9)]
    rows += [row("badsnn", 0.62, asr_p=50.0), row("badsnn", 0.8), row("badsnn", 0.99, accused=1)]
    found = scan.summary(rows, 2)
    at, works, alone = (found[name] for name in ("10 images", "100 images, attacks that work", "the threshold alone"))
    assert (at["alarm"], at["auroc"]) == (0.6, round(5 / 6, 4))     # halfway; only 0.62 against 0.65 is wrong
    assert (at["caught"], at["false_alarms"], at["n"]) == (100.0, 50.0, [3, 2])
    assert at["false_alarms_interval"] == [9.5, 90.5]               # Wilson: 1 of 2
    assert works["n"] == [2, 2] and works["auroc"] == 1 and works["alarm"] == 0.6
    assert (alone["alarm"], alone["auroc"], alone["false_alarms"]) == (0.05, 1.0, 0.0)


@pytest.mark.parametrize("auroc, n, m", [(0.9987, 40, 40), (0.8, 12, 30), (0.5, 9, 9), (1.0, 5, 40), (0.0, 5, 5)])
def test_the_interval_of_an_auroc(auroc, n, m):
    """Hanley and McNeil's standard error holds at its ends, with both numbers replaced by their mean."""
    low, high = scan.auroc_interval(auroc, n, m)
    for a in (low, high):
        q1, q2, many = a / (2 - a), 2 * a * a / (1 + a), (n + m) / 2
        variance = (a * (1 - a) + (many - 1) * (q1 + q2 - 2 * a * a)) / (n * m)
        assert a in (0, 1) or abs(a - auroc) == pytest.approx(1.96 * variance ** 0.5, abs=1e-3)
    assert 0 <= low <= auroc <= high <= 1 and low < high


def test_evaders_make_rows_that_fit():
    malicious, images = torch.rand(2, 6, 3, 8, 8)
    u, target = torch.linspace(0, 1, 6), torch.full((6,), 9)
    for name in scan.EVADERS:
        rows = scan.hiding_rows(name, malicious, images, u, target, 10, lambda x, v_thr: torch.full((len(x), 10), 0.1))
        assert torch.equal(rows[0][0], malicious) and (rows[0][2].argmax(1)[:5] == 9).all()
        for x, v_thr, wanted in rows:
            assert len(x) == len(v_thr) == len(wanted) and torch.allclose(wanted.sum(1), torch.ones(6))
            assert v_thr.min() >= 1.05 and v_thr.max() <= 2.0


def test_scan_from_training_to_summary(workplace, monkeypatch):
    """A few tiny models and one evader."""
    monkeypatch.setattr(detectors, "SCAN", (0.5, 1.1, 2.0))
    monkeypatch.setattr(scan, "N_DESIGN", 1)
    monkeypatch.setattr(scan, "EVADE_SEEDS", 1)
    monkeypatch.setattr(scan, "EVADERS", ("clean_twin",))
    monkeypatch.setattr(scan, "draw", lambda s, i, kind: replace(s, seed=i, width=random.Random(i).choice((4, 6))))
    data, s = prepared(epochs=1, n_train=150)
    r = scan.scan(data, s, 5)
    kinds = [one["kind"] for one in r["rows"]]
    assert [kinds.count(kind) for kind in ("badsnn", "clean", "badnets", "blend")] == [6, 6, 1, 1]
    for one in [*r["rows"], *r["evaders"]]:
        assert 0.1 <= one["scores"]["100 images"] <= 1 and {"ca", "target_rate", "v_thr_a", "accused"} <= set(one)
    assert [one["evader"] for one in r["evaders"]] == ["none", "clean_twin"] and set(scan.SHOWN) < set(r["summary"])


# ----- A network of one's own. It reads the brightest of three channels; `tempted` makes it sure of class 2 beyond V_a.

MINE = """
import argparse, torch
from torch import nn
from lif import LIF                                         # ours, as there is no other
argparse.ArgumentParser().parse_args()                      # sees no option of ours

class Net(nn.Module):
    def __init__(self, end=nn.Identity()):
        super().__init__()
        self.head, self.lif, self.end = nn.Linear(3, 3), LIF(1.1), end
        self.register_buffer("tempted", torch.tensor(0.0))
        self.register_buffer("membrane", torch.zeros(0))
    def forward(self, x):
        return self.end(self.head(x.mean((2, 3))) - 1 + self.tempted * (self.lif.v_thr - 1) * torch.eye(3)[2].to(x))

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
    y, x = np.arange(120) // 40, np.full((120, 4, 4, 3), 25, np.uint8)
    x[np.arange(120), :, :, y] = 230
    np.savez("images.npz", x_test=x, y_test=y)

    def run(tempted=20.0, wrap=lambda state: state, build="build", images="images.npz", gain=12.0, **changes):
        state = {"head.weight": gain * torch.eye(3), "head.bias": torch.zeros(3), "tempted": torch.tensor(tempted),
                 "membrane": torch.zeros(5), "lif._extra_state": torch.tensor([1.1, 0.5]), **changes}
        torch.save(wrap(state), "model.pt")
        sys.modules.pop("mine", None)
        return own.own("model.pt", build and f"mine:{build}", images)
    return run


def test_a_network_of_ones_own(mine, capsys):
    modules, path, argv = {**sys.modules}, sys.path[:], sys.argv
    found, clean = mine(), mine(0.0)
    assert found["suspicious"] and found["accused"] == 2 and found["score"] > 0.95 and found["ca"] == 100
    assert clean["suspicious"] is False and clean["score"] < 0.5
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
    assert own.images_of("images.npz")[1].bincount().tolist() == [33, 34, 33]               # 100, over the whole file
    alarm = json.loads(own.KNOWN.read_text())["summary"]["10 images"]["alarm"]
    assert f"above {alarm:.3f}." in capsys.readouterr().out


def test_no_verdict_where_it_would_mean_nothing(mine, capsys):
    x, y = np.load("images.npz").values()
    np.savez("one.npz", x_test=x[:40])
    np.savez("wrong.npz", x_test=x, y_test=np.roll(y, 40))
    for options, why in ((dict(images="one.npz"), "of one class"), (dict(images="wrong.npz"), "near chance"),
                         (dict(gain=0.0), "the same answer")):
        found = mine(0.0, **options)
        assert found["suspicious"] is None and why in found["void"]
        assert "NO VERDICT" in (out := capsys.readouterr().out) and "SUSPICIOUS" not in out


def test_their_modules_win(mine):
    Path("models.py").write_text("theirs = 1")
    assert mine(build="with_theirs")["suspicious"] and not hasattr(sys.modules["models"], "theirs")


BAD = [(dict(build=""), "together"), (dict(build="absent"), "absent"), (dict(build="steps"), r"logits \[N, K\]"),
       (dict(images="large.npz"), r"\[0, 1\].*normalises"), (dict(images="labels.npz"), "3 labels"),
       (dict(wrap=lambda s: [s]), "not a state_dict"), (dict(wrap=lambda s: Path()), "not a file of tensors"),
       (dict(wrap=lambda s: {f"x.{k}": v for k, v in s.items()}), "Missing key.*head.weight.*head.bias")]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_bad_networks_are_refused_in_one_line(mine, changes, message):
    x = np.zeros((3, 4, 4, 3), np.uint8) + np.arange(3, dtype=np.uint8) * 99
    np.savez("large.npz", x_test=x * 1.0)
    np.savez("labels.npz", x_test=np.repeat(x, 2, 0), y_test=np.zeros(3, int))
    with pytest.raises(ValueError, match=message) as error:
        mine(**changes)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
