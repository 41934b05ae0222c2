"""The neuron: worked by hand, beside SpikingJelly's, compiled; its gradients, its settings, what is saved of them."""
import io
import math

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from kit import machine
from lif import LIF, PLIF, Spike, count_spikes, lif_reference, neurons, triangle

# By hand, v_thr = 1, tau = 0.5. v before the reset: 0.6 | 0.3+0.6=0.9 | 0.45+0.6=1.05 -> spike, 0 | 0.4 |
# 0.2+0.8=1.0 -> spike (>=), 0 | -1.0 | -0.5+1.4=0.9 | 0.45+0.5=0.95
GOLDEN_X = [0.6, 0.6, 0.6, 0.4, 0.8, -1.0, 1.4, 0.5]
GOLDEN_S = [0, 0, 1, 0, 1, 0, 0, 0]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spikes_and_gradient(neuron, x, *more):
    """Spikes, and the gradients of x and more, for one upstream gradient."""
    x = x.detach().requires_grad_()
    s = neuron(x)
    return s.detach(), *torch.autograd.grad(s, (x, *more), normal(*x.shape, seed=1).to(s.dtype))


# ----- What it computes

def test_worked_by_hand():
    """The golden sequence. Gradients for x = (0.6, 0.9): v = 0.6, 1.2; s = 0, 1. With the triangle h(d) = 1 - |d|:
    ds1/dx1 = 0.6, ds2/dx2 = 0.8; s2 depends on x1 through v1 (1 - s1), which gives (1 - 0.6 * 0.6) * tau * 0.8.
    In tau: ds2/dtau = 0.8 * 0.6, and dtau/dw = 0.25 at w = 0."""
    for neuron in (LIF(), PLIF(), lif_reference):
        assert neuron(torch.tensor(GOLDEN_X).view(8, 1, 1)).flatten().tolist() == GOLDEN_S
        x = torch.tensor([0.6, 0.9]).view(2, 1, 1).requires_grad_()
        s = neuron(x)
        gradients = [torch.autograd.grad(s[t].sum(), x, retain_graph=True)[0].flatten().tolist() for t in (0, 1)]
        assert gradients == [pytest.approx([0.6, 0]), pytest.approx([0.64 * 0.5 * 0.8, 0.8])]
        if isinstance(neuron, PLIF):
            assert torch.autograd.grad(s[1].sum(), neuron.w)[0].item() == pytest.approx(0.8 * 0.6 * 0.25)


def test_spikes_and_gradients_are_spikingjellys():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

    def triangle(d):
        return Spike.apply(d)
    theirs = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=triangle, step_mode="m")
    x = 2 * normal(8, 3, 4, 5, 5)
    for ours, other in zip(spikes_and_gradient(LIF(), x), spikes_and_gradient(theirs, x)):
        assert torch.allclose(ours, other, atol=1e-5) and ours.abs().sum() > 0


def test_one_setting_per_sample():
    """A batch of mixed settings gives every sample what it gets alone."""
    x, v_thr, tau = 2 * normal(4, 4, 4, 6, 6), torch.tensor([0.7, 1.0, 1.5, 3]), torch.tensor([0, 0.5, 1, 0.9])
    mixed = spikes_and_gradient(LIF(v_thr, tau), x)
    for b in range(4):
        one = x[:, b:b + 1].clone().requires_grad_()
        s = LIF(v_thr[b].item(), tau[b].item())(one)
        s.backward(normal(*x.shape, seed=1)[:, b:b + 1])
        assert torch.equal(s, mixed[0][:, b:b + 1]) and torch.allclose(one.grad, mixed[1][:, b:b + 1], atol=1e-6)


def test_surrogate_is_the_derivative_of_a_smooth_step():
    """It is the slope of a known sigmoid-like curve: compared with its central difference."""
    def curve(d):
        return torch.where(d.abs() < 1, 0.5 + d - d * d.abs() / 2, (d > 0).double())
    d = torch.linspace(-2, 2, 401, dtype=torch.float64) + 1e-3
    slope = (curve(d + 1e-5) - curve(d - 1e-5)) / 2e-5
    leaf = d.clone().requires_grad_()
    grad, = torch.autograd.grad(Spike.apply(leaf).sum(), leaf)
    assert torch.allclose(grad, slope, atol=1e-4) and torch.equal(grad, triangle(d))


def test_bfloat16():
    """The dtype of the input comes back, computed in float32."""
    x = normal(4, 3, 5, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        s, grad = spikes_and_gradient(LIF(), x)
    assert s.dtype == grad.dtype == torch.bfloat16 and torch.equal(s.float(), lif_reference(x.float()))


# ----- Compiled

def test_compiled_is_the_same(monkeypatch):
    """One setting per sample, a learned tau, many steps; other sizes and settings need no new code. What is no number
    stays visible in the answer of the last step."""
    monkeypatch.setitem(machine._compiling, "possible", True)
    graphs, per_sample = counters["stats"], LIF(torch.tensor([0.7, 1.0, 1.5]), torch.tensor([0, 0.5, 1]))
    for neuron, T in ((per_sample, 2), (PLIF(), 4), (LIF(), 16)):
        x, learned = normal(T, 3, 4, 6, 6), list(neuron.parameters())
        x[0, 0, 0, 0, 0] = math.nan
        plain, before = spikes_and_gradient(neuron, x, *learned), graphs["unique_graphs"]
        with machine.compiling(True):
            fast, made = spikes_and_gradient(neuron, x, *learned), graphs["unique_graphs"]
            neuron.v_thr, x = 1.2, normal(T, 3, 8, 5, 5)
            again = spikes_and_gradient(neuron, x, *learned)
        assert before < made == graphs["unique_graphs"] and torch.equal(again[0], lif_reference(x, 1.2, neuron.decay()))
        for ours, wanted in zip(fast, plain):
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert plain[0][-1, 0, 0, 0, 0].isnan() and plain[0].isnan().sum() == 1 and 0 < fast[0][:, 1:].mean() < 1
    assert machine._compiling["possible"]


# ----- Settings

def test_neurons_sets_and_restores():
    model = nn.Sequential(LIF(), nn.Sequential(LIF(0.7, 0.2), PLIF(1.3)))
    one, two, plif = model[0], *model[1]
    with pytest.raises(RuntimeError, match="on purpose"), neurons(model, v_thr=1.5, tau=0.8):
        assert [m.v_thr for m in (one, two, plif)] == [1.5] * 3 and plif.decay().item() == 0.5
        with neurons(model, v_thr=torch.ones(4)):
            assert one.tau == two.tau == 0.8 and len(plif.v_thr) == 4
        assert one.v_thr == 1.5
        raise RuntimeError("on purpose")
    assert [m.v_thr for m in (one, two, plif)] == [1.0, 0.7, 1.3] and (one.tau, two.tau) == (0.5, 0.2)


def test_count_spikes():
    """2.0 spikes at every step, in a second layer, too; 0.6 gives v = 0.6, 0.9, 1.05: one spike; 0.1 none. A look at a
    network does not change it."""
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(LIF(), LIF(v_thr=0.5), norm).train()
    model.forward = lambda x: model[1](model[0](x.expand(3, *norm(x).shape)))           # T = 3
    assert count_spikes(model, torch.tensor([[2.0, 2.0], [0.6, 0.1]])).tolist() == [12.0, 2.0]
    assert model.training and norm.num_batches_tracked == 0


def test_bad_settings_and_input():
    for v_thr, tau in ((torch.tensor([1.0, 0.0]), 0.5), (math.nan, 0.5), (1, 1.1), (torch.ones(2, 2), 0.5),
                       (nn.Parameter(torch.tensor(1.0)), 0.5)):
        with pytest.raises(ValueError, match="v_thr|tau"):
            LIF(v_thr, tau)
    with pytest.raises(ValueError, match="v_thr must"), neurons(LIF(), 0):
        pass
    with pytest.raises(ValueError, match="batch of 3"):
        LIF(torch.ones(2))(torch.randn(4, 3, 5))
    with pytest.raises(ValueError, match="floats.*T, B"):
        LIF()(torch.ones(2, 3, 4, dtype=torch.uint8))


def test_the_setting_is_saved_with_the_model():
    """A deployed model is its weights and its setting: both are in the state_dict, loadable with weights_only."""
    model, loaded, file = nn.Sequential(LIF(), PLIF()), nn.Sequential(LIF(), PLIF()), io.BytesIO()
    with torch.no_grad():
        model[1].w.fill_(0.7)
    model[0].v_thr, model[0].tau, model[1].v_thr = 1.2, 0.3, torch.tensor(1.1)
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert (loaded[0].v_thr, loaded[0].tau, loaded[1].v_thr) == (1.2, 0.3, model[1].v_thr.item())
    assert loaded[1].decay().item() == model[1].decay().item()
    with neurons(model, v_thr=torch.tensor([1.0, 1.5]), tau=0.5):                       # one value per sample
        loaded.load_state_dict(model.state_dict())
    assert loaded[0].v_thr.tolist() == [1.0, 1.5] and loaded[0].tau.tolist() == [0.5, 0.5] and model[0].v_thr == 1.2
    with pytest.raises(ValueError, match="v_thr must"):
        loaded[0].set_extra_state(torch.tensor([-1.0, 0.5]))
