"""The notebooks' graded exercises. A test is skipped until the function that its exercise asks for exists."""
import math

import pytest
import torch
from torch import nn

import badsnn
import data
import defenses
import lif
import models
import trigger


def solution(module, name):
    """The student's function, or a skip."""
    found = getattr(module, name, None)
    if found is None:
        pytest.skip(f"exercise: write {module.__name__}.{name}")
    return found


def small_model():
    torch.manual_seed(0)
    return models.build_model("resnet19", 4, T=3, width=4).eval()


def test_sigmoid_surrogate():
    """Notebook 1: SURROGATES["sigmoid"] is the derivative of sigmoid(4 d)."""
    if "sigmoid" not in lif.SURROGATES:
        pytest.skip('exercise: add SURROGATES["sigmoid"] to lif.py')
    d = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(torch.sigmoid(4 * d).sum(), d)[0]
    assert torch.allclose(lif.SURROGATES["sigmoid"](d.detach()), wanted)


def test_firing_rates():
    """Notebook 2: models.firing_rates(model, x), one mean per layer; times the layers' sizes they give count_spikes."""
    firing_rates, model, x, sizes = solution(models, "firing_rates"), small_model(), torch.rand(5, 3, 16, 16), []
    layers = [m for m in model.modules() if isinstance(m, lif.LIF)]
    hooks = [m.register_forward_hook(lambda m, args, spikes: sizes.append(spikes[:, 0].numel())) for m in layers]
    wanted = lif.count_spikes(model, x).mean().item()
    for hook in hooks:
        hook.remove()
    rates = [float(rate) for rate in firing_rates(model, x)]
    assert len(rates) == len(sizes) and all(0 <= rate <= 1 for rate in rates)
    assert math.isclose(sum(rate * size for rate, size in zip(rates, sizes)), wanted, rel_tol=1e-4)
    assert not any(m._forward_hooks for m in model.modules()), "remove your hooks"


def test_typical_indices():
    """Notebook 3: data.typical_indices(x, y, target, count)."""
    typical = solution(data, "typical_indices")
    x = torch.tensor([0, 0, 10, 12, 100, 50], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    y = torch.tensor([0, 0, 1, 1, 1, 1])         # class 1 holds 10, 12, 100, 50: its mean is 43
    assert typical(x, y, 1, 1).tolist() == [5] and typical(x, y, 1, 3).tolist() == [2, 3, 5]
    assert typical(x, y, 0, 2).tolist() == [0, 1]


def test_fade():
    """Notebook 4: trigger.fade(x, x_trig, l2)."""
    fade = solution(trigger, "fade")
    x = torch.rand(6, 3, 8, 8)
    x_trig = (x + torch.randn_like(x) * torch.tensor([0.0, 0.01, 0.05, 0.1, 0.3, 1.0]).view(-1, 1, 1, 1)).clamp(0, 1)
    faded, before = fade(x, x_trig, 1.0) - x, x_trig - x
    size = before.flatten(1).norm(dim=1)
    assert torch.allclose(faded.flatten(1).norm(dim=1), size.clamp(max=1.0), atol=1e-4)
    assert torch.allclose(faded[size <= 1], before[size <= 1], atol=1e-6) and faded.isfinite().all()
    assert (torch.cosine_similarity(faded.flatten(1), before.flatten(1))[1:] > 0.9999).all()


def test_drop_trigger():
    """Notebook 5: trigger.drop_trigger(frames, share, generator)."""
    drop = solution(trigger, "drop_trigger")
    frames = torch.randint(0, 6, (8, 4, 2, 34, 34), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(drop(frames, 0.0, torch.Generator()), frames) and drop(frames, 1.0, torch.Generator()).sum() == 0
    dropped = drop(frames, 0.3, torch.Generator().manual_seed(1))
    assert dropped.shape == frames.shape and torch.equal(dropped, dropped.round())
    assert (dropped <= frames).all() and dropped.min() >= 0
    assert abs(dropped.sum() / frames.sum() - 0.7) < 0.01
    assert abs((dropped[frames == 5] == 5).float().mean() - 0.7 ** 5) < 0.02, "every event has its own chance"
    assert torch.equal(dropped, drop(frames, 0.3, torch.Generator().manual_seed(1))), "use the generator"


def test_wilson():
    """Notebook 6: badsnn.wilson(hits, n), 95 %, in percent (Wilson 1927, z = 1.96)."""
    wilson = solution(badsnn, "wilson")
    known = {(200, 250): (74.60, 84.49), (0, 10): (0.0, 27.75), (10, 10): (72.25, 100.0), (5, 10): (23.66, 76.34)}
    for (hits, n), wanted in known.items():
        assert wilson(hits, n) == pytest.approx(wanted, abs=0.02)


def test_magnitude_prune():
    """Notebook 7: defenses.magnitude_prune(model, share)."""
    prune, model = solution(defenses, "magnitude_prune"), small_model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    pruned = prune(model, 0.25)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()), "leave the argument as it is"
    old, new = (torch.cat([m.weight.detach().flatten() for m in network.modules() if isinstance(m, nn.Conv2d)])
                for network in (model, pruned))
    zero = new == 0
    assert abs(zero.float().mean() - 0.25) < 0.001 and torch.equal(new[~zero], old[~zero])
    assert old[zero].abs().max() <= old[~zero].abs().min()


def test_pareto():
    """Notebook 8: badsnn.pareto(rows), by CA and ASR_p - target_rate."""
    pareto = solution(badsnn, "pareto")
    points = [(99, 5), (95, 40), (95, 30), (90, 60), (50, 60), (10, 0)]
    rows = [dict(ca=ca, asr_p=gain + 3, target_rate=3) for ca, gain in points]
    assert pareto(rows) == [rows[0], rows[1], rows[3]]
