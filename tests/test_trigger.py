"""The triggers: by arithmetic, in range, repeatable."""
import math

import pytest
import torch
from torch import nn

import trigger
from lif import LIF, neurons
from models import build_model, frozen
from trigger import (
    UNet,
    adaptive_blend,
    badnets,
    blend,
    check_trigger,
    clean_label,
    deepfool,
    optimized_trigger,
    power_trigger,
    spike_trigger,
    train_unet,
    trigger_losses,
    wanet,
    wanted_perturbations,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_power_trigger_is_eq_3():
    """Literal: the network's first layer, (x - mean) / std, sees exactly x^q. Re-normalised: x^q in pixels."""
    x = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    assert torch.allclose((power_trigger(x, 2, MEAN, STD) - mean) / std, x * x, atol=1e-5)
    assert torch.allclose(power_trigger(x, 3, MEAN, STD, renormalize=True), x * x * x, atol=1e-6)
    assert torch.equal(power_trigger(x, 1, MEAN, STD, renormalize=True), x)          # q = 1 is the identity
    assert not torch.allclose(power_trigger(x, 1, MEAN, STD), x, atol=0.05)           # not in the literal reading


@pytest.mark.parametrize("q", [0, -1, float("nan"), float("inf")])
def test_bad_q(q):
    with pytest.raises(ValueError, match="q must"):
        power_trigger(torch.rand(1, 3, 4, 4), q, MEAN, STD)


def test_spike_trigger():
    frames = torch.randint(0, 4, (2, 4, 2, 34, 34)).float()
    out = spike_trigger(frames, 0.03, torch.Generator().manual_seed(1))
    assert out.min() >= 0 and out.max() <= 1 and out.shape == frames.shape
    assert ((out - frames.clamp(0, 1)).abs() <= 0.03 + 1e-6).all() and not torch.equal(out, frames.clamp(0, 1))
    assert torch.equal(out, spike_trigger(frames, 0.03, torch.Generator().manual_seed(1)))
    assert not torch.equal(out, spike_trigger(frames, 0.03, torch.Generator().manual_seed(2)))
    assert torch.equal(spike_trigger(frames, 0.0), frames.clamp(0, 1))               # the clip alone
    assert out[:, 0].ne(out[:, 1]).any()                                             # varies over time
    for beta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta"):
            spike_trigger(frames, beta)


def test_check_trigger():
    x, frames = torch.rand(2, 3, 4, 4), torch.full((2, 4, 2, 3, 3), 5.0)
    check_trigger(x, x), check_trigger(frames, frames + 1)
    for bad in (x[:1], x.double(), x + 1, x - 1, x * float("nan")):
        with pytest.raises(ValueError):
            check_trigger(x, bad)
    with pytest.raises(ValueError):
        check_trigger(frames, -frames)


# ---------------------------------------------------------------------------------------------------------
# T_o

class Linear(nn.Module):
    """logits = W x + b on images of 3 x 4 x 4: DeepFool's answer is known in closed form."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(48, classes)

    def forward(self, x):
        return self.f(x.flatten(1))


@pytest.mark.parametrize("classes, max_step", [(2, None), (6, None), (6, 0.02)])
def test_deepfool_on_a_linear_model_is_the_distance_to_the_nearest_boundary(classes, max_step):
    model, x = Linear(classes), torch.rand(20, 3, 4, 4) * 0.5 + 0.25
    delta, success = deepfool(model, x, classes, max_iter=500, overshoot=0.02, max_step=max_step, clip=False,
                              with_success=True)
    W, b = model.f.weight.detach(), model.f.bias.detach()
    for i in range(20):
        f = W @ x[i].flatten() + b
        k0 = f.argmax()
        others = [k for k in range(classes) if k != k0]
        distances = torch.stack([(f[k0] - f[k]) / (W[k] - W[k0]).norm() for k in others])
        nearest = others[distances.argmin()]
        w = W[nearest] - W[k0]
        length = delta[i].norm()
        assert torch.allclose(delta[i].flatten() / length, w / w.norm(), atol=1e-4)
        if max_step is None:
            assert length.item() == pytest.approx(1.02 * (distances.min().item() + 1e-4), rel=1e-4)
        else:       # many short steps end at the boundary, or beyond it by at most the overshoot and 1e-4 a step
            assert 0.999 * distances.min() <= length <= 1.02 * (
                distances.min() + 1e-4 * (2 + distances.min() / max_step))
    assert success.all() and (model(x).argmax(1) != model(x + delta).argmax(1)).all()


def test_deepfool_on_a_spiking_network():
    """Successes change the answer, failures are zero, images stay in [0, 1], the model comes back untouched;
    targeted too."""
    torch.manual_seed(0)
    model, x, y = build_model("resnet19", 3, T=2, width=8), 0.5 * torch.rand(12, 3, 16, 16), torch.arange(12) % 3
    for k in range(3):
        x[y == k, ..., 4 * k:4 * k + 4] += 0.5                           # a bright stripe at another place
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for _ in range(50):
            model(x)                                                     # settles BatchNorm's running statistics
    before = {k: v.clone() for k, v in model.state_dict().items()}
    delta, success = deepfool(model, x, 3, max_step=1.0, with_success=True)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with frozen(model), torch.no_grad():
        changed = model(x).argmax(1) != model((x + delta).clamp(0, 1)).argmax(1)
    assert success.any() and torch.equal(changed, success) and delta.isfinite().all()
    assert (delta[~success] == 0).all() and -1e-6 <= (x + delta).min() and (x + delta).max() <= 1 + 1e-6
    delta, success = deepfool(model, x, max_step=1.0, target=2, with_success=True)
    with frozen(model), torch.no_grad():
        assert (model((x + delta).clamp(0, 1)).argmax(1)[success] == 2).all()


def test_deepfool_without_a_gradient_gives_up():
    model, x = build_model("resnet19", 5, T=2, width=4), torch.rand(3, 3, 16, 16)
    with neurons(model, v_thr=1000.0):                      # no spike, no surrogate: all gradients are zero
        delta, success = deepfool(model, x, max_iter=5, with_success=True)
    assert not success.any() and (delta == 0).all()


class Brightness(nn.Module):
    """Says 1 where the mean of the first channel is above a threshold."""

    def forward(self, x):
        bright = x[:, 0].mean((1, 2)) - 0.5
        return torch.stack([-bright, bright], 1)


def test_blend_takes_the_largest_ratio_that_works():
    x = torch.full((4, 3, 2, 2), 0.3)
    x_p = torch.tensor([0.9, 0.9, 0.1, 0.9]).view(4, 1, 1, 1).expand_as(x)
    x_adv = torch.tensor([0.1, 0.8, 0.2, 0.5]).view(4, 1, 1, 1).expand_as(x)
    blend, ratio, found = adaptive_blend(Brightness(), x, x_adv, x_p, target=1, k=5)
    assert found.tolist() == [True, True, False, True]
    # 0.9 - 0.8 a > 0.5 for a = 0 and 0.25 only; the second for all a; the third for none;
    # the fourth: 0.9 - 0.4 a > 0.5 up to 0.75
    assert ratio.tolist() == [0.25, 1.0, 0.0, 0.75]
    assert torch.allclose(blend[:, 0, 0, 0], torch.tensor([0.7, 0.8, 0.3, 0.6]))
    only, ratio, _ = adaptive_blend(Brightness(), x, x_adv, x_p, target=1, k=1)          # a = 0: T_p itself
    assert torch.equal(only[0], x_p[0]) and ratio[0] == 0
    literal, _, found = adaptive_blend(Brightness(), x, x_adv, x_p, target=1, k=2, literal=True)
    assert found.tolist() == [True, True, False, True] and torch.allclose(literal[0], (x_p - x).abs()[0])


def test_losses_of_eq_6_by_hand():
    made = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2) / 10
    wanted = torch.tensor([4.0, 3.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2) / 10
    logits = torch.tensor([[2.0, 0.0]])
    sim, adv, wmse = trigger_losses(made, wanted, logits, target=0, std=(0.5, 0.5, 0.5))
    assert sim.item() == pytest.approx(1 - 24 / 25, abs=1e-5)                            # cosine of (3, 4) and (4, 3)
    assert adv.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-5)
    assert wmse.item() == pytest.approx(((1 + 1) * 0.2 ** 2 + (1 + 0.75) * 0.2 ** 2) / 2, abs=1e-5)


def test_generator_learns_one_batch_and_reloads(tmp_path):
    torch.manual_seed(0)
    model, generator, x = (build_model("resnet19", 3, T=2, width=4), UNet(3, (16, 16), width=8),
                           torch.rand(20, 3, 16, 16))
    wanted = 0.4 * (x - 0.5)
    history = train_unet(generator, model, x, wanted, 1, (0.3,) * 3, epochs=40, batch=20, lr=5e-3)
    assert history[-1][0] < 0.5 * history[0][0] and history[-1][2] < 0.5 * history[0][2]
    out = optimized_trigger(x, generator, 1)
    check_trigger(x, out)
    assert torch.allclose(optimized_trigger(x, generator, 1, magnitude=0.0), x)
    assert not torch.equal(generator(x, 0), generator(x, 1))                              # the target is an input
    torch.save(generator.state_dict(), tmp_path / "g.pt")
    again = UNet(3, (16, 16), width=8)
    again.load_state_dict(torch.load(tmp_path / "g.pt", weights_only=True))
    assert torch.equal(optimized_trigger(x, again.eval(), 1), out)


def test_generator_on_images_of_odd_size():
    x = torch.rand(2, 3, 18, 21)
    assert optimized_trigger(x, UNet(5, (18, 21)).eval(), target=3).shape == x.shape


def test_a_budget_bounds_the_generator_and_changes_no_direction():
    made, x = {}, torch.rand(6, 3, 16, 16)
    for budget in (None, 1.0, 0.1, 0.01):
        torch.manual_seed(0)
        made[budget] = UNet(3, (16, 16), width=4, budget=budget).eval()(x, 0)
    free = made[None].square().mean((1, 2, 3)).sqrt()
    assert torch.equal(made[1.0], made[None]) and (free > 0.01).all()
    for budget in (0.1, 0.01):
        assert torch.allclose(made[budget].square().mean((1, 2, 3)).sqrt(), free.clamp(max=budget))
        assert (torch.cosine_similarity(made[budget].flatten(1), made[None].flatten(1)) > 0.9999).all()


def test_a_weight_on_the_nominal_setting_keeps_the_answers_there():
    """Trained against a model at v_thr 1.3, T_o disturbs its answers at 1.0, unless these have a weight."""
    class Colors(nn.Module):
        """The answer is the color that makes its neuron spike most."""
        def __init__(self):
            super().__init__()
            self.lif = LIF()

        def forward(self, x):
            return 4 * self.lif(2 * x.mean((2, 3)).expand(4, -1, -1)).mean(0)
    torch.manual_seed(0)
    model, x, disturbed = Colors(), torch.rand(40, 3, 16, 16) * torch.rand(40, 3, 1, 1), {}
    with torch.no_grad():
        before = model(x).argmax(1)
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        generator = UNet(3, (16, 16), width=8)
        with neurons(model, 1.3, 0.5):
            train_unet(generator, model, x, torch.zeros_like(x), 1, (0.3,) * 3, (0.0, 1.0, 0.0), weight, epochs=20,
                       batch=40, lr=5e-3)
        with torch.no_grad():
            disturbed[weight] = nn.functional.cross_entropy(model(optimized_trigger(x, generator, 1)), before).item()
    assert disturbed[1.0] < 0.8 * disturbed[0.0]


def test_wanted_perturbations_lead_to_the_target():
    torch.manual_seed(0)
    model, x = build_model("resnet19", 3, T=2, width=4), torch.rand(10, 3, 16, 16)
    target = model.eval()(power_trigger(x, 2, MEAN, STD)).argmax(1).mode().values.item()
    kept, wanted = wanted_perturbations(model, x, 2, MEAN, STD, target, max_iter=3)
    assert len(kept) == len(wanted) > 0
    assert (model((kept + wanted).clamp(0, 1)).argmax(1) == target).float().mean() > 0.9


def test_triggers_refuse_integers():
    """Stored bytes are no images in [0, 1]."""
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for t in (lambda x: power_trigger(x, 2, MEAN, STD), badnets, blend, wanet, clean_label,
              lambda x: spike_trigger(x, 0.1), lambda x: trigger.deepfool(None, x),
              lambda x: optimized_trigger(x, None, 0)):
        with pytest.raises(ValueError, match="x.float"):
            t(x)


def test_noise_of_t_s_differs_from_batch_to_batch_and_is_repeatable():
    frames = torch.rand(4, 2, 2, 34, 34).round()
    first, second = (trigger.seeded_spike_trigger(part, 0.3, seed=1) - part for part in frames.split(2))
    assert not torch.equal(first[frames[:2] == 0].sort().values[-50:], second[frames[2:] == 0].sort().values[-50:])
    assert torch.equal(trigger.seeded_spike_trigger(frames, 0.3, 1), trigger.seeded_spike_trigger(frames, 0.3, 1))
    assert not torch.equal(trigger.seeded_spike_trigger(frames, 0.3, 1), trigger.seeded_spike_trigger(frames, 0.3, 2))


def test_sizes_do_not_depend_on_the_batch():
    x = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)

    def t(images):
        assert len(images) <= 3
        return images * 0.5
    assert trigger.sizes(t, x, batch=3) == pytest.approx(trigger.sizes(lambda images: images * 0.5, x), abs=0.011)
    images = x.float() / 255
    assert trigger.sizes(t, x, batch=3)["l2"] == pytest.approx((images / 2).flatten(1).norm(dim=1).mean().item(),
                                                               abs=0.01)


def test_added_events():
    """Exactly n events more in every step, none fewer anywhere, drawn anew for every step and repeatable."""
    frames = torch.poisson(torch.full((3, 4, 2, 34, 34), 0.3), generator=torch.Generator().manual_seed(0))
    before, seeded = frames.clone(), trigger.seeded_event_trigger(frames, 70, seed=1)
    added = trigger.event_trigger(frames, 70, torch.Generator().manual_seed(0)) - before
    assert (added.flatten(2).sum(2) == 70).all() and added.min() == 0 and torch.equal(added, added.round())
    assert len({tuple(step.tolist()) for step in added.flatten(0, 1).flatten(1)}) == 12
    assert added[:, :, 0].sum() > 0 and added[:, :, 1].sum() > 0 and torch.equal(frames, before)
    assert torch.equal(seeded, trigger.seeded_event_trigger(frames, 70, seed=1))
    assert not torch.equal(seeded, trigger.seeded_event_trigger(frames, 70, seed=2))
