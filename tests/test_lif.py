"""The neuron: worked by hand, beside SpikingJelly's, compiled, its gradients, its settings and what is saved of them."""
import copy
import io
import math

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from kit import machine
from lif import LIF, PLIF, SURROGATES, Spike, count_spikes, lif_reference, neurons
from models import build_model

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


# ---------------------------------------------------------------------------------------------------------
# What it computes

@pytest.mark.parametrize("neuron", [LIF(), PLIF(), lif_reference], ids=["LIF", "PLIF", "reference"])
def test_golden_sequence(neuron):
    assert neuron(torch.tensor(GOLDEN_X).view(8, 1, 1)).flatten().tolist() == GOLDEN_S


def test_gradient_by_hand():
    """T = 2, x = (0.6, 0.9): v = 0.6, 1.2; s = 0, 1. With the triangle surrogate h(d) = 1 - |d|: ds1/dx1 = 0.6,
    ds2/dx2 = 0.8, and s2 depends on x1 through v1 (1 - s1): dv1_after/dx1 = 1 - 0.6 * 0.6 = 0.64, times tau, times 0.8.
    In tau: ds2/dtau = 0.8 * 0.6, and dtau/dw = 0.25 at w = 0."""
    for neuron in (LIF(), PLIF(), lif_reference):
        x = torch.tensor([0.6, 0.9]).view(2, 1, 1).requires_grad_()
        s = neuron(x)
        gradients = [torch.autograd.grad(s[t].sum(), x, retain_graph=True)[0].flatten().tolist() for t in (0, 1)]
        assert gradients == [pytest.approx([0.6, 0]), pytest.approx([0.64 * 0.5 * 0.8, 0.8])]
        if isinstance(neuron, PLIF):
            assert torch.autograd.grad(s[1].sum(), neuron.w)[0].item() == pytest.approx(0.8 * 0.6 * 0.25)


def test_spikes_and_gradients_are_spikingjellys():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

    class Triangle(nn.Module):
        def forward(self, d):
            return Spike.apply(d, "triangle")
    theirs = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=Triangle(), step_mode="m")
    x = 2 * normal(8, 3, 4, 5, 5)
    for ours, other in zip(spikes_and_gradient(LIF(), x), spikes_and_gradient(theirs, x)):
        assert torch.allclose(ours, other, atol=1e-5) and ours.abs().sum() > 0


def test_one_setting_per_sample():
    """A batch of mixed settings gives every sample what it gets alone; a higher threshold never fires more, a low one
    always."""
    x, v_thr, tau = 2 * normal(4, 5, 4, 6, 6), torch.tensor([0.7, 1.0, 1.5, 1e-3, 3]), torch.tensor([0, 0.5, 1, 0.3, 0.9])
    mixed = spikes_and_gradient(LIF(v_thr, tau), x)
    for b in range(5):
        one = x[:, b:b + 1].clone().requires_grad_()
        s = LIF(v_thr[b].item(), tau[b].item())(one)
        assert torch.equal(s, mixed[0][:, b:b + 1])
        s.backward(normal(*x.shape, seed=1)[:, b:b + 1])
        assert torch.allclose(one.grad, mixed[1][:, b:b + 1], atol=1e-6)
    constant = torch.rand(1, 200, 1).expand(20, 200, 1) * 2
    counts = [LIF(v)(constant).sum((0, 2)) for v in (0.5, 0.8, 1.0, 1.2, 1.5)]
    assert all((a >= b).all() for a, b in zip(counts, counts[1:])) and counts[0].sum() > counts[-1].sum()


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_is_the_derivative_of_a_smooth_step(name):
    """Each surrogate is the slope of a known sigmoid-like curve: compared with its central difference."""
    curve = {"triangle": lambda d: torch.where(d.abs() < 1, 0.5 + d - d * d.abs() / 2, (d > 0).double()),
             "arctan": lambda d: torch.atan(math.pi * d) / math.pi + 0.5}[name]
    d = torch.linspace(-2, 2, 401, dtype=torch.float64) + 1e-3
    slope = (curve(d + 1e-5) - curve(d - 1e-5)) / 2e-5
    leaf = d.clone().requires_grad_()
    grad, = torch.autograd.grad(Spike.apply(leaf, name).sum(), leaf)
    assert torch.allclose(grad, slope, atol=1e-4) and torch.equal(grad, SURROGATES[name](d))


def test_what_is_no_number_stays_visible():
    x = torch.ones(4, 2, 3)
    x[1, 0, 0] = math.nan
    s = LIF()(x)
    assert s[1:, 0, 0].isnan().all() and s[0].isfinite().all() and s[:, 1].isfinite().all()


def test_bfloat16_and_memory_format():
    """The dtype of the input comes back, computed in float32; images stay channels last, as convolutions left them."""
    x = normal(4, 3, 5, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        s, grad = spikes_and_gradient(LIF(), x)
    assert s.dtype == grad.dtype == torch.bfloat16 and torch.equal(s.float(), lif_reference(x.float()))
    last = x.float().flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 3))
    s = LIF()(last)
    assert torch.equal(s, lif_reference(x.float()))
    assert s.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    still = normal(3, 5, 4, 4).expand(4, 3, 5, 4, 4)                           # as models.py feeds an image
    assert torch.equal(LIF()(still), lif_reference(still))


# ---------------------------------------------------------------------------------------------------------
# Compiled

@pytest.fixture
def compiling(monkeypatch):
    monkeypatch.setitem(machine._compiling, "possible", True)
    return machine.compiling


def graphs():
    return counters["stats"]["unique_graphs"]


def test_compiled_is_the_same(compiling):
    """One setting per sample, a learned tau, what is no number; other sizes and settings need no new code."""
    plif = PLIF()
    with torch.no_grad():
        plif.w.fill_(0.7)
    for neuron, T, learned in ((LIF(torch.tensor([0.7, 1.0, 1.5]), torch.tensor([0, 0.5, 1])), 2, ()),
                               (plif, 4, (plif.w,))):
        x = normal(T, 3, 4, 6, 6)
        x[0, 0, 0, 0, 0] = math.nan
        plain = spikes_and_gradient(neuron, x, *learned)
        with compiling(True):
            made = graphs()
            fast = spikes_and_gradient(neuron, x, *learned)
            assert graphs() > made, "nothing was compiled"
            neuron.v_thr, x, made = 1.2, normal(T, 3, 8, 5, 5), graphs()
            again = spikes_and_gradient(neuron, x, *learned)
            assert torch.equal(again[0], lif_reference(x, 1.2, neuron.decay())) and graphs() == made
        for ours, wanted in zip(fast, plain):
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert fast[0][:, 0, 0, 0, 0].isnan().all() and 0 < fast[0][:, 1:].mean() < 1
    assert machine._compiling["possible"]


def test_many_steps_compile_only_one(compiling):
    """Compiling unrolls the loop over T: with 16 steps that took minutes. Beyond 8 the step is compiled alone."""
    x = normal(16, 3, 4)
    plain = spikes_and_gradient(LIF(), x)
    with compiling(True):
        made = graphs()
        fast = spikes_and_gradient(LIF(), x)
        assert 1 <= graphs() - made <= 2 and torch.equal(fast[0], plain[0])
        assert torch.allclose(fast[1], plain[1], atol=1e-5)
        made = graphs()
        assert torch.equal(LIF()(normal(40, 2, 4)), lif_reference(normal(40, 2, 4))) and graphs() - made <= 1


@pytest.mark.parametrize("possible", [True, False], ids=["", "BADSNN_COMPILE=0"])
def test_a_model_can_be_compiled_as_a_whole(possible, monkeypatch):
    monkeypatch.setitem(machine._compiling, "possible", possible)
    torch.manual_seed(0)
    model, x = build_model("nmnist_net", 3, T=2, width=2).eval(), torch.rand(2, 2, 2, 34, 34)
    with torch.no_grad(), neurons(model, v_thr=0.1):
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(model)(x), model(x), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# Settings

def test_neurons_sets_and_restores():
    model = nn.Sequential(LIF(), nn.Sequential(LIF(0.7, 0.2), PLIF(1.3)))
    layers = model[0], model[1][0], model[1][1]
    with neurons(model, v_thr=1.5, tau=0.8):
        assert [m.v_thr for m in layers] == [1.5] * 3
        assert layers[0].tau == layers[1].tau == 0.8 and layers[2].decay().item() == 0.5
        with neurons(model, v_thr=torch.ones(4)):
            assert layers[0].tau == 0.8
    with pytest.raises(RuntimeError, match="on purpose"):
        with neurons(model, v_thr=2.0):
            raise RuntimeError("on purpose")
    assert [m.v_thr for m in layers] == [1.0, 0.7, 1.3] and (layers[0].tau, layers[1].tau) == (0.5, 0.2)


def test_count_spikes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = LIF(), LIF(v_thr=0.5), nn.BatchNorm1d(2)

        def forward(self, x):                # [B, N] -> T = 3
            self.norm(x)
            return self.b(self.a(x.expand(3, *x.shape)))

    # 2.0 spikes at every step, also in the second layer; 0.6 gives v = 0.6, 0.9, 1.05: one spike; 0.1 none
    model = Two().train()
    assert count_spikes(model, torch.tensor([[2.0, 2.0], [0.6, 0.1]])).tolist() == [12.0, 2.0]
    assert model.training and model.norm.num_batches_tracked == 0            # a look at a network does not change it


@pytest.mark.parametrize("v_thr, tau", [
    (0, 0.5), (math.nan, 0.5), (math.inf, 0.5), (1, -0.1), (1, 1.1), (torch.tensor([1.0, 0.0]), 0.5),
    (torch.ones(2, 2), 0.5), (nn.Parameter(torch.tensor(1.0)), 0.5), (1, torch.ones(3, requires_grad=True))])
def test_bad_settings(v_thr, tau):
    for set_up in (LIF, lambda v_thr, tau: neurons(LIF(), v_thr, tau).__enter__()):
        with pytest.raises(ValueError, match="v_thr|tau"):
            set_up(v_thr, tau)


def test_bad_input():
    with pytest.raises(ValueError, match="batch of 3"):
        LIF(torch.ones(2))(torch.randn(4, 3, 5))
    for x in (torch.randn(4), torch.ones(2, 3, 4, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="floats.*T, B"):
            LIF()(x)
    with pytest.raises(ValueError, match="surrogate"):
        LIF(surrogate="relu")


def test_the_setting_is_saved_with_the_model():
    """A deployed model is its weights and its setting: both are in the state_dict, loadable with weights_only."""
    def build():
        return nn.Sequential(LIF(), nn.Linear(4, 4), PLIF())

    model, loaded, file = build(), build(), io.BytesIO()
    with torch.no_grad():
        model[2].w.fill_(0.7)
    model[0].v_thr, model[0].tau, model[2].v_thr = 1.2, 0.3, torch.tensor(1.1)
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert (loaded[0].v_thr, loaded[0].tau, loaded[2].v_thr) == (1.2, 0.3, model[2].v_thr.item())
    assert loaded[2].tau == "sigmoid(w)" and loaded[2].decay().item() == model[2].decay().item()
    assert list(model.state_dict()) == ["0._extra_state", "1.weight", "1.bias", "2.w", "2._extra_state"]
    with neurons(model, v_thr=torch.tensor([1.0, 1.5]), tau=0.5):                       # one value per sample
        loaded.load_state_dict(model.state_dict())
    assert loaded[0].v_thr.tolist() == [1.0, 1.5] and loaded[0].tau.tolist() == [0.5, 0.5] and model[0].v_thr == 1.2
    with pytest.raises(ValueError, match="v_thr must"):
        loaded[0].set_extra_state(torch.tensor([-1.0, 0.5]))
    x = torch.randn(3, 5, 4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(functional_call(model, dict(model.named_parameters()), (x,)), model(x))
