"""The other attacks of Table 2: patterns by arithmetic, WaNet's geometry, PGD's ball, who is poisoned and how."""
import math
from functools import partial

import baselines
import runs
import torch
from baselines import badnets, blend, clean_label, pgd, poison, wanet, wanet_field, wanet_grid
from common import prepared_as
from torch import nn

import badsnn
from data import to_float, to_uint8
from models import frozen


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
    noise = torch.rand(4, 32, 32, 2) * 2 - 1
    for s in (0.0, 0.5, 50.0):
        for grid in (wanet_grid(field, s), wanet_grid(field, s, noise)):
            assert grid.abs().max() <= 1
    moved = (wanet_grid(field, 0.5) - wanet_grid(field, 0.0))[:, 4:-4, 4:-4]     # not the border: it is clamped
    assert torch.allclose(moved, 0.5 * field[:, 4:-4, 4:-4] / 32, atol=1e-6)
    jitter = wanet_grid(field, 0.5, noise) - wanet_grid(field, 0.5)
    assert jitter.abs().max() <= 1 / 32 + 1e-6 and jitter.std() > 0
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)                         # brightness = x: the warp is seen
    shift = torch.zeros(1, 32, 32, 2)
    shift[..., 0] = 2 * 32 / 31                                                  # one pixel to the right, at s = 1
    assert torch.allclose(wanet(ramp, shift, s=1.0)[0, 0, 5, :31], ramp[0, 0, 5, 1:], atol=1e-4)


def test_pgd_stays_in_its_ball_and_hurts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))           # linear: the gradient's sign hardly changes
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    before = {name: p.clone() for name, p in model.state_dict().items()}
    x_adv = pgd(model, x, y, eps=0.1, step=0.02, steps=10)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    with frozen(model), torch.no_grad():
        loss = [torch.nn.functional.cross_entropy(model(images), y).item() for images in (x, x_adv)]
    assert loss[1] > loss[0] + 1
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(x_adv, pgd(model, x, y, eps=0.1, step=0.02, steps=10))


def test_poison_is_as_published(workplace, monkeypatch):
    """Who is poisoned, with what, and with which label; the same for the same seed; nothing else is touched."""
    data, s = prepared_as("--dataset", "digits", "--width", "4", "--T", "2")
    monkeypatch.setattr(baselines, "pgd", partial(pgd, steps=11))       # 16 / 255 and more, in steps of 1.5 / 255
    reference = badsnn.fresh_model(data, s)
    for name in ("badnets", "blend", "clean_label"):
        x, y, marked, _ = poison(data, s, name, reference)
        assert all(map(torch.equal, (x, marked), (poison(data, s, name, reference)[i] for i in (0, 2))))
        assert (y[marked] == s.target).all() and torch.equal(y[~marked], data.y_train[~marked])
        if name == "clean_label":                            # labels were right to begin with
            assert marked.sum() == round(0.8 * (y == s.target).sum().item()) == 114 and torch.equal(y, data.y_train)
            changed = (x.int() - data.x_train.int()).abs().flatten(1).amax(1)
            assert changed[marked].max() == 16 and changed[~marked].max() == 0      # PGD's ball
        else:
            assert marked.sum() == round(0.05 * len(y)) == 72 and torch.equal(x, data.x_train)
            assert (data.y_train[marked] == s.target).sum() < 20             # drawn from all classes
    x, y, marked, _ = poison(data, s, "badsnn")
    assert x is data.x_train and y is data.y_train and not marked.any()


def test_the_trigger_comes_after_the_augmentation(workplace, monkeypatch):
    """In every batch exactly the poisoned images carry the trigger, unshifted, whatever the augmentation does."""
    data, s = prepared_as("--dataset", "digits", "--width", "4", "--T", "2", "--epochs", "1", "--batch-size", "64")
    seen = []
    monkeypatch.setattr(badsnn, "to_float", lambda x, s: seen.append(x) or to_float(x, s))
    for name in ("badnets", "blend", "clean_label"):
        seen.clear()
        monkeypatch.setattr(baselines, "pgd", lambda model, x, *args, **options: x)
        model, batches, original = badsnn.fresh_model(data, s), [], baselines.poison_batch
        with monkeypatch.context() as m:
            m.setattr(baselines, "poison_batch", lambda attack, x, *args: batches.append(
                (x, *original(attack, x, *args))) or batches[-1][1:])
            badsnn.train(data, s, name)
        for x, x2, y2, marked in batches:
            wanted = to_uint8(baselines.BASELINES[name](model, s)(to_float(x[marked], s)))
            assert torch.equal(x2[marked], wanted) and torch.equal(x2[~marked], x[~marked])
            assert (y2[marked] == s.target).all() and any(x2 is batch for batch in seen)
        count = dict(clean_label=0.08).get(name, 0.05) * 64 * len(batches)
        assert 0.7 * count < sum(marked.sum() for *_, marked in batches) < 1.3 * count


def test_wanet_batch(workplace):
    """A share is warped by the field and relabelled, twice as many get noise and keep their label, the rest is
    untouched."""
    data, s = prepared_as("--dataset", "digits", "--wanet-ratio", "0.1", "--warp-noise", "2")
    field, of_seed = wanet_field((16, 16)), torch.Generator().manual_seed
    x, y = data.x_train[data.y_train != 0][:100], data.y_train[data.y_train != 0][:100]
    x2, y2, marked = baselines.wanet_batch(x, y, s, field, of_seed(0))
    assert torch.equal(y2 == 0, marked) and torch.equal(marked.nonzero().flatten(), torch.arange(10))
    assert torch.equal(y2[10:], y[10:]) and torch.equal(x2[30:], x[30:])
    warped = wanet(x[:30].float() / 255, field, s.warp).mul(255).round().byte()
    assert torch.equal(x2[:10], warped[:10]) and not torch.equal(x2[10:30], warped[10:])
    counts = [baselines.wanet_batch(x[:4], y[:4], s, field, of_seed(i))[2].sum().item() for i in range(200)]
    assert set(counts) == {0, 1} and 0.3 < sum(counts) / 200 < 0.5           # 0.4 of a sample per batch, on average


def test_poison_and_shuffle_draw_different_numbers(workplace):
    """The poisoned samples are spread over the first epoch's batches."""
    data, s = prepared_as("--dataset", "digits", "--width", "4")
    _, y, poisoned, _ = poison(data, s, "badnets")
    order = torch.randperm(len(y), generator=runs.generator(s.seed, "shuffle", 0))
    place = torch.empty(len(y), dtype=torch.long)
    place[order] = torch.arange(len(y))
    assert place[poisoned].float().mean() > 0.3 * len(y)


def some_frames(n=3, T=5, seed=0):
    """Event counts, most pixels empty: float [n, T, 2, 34, 34]."""
    return torch.poisson(torch.full((n, T, 2, 34, 34), 0.3), generator=torch.Generator().manual_seed(seed))


def test_event_triggers_by_hand():
    """Position, polarity and number of events of every trigger, pixel by pixel in plain loops; all else stays."""
    frames = some_frames()
    before = frames.clone()
    values = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}                        # polarity -> OFF, ON

    def expected(inside, off, on):
        wanted = before.clone()
        for t in range(5):
            for y in range(34):
                for x in range(34):
                    if inside(t, y, x):
                        wanted[:, t, 0, y, x], wanted[:, t, 1, y, x] = off, on
        return wanted
    for polarity, (off, on) in values.items():
        assert torch.equal(baselines.static(frames, polarity),
                           expected(lambda t, y, x: y < 3 and x < 3, off, on))
        assert torch.equal(baselines.moving(frames, polarity),
                           expected(lambda t, y, x: y < 3 and (0, 5, 10, 0, 5)[t] <= x < (3, 8, 13, 3, 8)[t], off, on))
        assert torch.equal(baselines.flashy(frames, polarity), expected(lambda t, y, x: t in (0, 2, 4), off, on))
        assert torch.equal(baselines.flashy(frames, polarity, on=1, off=2),
                           expected(lambda t, y, x: t in (0, 3), off, on))
    plan = torch.tensor([[4 + t, 7, 2] for t in range(5)])
    assert torch.equal(baselines.smart(frames, plan),
                       expected(lambda t, y, x: 4 + t <= y < 7 + t and 7 <= x < 10, 1, 0))
    assert torch.equal(frames, before)                                           # the argument stays
    assert baselines.static(torch.zeros(1, 4, 2, 34, 34)).sum() == 4 * 9
    assert baselines.flashy(torch.zeros(1, 4, 2, 34, 34)).sum() == 2 * 34 * 34


def test_the_smart_plan_finds_the_part_and_its_rarest_polarity():
    x = torch.zeros(20, 50, 2, 34, 34, dtype=torch.uint8)
    x[:, :, 0, 22:33, 0:11], x[:, :, 1, 22:33, 0:6] = 1, 7           # lower left: OFF everywhere, ON too in a half
    x[:, :, 1, 0:11, 11:22] = 200                                     # many events, but in fewer active pixels
    x[:, :, 1, 8:11, 11:22] = 0
    x[0, 0, :, 25, 3], x[0, 0, 1, 26, 3], x[0, 0, 0, 26, 3] = 0, 1, 0  # one empty, one with ON alone
    x[0, 1, :, 25, 3] = 0                                             # another empty one: ON alone is rarest
    plan = baselines.smart_plan(x, seed=0, busiest=True)
    assert plan.shape == (50, 3) and (plan[:, 2] == 1).all()
    y, column = plan[:, 0], plan[:, 1]
    assert y.min() >= 22 + 3 and y.max() + 3 <= 33 and column.min() >= 3 and column.max() + 3 <= 11
    assert (plan[1:, :2] - plan[:-1, :2]).abs().eq(2).all() and len(plan[:, :2].unique(dim=0)) >= 4
    x[:, :, :, :11] = x[:, :, :, 11:, 11:] = 1                        # left in the middle: the quietest part
    x[:, :, :, 11:22, :11], x[:, :, 1, 12, :11], x[:3, :, 0, 14, :9] = 0, 1, 1      # no pixel with both events
    plan = baselines.smart_plan(x, seed=0)
    assert (plan[:, 2] == 3).all() and plan[:, 0].min() >= 11 + 3 and plan[:, 0].max() + 3 <= 22
    assert plan[:, 1].min() >= 3 and plan[:, 1].max() + 3 <= 11
    assert torch.equal(plan, baselines.smart_plan(x, seed=0)) and not torch.equal(plan, baselines.smart_plan(x, seed=1))


def test_poisoned_recordings(workplace):
    """A share of all recordings carries the trigger as counts, and the target's label; the rest is untouched."""
    data, s = prepared_as("--dataset", "ndigits", "--width", "4")
    model = badsnn.fresh_model(data, s)
    model.register_buffer("plan", baselines.smart_plan(data.x_train, s.seed))
    for name in ("static", "moving", "smart", "flashy"):
        x, y, marked, _ = poison(data, s, name)
        assert torch.equal(x, data.x_train) and marked.sum() == round(0.1 * len(y))
        assert (y[marked] == s.target).all() and torch.equal(y[~marked], data.y_train[~marked])
        x, y, _ = baselines.poison_batch(name, x[:200], y[:200], marked[:200], model, s, None)
        wanted = baselines.BASELINES[name](model, s)(data.x_train[:200][marked[:200]].float())
        assert x.dtype == torch.uint8 and torch.equal(x[marked[:200]].float(), wanted) and wanted.max() < 256
        assert torch.equal(x[~marked[:200]], data.x_train[:200][~marked[:200]])
