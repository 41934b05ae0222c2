"""The neuron: a sequence worked by hand, the definition against the fused path, gradients, settings."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from lif import LIF, PLIF, SURROGATES, Spike, count_spikes, lif_reference, neurons


def fused_and_reference(shape, v_thr=1.0, tau=0.5, surrogate="triangle", dtype=torch.float32):
    """Spikes and input gradients of both paths, for the same random input and upstream gradient."""
    torch.manual_seed(0)
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    results = []
    for neuron in (LIF(v_thr, tau, surrogate), lambda x: lif_reference(x, v_thr, tau, surrogate)):
        x = x.detach().requires_grad_()
        spikes = neuron(x)
        results.append((spikes.detach(), torch.autograd.grad(spikes, x, grad)[0]))
    return results


# By hand, v_thr = 1, tau = 0.5. v before the reset: 0.6 | 0.3+0.6=0.9 | 0.45+0.6=1.05 -> spike, 0 | 0.4 |
# 0.2+0.8=1.0 -> spike (>=), 0 | -1.0 | -0.5+1.4=0.9 | 0.45+0.5=0.95
GOLDEN_X = [0.6, 0.6, 0.6, 0.4, 0.8, -1.0, 1.4, 0.5]
GOLDEN_S = [0, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("neuron", [LIF(), PLIF(), lif_reference], ids=["LIF", "PLIF", "reference"])
def test_golden_sequence(neuron):
    spikes = neuron(torch.tensor(GOLDEN_X).view(8, 1, 1))
    assert spikes.flatten().tolist() == GOLDEN_S


def test_gradient_by_hand():
    """T = 2, x = (0.6, 0.9): v = 0.6, 1.2; s = 0, 1. With the triangle surrogate h(d) = 1 - |d|: ds1/dx1 = 0.6,
    ds2/dx2 = 0.8, and s2 depends on x1 through v1 (1 - s1): dv1_after/dx1 = 1 - 0.6 * 0.6 = 0.64, times tau, times 0.8."""
    for neuron in (LIF(), lif_reference):
        x = torch.tensor([0.6, 0.9]).view(2, 1, 1).requires_grad_()
        s = neuron(x)
        grad1, = torch.autograd.grad(s[0].sum(), x, retain_graph=True)
        grad2, = torch.autograd.grad(s[1].sum(), x)
        assert torch.allclose(grad1.flatten(), torch.tensor([0.6, 0.0]))
        assert torch.allclose(grad2.flatten(), torch.tensor([0.64 * 0.5 * 0.8, 0.8]))


@pytest.mark.parametrize("T", range(1, 9))
def test_fused_equals_reference_for_every_T(T, monkeypatch):
    """Compiled for T = 1, 2, 4, 8: each is compiled anew, for seconds. The same code runs uncompiled for the rest."""
    if T not in (1, 2, 4, 8):
        monkeypatch.setattr("lif.compiled.enabled", False)
    (s, g), (s_ref, g_ref) = fused_and_reference((T, 3, 5, 4, 7))
    assert torch.equal(s, s_ref) and torch.allclose(g, g_ref, atol=1e-5)
    assert 0 < s.mean() < 1


@pytest.mark.parametrize("shape", [(4, 1), (4, 2, 1), (4, 5, 7), (4, 2, 3, 5, 1), (2, 1, 1, 1, 1), (4, 3, 16, 8, 8)], ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_fused_equals_reference_for_odd_shapes(shape, surrogate):
    (s, g), (s_ref, g_ref) = fused_and_reference(shape, surrogate=surrogate)
    assert s.shape == shape and torch.equal(s, s_ref) and torch.allclose(g, g_ref, atol=1e-5)


def test_one_setting_per_sample():
    v_thr, tau = torch.tensor([0.7, 1.0, 1.5]), torch.tensor([0.0, 0.5, 1.0])
    (s, g), (s_ref, g_ref) = fused_and_reference((4, 3, 4, 6, 6), v_thr, tau)
    assert torch.equal(s, s_ref) and torch.allclose(g, g_ref, atol=1e-5)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 6, 6)
    for b in range(3):
        alone = LIF(v_thr[b].item(), tau[b].item())(x[:, b:b + 1])
        assert torch.equal(alone, s[:, b:b + 1])


def test_channels_last_and_strided_input():
    x = torch.randn(4, 2, 8, 6, 6)
    expected = lif_reference(x)
    for same in (x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2)),
                 x.transpose(3, 4).contiguous().transpose(3, 4)):
        assert torch.equal(LIF()(same), expected)
    still = torch.randn(2, 8, 6, 6).expand(4, 2, 8, 6, 6)
    assert torch.equal(LIF()(still), lif_reference(still))


def test_bfloat16():
    (s, g), (s_ref, _) = fused_and_reference((4, 3, 5, 4, 4), dtype=torch.bfloat16)
    assert s.dtype == g.dtype == torch.bfloat16 and torch.equal(s, s_ref) and g.isfinite().all()


def test_plif_learns_tau():
    torch.manual_seed(0)
    x, grad = torch.randn(4, 3, 4, 6, 6), torch.randn(4, 3, 4, 6, 6)
    plif = PLIF()
    assert plif.w.item() == 0 and plif.decay().item() == 0.5
    with torch.no_grad():
        plif.w.fill_(0.7)
    x1 = x.clone().requires_grad_()
    g_x, g_w = torch.autograd.grad(plif(x1), (x1, plif.w), grad)
    w = torch.tensor(0.7, requires_grad=True)
    x2 = x.clone().requires_grad_()
    r_x, r_w = torch.autograd.grad(lif_reference(x2, 1.0, w.sigmoid()), (x2, w), grad)
    assert torch.allclose(g_x, r_x, atol=1e-5) and torch.allclose(g_w, r_w, rtol=1e-4) and g_w.abs() > 0.01


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual_norm", [True, False, None], ids=["normed residual", "residual", "no residual"])
def test_batchnorm_and_residual_inside_the_neuron(training, residual_norm):
    """lif(x, bn, r, bn_r) is lif_reference(bn(x) + bn_r(r)): spikes, all gradients, running statistics."""
    results = []
    for fused in (True, False):
        torch.manual_seed(1)
        x, r, grad = (torch.randn(2, 4, 8, 5, 5, dtype=torch.float32) for _ in range(3))
        norm, r_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        for m in (norm, r_norm):
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias)
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), m.train(training)
        leaves = [x.requires_grad_(), r.requires_grad_(), *norm.parameters(), *r_norm.parameters()]
        if fused:
            out = LIF()(x, norm, r if residual_norm is not None else None, r_norm if residual_norm else None)
        else:
            current = norm(x.flatten(0, 1)).unflatten(0, (2, 4))
            if residual_norm is not None:
                current = current + (r_norm(r.flatten(0, 1)).unflatten(0, (2, 4)) if residual_norm else r)
            out = lif_reference(current)
        grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        results.append((out, norm.running_mean, norm.running_var, *grads))
    for ours, theirs in zip(*results):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_is_the_derivative_of_a_smooth_step(name):
    """Each surrogate is the slope of a known sigmoid-like curve: compared with its central difference."""
    curve = {"triangle": lambda d: torch.where(d.abs() < 1, 0.5 + d - d * d.abs() / 2, (d > 0).double()),
             "arctan": lambda d: torch.atan(math.pi * d) / math.pi + 0.5}[name]
    d = torch.linspace(-2, 2, 401, dtype=torch.float64) + 1e-3
    slope = (curve(d + 1e-5) - curve(d - 1e-5)) / 2e-5
    assert torch.allclose(SURROGATES[name](d), slope, atol=1e-4)
    leaf = d.clone().requires_grad_()
    grad, = torch.autograd.grad(Spike.apply(leaf, name).sum(), leaf)
    assert torch.equal(grad, SURROGATES[name](d))


def test_a_higher_threshold_never_fires_more(monkeypatch):
    monkeypatch.setattr("lif.compiled.enabled", False)               # 20 steps take long to compile
    x = torch.rand(1, 200, 1).expand(20, 200, 1) * 2                 # constant input
    counts = [LIF(v_thr)(x).sum((0, 2)) for v_thr in (0.5, 0.8, 1.0, 1.2, 1.5)]
    assert all((a >= b).all() for a, b in zip(counts, counts[1:])) and counts[0].sum() > counts[-1].sum()


def test_uncompiled_is_the_same(monkeypatch):
    """Where there is no C++ compiler the same functions run as plain PyTorch."""
    s, g = fused_and_reference((4, 3, 8, 5, 5))[0]
    monkeypatch.setattr("lif.compiled.enabled", False)
    s_plain, g_plain = fused_and_reference((4, 3, 8, 5, 5))[0]
    assert torch.equal(s, s_plain) and torch.allclose(g, g_plain, atol=1e-6)


def test_one_kernel_serves_training_and_evaluation():
    """Other sizes, views, numbers in place of values per sample, no gradients: nothing is compiled again."""
    x, norm = torch.randn(4, 6, 8, 5, 5), nn.BatchNorm2d(8)
    LIF(torch.ones(6))(x, norm).sum().backward()
    before = counters["stats"]["unique_graphs"]
    LIF(torch.ones(9)[:3], 0.3)(x[:, :3, :, 1:, 2:], norm.eval()).sum().backward()
    with torch.no_grad():
        LIF(1.2)(x[:, 1:], norm)
    assert counters["stats"]["unique_graphs"] == before


def test_no_state_between_calls():
    lif, x = LIF(), torch.randn(4, 2, 8)
    assert torch.equal(lif(x), lif(x))


def test_neurons_sets_and_restores():
    model = nn.Sequential(LIF(), nn.Sequential(LIF(0.7, 0.2), PLIF(1.3)))
    with neurons(model, v_thr=1.5, tau=0.8):
        assert [m.v_thr for m in (model[0], model[1][0], model[1][1])] == [1.5] * 3
        assert model[0].tau == model[1][0].tau == 0.8 and model[1][1].decay().item() == 0.5
        with neurons(model, v_thr=torch.ones(4)):
            assert model[0].tau == 0.8
    with pytest.raises(RuntimeError, match="on purpose"):
        with neurons(model, v_thr=2.0):
            raise RuntimeError("on purpose")
    assert [m.v_thr for m in (model[0], model[1][0], model[1][1])] == [1.0, 0.7, 1.3]
    assert (model[0].tau, model[1][0].tau) == (0.5, 0.2)


def test_count_spikes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = LIF(), LIF(v_thr=0.5)

        def forward(self, x):                # [B, N] -> T = 3
            return self.b(self.a(x.expand(3, *x.shape)))

    # 2.0 spikes at every step, also in the second layer; 0.6 gives v = 0.6, 0.9, 1.05: one spike; 0.1 none
    x = torch.tensor([[2.0, 2.0], [0.6, 0.1]])
    assert count_spikes(Two(), x).tolist() == [12.0, 2.0]


@pytest.mark.parametrize("v_thr, tau", [(0, 0.5), (-1, 0.5), (math.nan, 0.5), (1, -0.1), (1, 1.1), (torch.tensor([1.0, 0.0]), 0.5),
                                        (torch.ones(2, 2), 0.5)])
def test_bad_settings(v_thr, tau):
    with pytest.raises(ValueError):
        LIF(v_thr, tau)
    with pytest.raises(ValueError):
        with neurons(LIF(), v_thr, tau):
            pass


def test_bad_input():
    with pytest.raises(ValueError, match="batch of 3"):
        LIF(torch.ones(2))(torch.randn(4, 3, 5))
    with pytest.raises(ValueError, match="T, B"):
        LIF()(torch.randn(4))
    with pytest.raises(ValueError, match="surrogate"):
        LIF(surrogate="relu")


def test_the_layer_can_learn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), LIF(), nn.Linear(32, 2))
    x = torch.randn(1, 64, 4).expand(4, 64, 4)
    y = (x[0, :, 0] > 0).long()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        loss = F.cross_entropy(net(x).mean(0), y)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.2
