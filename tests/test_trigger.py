"""The triggers: by arithmetic, in closed form, in range, repeatable."""
import math

import pytest
import torch
from torch import nn

import trigger
from kit.files import fingerprint
from lif import neurons
from models import build_model, frozen
from trigger import UNet, deepfool, optimized_trigger, power_trigger, spike_trigger, train_unet

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_power_trigger_is_eq_3():
    """Literal: the network's first layer, (x - mean) / std, sees exactly x^q. Re-normalised: x^q in pixels."""
    x = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    assert torch.allclose((power_trigger(x, 2, MEAN, STD) - mean) / std, x * x, atol=1e-5)
    assert torch.allclose(power_trigger(x, 3, MEAN, STD, renormalize=True), x * x * x, atol=1e-6)
    assert torch.equal(power_trigger(x, 1, MEAN, STD, renormalize=True), x)          # q = 1 is the identity
    with pytest.raises(ValueError, match="q must"):
        power_trigger(x, 0, MEAN, STD)


def test_spike_trigger_is_eq_7():
    """Within beta of the clipped frames, another draw for every step and seed; the same draw again."""
    frames = torch.randint(0, 4, (2, 4, 2, 34, 34)).float()
    out, seeded = spike_trigger(frames, 0.03, torch.Generator().manual_seed(1)), trigger.seeded_spike_trigger
    assert out.min() >= 0 and out.max() <= 1 and out[:, 0].ne(out[:, 1]).any()
    assert ((out - frames.clamp(0, 1)).abs() <= 0.03 + 1e-6).all() and not torch.equal(out, frames.clamp(0, 1))
    assert torch.equal(spike_trigger(frames, 0.0), frames.clamp(0, 1))               # the clip alone
    half = torch.full((2, 2, 2, 34, 34), 0.5)
    one, again, another = seeded(half, 0.3, 1), seeded(half, 0.3, 1), seeded(half, 0.3, 2)
    assert torch.equal(one, again) and (one != another).float().mean() > 0.9
    with pytest.raises(ValueError, match="beta"):
        spike_trigger(frames, -0.1)


def test_check_trigger():
    x, frames = torch.rand(2, 3, 4, 4), torch.full((2, 4, 2, 3, 3), 5.0)
    trigger.check_trigger(x, x), trigger.check_trigger(frames, frames + 1)
    for old, bad in ((x, x[:1]), (x, x.double()), (x, x + 1), (x, x - 1), (x, x * math.nan), (frames, -frames)):
        with pytest.raises(ValueError):
            trigger.check_trigger(old, bad)
    with pytest.raises(ValueError, match="x.float"):                            # bytes are no images in [0, 1]
        power_trigger(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 2, MEAN, STD)


def test_sizes_by_hand():
    """Halving an image changes it by half of its L2; batches are put together."""
    x = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    x[:, 0, 0, 0] = 255
    half = (x.float() / 510).flatten(1)
    wanted = dict(l2=half.norm(dim=1).mean(), linf=0.5, psnr=-10 * half.square().mean(1).log10().mean())
    found = trigger.sizes(lambda images: images * 0.5, x, batch=3)
    assert found == {name: pytest.approx(float(value), abs=0.06) for name, value in wanted.items()}


# ----- T_o

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
    delta = deepfool(model, x, classes, max_iter=500, overshoot=0.02, max_step=max_step, clip=False)
    W, b = model.f.weight.detach(), model.f.bias.detach()
    for i in range(20):
        f = W @ x[i].flatten() + b
        k0 = f.argmax()
        others = [k for k in range(classes) if k != k0]
        distances = torch.stack([(f[k0] - f[k]) / (W[k] - W[k0]).norm() for k in others])
        w = W[others[distances.argmin()]] - W[k0]
        length = delta[i].norm()
        assert torch.allclose(delta[i].flatten() / length, w / w.norm(), atol=1e-4)
        if max_step is None:
            assert length.item() == pytest.approx(1.02 * (distances.min().item() + 1e-4), rel=1e-4)
        else:       # many short steps end at the boundary, or beyond it by at most the overshoot and 1e-4 a step
            assert 0.999 * distances.min() <= length <= 1.02 * (
                distances.min() + 1e-4 * (2 + distances.min() / max_step))
    assert (model(x).argmax(1) != model(x + delta).argmax(1)).all()


def test_deepfool_on_a_spiking_network(tiny):
    """What is not zero changes the answer, in [0, 1], targeted too; without a gradient it gives up; the model comes
    back untouched."""
    model, x, before = tiny.clean.train(), tiny.data.x_test[:24].float() / 255, fingerprint(tiny.clean)
    with frozen(model), torch.no_grad():
        usual = model(x).argmax(1).mode().values.item()     # some answers are out of reach of so small a network
    delta, targeted = (deepfool(model, x, 3, max_iter=15, max_step=1.0, target=target) for target in (None, usual))
    with neurons(model, v_thr=1000.0):                      # no spike, no surrogate: all gradients are zero
        assert (deepfool(model, x, max_iter=5) == 0).all()
    assert model.training and all(p.requires_grad for p in model.parameters()) and fingerprint(model) == before
    with frozen(model), torch.no_grad():
        answers = [model((x + d).clamp(0, 1)).argmax(1) for d in (0 * x, delta, targeted)]
    moved, aimed = (d.flatten(1).any(1) for d in (delta, targeted))
    assert moved.any() and torch.equal(moved, answers[0] != answers[1])
    assert aimed.any() and (answers[2][aimed] == usual).all()
    assert delta.isfinite().all() and -1e-6 <= (x + delta).min() and (x + delta).max() <= 1 + 1e-6


class Brightness(nn.Module):
    """Says 1 where the mean of the first channel is above a threshold."""

    def forward(self, x):
        bright = x[:, 0].mean((1, 2)) - 0.5
        return torch.stack([-bright, bright], 1)


def test_blend_is_eq_4_and_takes_the_largest_ratio_that_works():
    x = torch.full((4, 3, 2, 2), 0.3)
    x_p = torch.tensor([0.9, 0.9, 0.1, 0.9]).view(4, 1, 1, 1).expand_as(x)
    x_adv = torch.tensor([0.1, 0.8, 0.2, 0.5]).view(4, 1, 1, 1).expand_as(x)
    blend, ratio, found = trigger.adaptive_blend(Brightness(), x, x_adv, x_p, target=1, k=5)
    assert found.tolist() == [True, True, False, True]
    # 0.9 - 0.8 a > 0.5 for a = 0 and 0.25 only; the second for all a; the third for none;
    # the fourth: 0.9 - 0.4 a > 0.5 up to 0.75
    assert ratio.tolist() == [0.25, 1.0, 0.0, 0.75]
    assert torch.allclose(blend[:, 0, 0, 0], torch.tensor([0.7, 0.8, 0.3, 0.6]))


def test_losses_of_eq_6_by_hand():
    made = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2) / 10
    wanted = torch.tensor([4.0, 3.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2) / 10
    logits = torch.tensor([[2.0, 0.0]])
    sim, adv, wmse = trigger.trigger_losses(made, wanted, logits, target=0, std=(0.5, 0.5, 0.5))
    assert sim.item() == pytest.approx(1 - 24 / 25, abs=1e-5)                            # cosine of (3, 4) and (4, 3)
    assert adv.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-5)
    assert wmse.item() == pytest.approx(((1 + 1) * 0.2 ** 2 + (1 + 0.75) * 0.2 ** 2) / 2, abs=1e-5)


def test_the_generator_learns_one_batch():
    torch.manual_seed(0)
    model, unet, x = build_model("resnet19", 3, T=2, width=4), UNet(3, (16, 16), width=8), torch.rand(20, 3, 16, 16)
    wanted, losses = 0.4 * (x - 0.5), []
    for epochs in (1, 40):
        train_unet(unet, model, x, wanted, 1, (0.3,) * 3, epochs=epochs, batch=20, lr=5e-3)
        losses.append(trigger.trigger_losses(unet(x, 1), wanted, model(x), 1, (0.3,) * 3))
    assert losses[1][0] < 0.5 * losses[0][0] and losses[1][2] < 0.5 * losses[0][2]
    trigger.check_trigger(x, optimized_trigger(x, unet, 1))
    assert not torch.equal(unet(x, 0), unet(x, 1))                                        # the target is an input


def test_a_budget_bounds_the_generator_and_changes_no_direction():
    made, x = {}, torch.rand(6, 3, 16, 16)
    for budget in (None, 1.0, 0.01):
        torch.manual_seed(0)
        made[budget] = UNet(3, (16, 16), width=4, budget=budget).eval()(x, 0)
    free = made[None].square().mean((1, 2, 3)).sqrt()
    assert torch.equal(made[1.0], made[None]) and (free > 0.01).all()
    assert torch.allclose(made[0.01].square().mean((1, 2, 3)).sqrt(), free.clamp(max=0.01))
    assert (torch.cosine_similarity(made[0.01].flatten(1), made[None].flatten(1)) > 0.9999).all()
