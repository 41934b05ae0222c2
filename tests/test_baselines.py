"""The other attacks of Table 2: patterns by arithmetic, WaNet's geometry, PGD's ball, who is poisoned and how."""
import math
from functools import partial

import pytest
import torch
from common import prepared
from torch import nn

import badsnn
from data import to_float, to_uint8
from lab import baselines
from lab.baselines import Poison, badnets, blend, clean_label, pgd, wanet, wanet_field
from models import frozen


@pytest.fixture
def tiny(digits, tmp_path):
    return partial(prepared, n_train=None, data=digits, runs=tmp_path)


def test_badnets_and_blend_by_arithmetic():
    x = torch.rand(2, 3, 8, 8)
    before, out = x.clone(), badnets(x)
    assert ((out[:, :, 5:, 5:] == 1).all() and torch.equal(out[:, :, :5], x[:, :, :5])
            and torch.equal(out[:, :, :, :5], x[:, :, :, :5]))
    assert torch.equal(x, before)                                    # the argument stays
    pattern = (blend(x, 0.2, seed=3) - 0.8 * x) / 0.2
    assert torch.allclose(pattern[0], pattern[1], atol=1e-5) and 0 <= pattern.min() + 1e-5 and pattern.max() <= 1 + 1e-5
    assert torch.allclose(blend(x, 1.0, seed=3), pattern, atol=1e-5) and torch.equal(blend(x, 0.0), x)
    assert not torch.equal(blend(x, seed=0), blend(x, seed=1)) and torch.equal(blend(x, seed=1), blend(x, seed=1))


def test_clean_label_pattern():
    """Black and white corners, mirrored left to right; everything else untouched."""
    out = clean_label(torch.full((1, 3, 8, 8), 0.5))[0, 0]
    assert out[:3, :3].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]] == out[-3:, :3].tolist()
    assert torch.equal(out[:, -3:], out[:, :3].flip(1)) and (out[3:-3] == 0.5).all() and (out[:, 3:-3] == 0.5).all()


def test_wanet_geometry():
    field = wanet_field((16, 16), k=16)                              # as many vectors as pixels: no interpolation
    assert math.isclose(field.abs().mean().item(), 1, rel_tol=1e-5)
    field = wanet_field((32, 32), seed=5)
    assert field.shape == (1, 32, 32, 2) and 0.5 < field.abs().mean() < 1.5      # enlarging roughly keeps the mean
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(wanet(x, field, s=0.0), x, atol=1e-5)                  # the identity
    assert 0 <= wanet(x, field, s=50.0).min() and wanet(x, field, s=50.0).max() <= 1
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)                         # brightness = x: the warp is seen
    shift = torch.zeros(1, 32, 32, 2)
    shift[..., 0] = 2 * 32 / 31                                                  # one pixel to the right, at s = 1
    assert torch.allclose(wanet(ramp, shift, s=1.0)[0, 0, 5, :31], ramp[0, 0, 5, 1:], atol=1e-4)
    moved = (wanet(ramp, field, s=0.5) - ramp)[0, 0, 4:-4, 4:-4]                 # not the border: it is clamped
    assert torch.allclose(moved, 0.5 * field[0, 4:-4, 4:-4, 0] / 2 / 32, atol=1e-4)     # the image is 2 wide


def test_pgd_stays_in_its_ball_and_hurts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))           # linear: the gradient's sign hardly changes
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    before = {name: p.clone() for name, p in model.state_dict().items()}
    x_adv = pgd(model, x, y, eps=0.1, step=0.02, steps=10)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    with frozen(model), torch.no_grad():
        loss = [torch.nn.functional.cross_entropy(model(images), y).item() for images in (x, x_adv)]
    assert loss[1] > loss[0] + 1 and torch.equal(x_adv, pgd(model, x, y, eps=0.1, step=0.02, steps=10))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_poison_is_as_published(tiny, monkeypatch):
    """Who is poisoned, with what, and with which label; the same for the same seed; nothing else is touched."""
    data, s = tiny()
    reference = badsnn.fresh_model(data, s)
    monkeypatch.setattr(baselines, "pgd", partial(pgd, steps=11))       # 16 / 255 and more, in steps of 1.5 / 255
    for name in ("badnets", "blend", "clean_label"):
        x, y, marked = Poison(name, data, s, reference).samples(data)
        assert all(map(torch.equal, (x, y, marked), Poison(name, data, s, reference).samples(data)))
        if name == "clean_label":                            # labels were right to begin with
            assert marked.sum() == round(0.8 * (y == s.target).sum().item()) == 114 and torch.equal(y, data.y_train)
            changed = (x.int() - data.x_train.int()).abs().flatten(1).amax(1)
            assert changed[marked].max() == 16 and changed[~marked].max() == 0      # PGD's ball
        else:
            assert marked.sum() == round(0.05 * len(y)) == 72 and torch.equal(x, data.x_train)
            assert (data.y_train[marked] == s.target).sum() < 20             # drawn from all classes
    assert len({str(Poison(name, data, s, r).decides) for name in ("badnets", "blend") for r in (None, reference)}) == 4


def test_wanet_batch(tiny):
    """A tenth is warped by the field and relabelled, the rest is untouched; rounded at random where it is no number."""
    (data, s), rng = tiny(), torch.Generator().manual_seed(0)
    poison, t = Poison("wanet", data, s), baselines.trigger_of("wanet", data, s)
    x, y = data.x_train[data.y_train != 0][:100], data.y_train[data.y_train != 0][:100]
    none = torch.zeros(100, dtype=torch.bool)
    x2, y2, marked = poison.batch(x, y, none, rng)
    assert torch.equal(y2 == 0, marked) and torch.equal(marked.nonzero().flatten(), torch.arange(10))
    assert torch.equal(y2[10:], y[10:]) and torch.equal(x2[10:], x[10:])
    assert torch.equal(x2[:10], to_uint8(t(x[:10] / 255))) and not torch.equal(x2[:10], x[:10])
    counts = [poison.batch(x[:4], y[:4], none[:4], rng)[2].sum().item() for _ in range(200)]
    assert set(counts) == {0, 1} and 0.3 < sum(counts) / 200 < 0.5           # 0.4 of a sample per batch, on average


def test_event_triggers_by_hand():
    """Position, polarity and number of events of every trigger; all else stays."""
    frames = torch.poisson(torch.full((3, 5, 2, 34, 34), 0.3), generator=torch.Generator().manual_seed(0))
    before = frames.clone()

    def expected(places):
        wanted = before.clone()
        for t, y, x in places:
            wanted[:, t, 0, y, x], wanted[:, t, 1, y, x] = 0, 1         # OFF, ON
        return wanted
    three, all_of = slice(3), slice(None)
    assert torch.equal(baselines.static(frames), expected([(t, three, three) for t in range(5)]))
    assert torch.equal(baselines.moving(frames), expected(
        [(t, three, slice(x, x + 3)) for t, x in enumerate((0, 5, 10, 0, 5))]))
    assert torch.equal(baselines.flashy(frames), expected([(t, all_of, all_of) for t in (0, 2, 4)]))
    assert torch.equal(frames, before)                                           # the argument stays


def test_marked_samples_of_a_batch_carry_the_trigger(tiny, monkeypatch):
    """And the target's label; the rest is untouched. Of recordings a tenth is marked, and stays counts."""
    monkeypatch.setattr(baselines, "pgd", lambda model, x, *args, **options: x)
    for (data, s), names in ((tiny(), ("badnets", "blend", "clean_label")),
                             (tiny("ndigits", T=4, poison_ratio=5), baselines.EVENT_ATTACKS)):
        for name in names:
            poison, t = Poison(name, data, s), baselines.trigger_of(name, data, s)
            x, y, marked = poison.samples(data)
            assert torch.equal(x, data.x_train) and (y[marked] == s.target).all()
            assert torch.equal(y[~marked], data.y_train[~marked])
            assert marked.sum() == round(0.1 * len(y)) or not data.events
            x2, y2, _ = poison.batch(x[:200], y[:200], marked[:200], None)
            x, marked = x[:200], marked[:200]
            assert torch.equal(x2[marked], to_uint8(t(to_float(x[marked], s)))) and torch.equal(y2, y[:200])
            assert marked.any() and torch.equal(x2[~marked], x[~marked])
