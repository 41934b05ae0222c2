"""The neuron: a sequence worked by hand, gradients, surrogates, layers, settings, and what is saved of them."""
import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lif import LIF, PLIF, SURROGATES, Spike, count_spikes, lif_reference, neurons

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
    ds2/dx2 = 0.8, and s2 depends on x1 through v1 (1 - s1): dv1_after/dx1 = 1 - 0.6 * 0.6 = 0.64, times tau, times 0.8.
    """
    for neuron in (LIF(), lif_reference):
        x = torch.tensor([0.6, 0.9]).view(2, 1, 1).requires_grad_()
        s = neuron(x)
        grad1, = torch.autograd.grad(s[0].sum(), x, retain_graph=True)
        grad2, = torch.autograd.grad(s[1].sum(), x)
        assert torch.allclose(grad1.flatten(), torch.tensor([0.6, 0.0]))
        assert torch.allclose(grad2.flatten(), torch.tensor([0.64 * 0.5 * 0.8, 0.8]))


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
    monkeypatch.setattr("fused.compiled.enabled", False)               # 20 steps take long to compile
    x = torch.rand(1, 200, 1).expand(20, 200, 1) * 2                 # constant input
    counts = [LIF(v_thr)(x).sum((0, 2)) for v_thr in (0.5, 0.8, 1.0, 1.2, 1.5)]
    assert all((a >= b).all() for a, b in zip(counts, counts[1:])) and counts[0].sum() > counts[-1].sum()


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


@pytest.mark.parametrize("v_thr, tau", [(0, 0.5), (-1, 0.5), (math.nan, 0.5), (1, -0.1), (1, 1.1),
                                        (torch.tensor([1.0, 0.0]), 0.5), (torch.ones(2, 2), 0.5)])
def test_bad_settings(v_thr, tau):
    with pytest.raises(ValueError):
        LIF(v_thr, tau)
    with pytest.raises(ValueError):
        with neurons(LIF(), v_thr, tau):
            pass


@pytest.mark.parametrize("value", [
    nn.Parameter(torch.tensor(1.0)), torch.ones(3, requires_grad=True),
    nn.Parameter(torch.tensor(1.0), requires_grad=False)], ids=["learned", "leaf", "kept"])
@pytest.mark.parametrize("name", ["v_thr", "tau"])
def test_a_setting_that_asks_for_a_gradient_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} gets no gradient"):
        LIF(**{name: value})
    with pytest.raises(ValueError, match=f"{name} gets no gradient"):
        with neurons(LIF(), **{name: value}):
            pass
    LIF(**{name: value.detach()})


def test_a_threshold_that_asks_for_a_gradient_is_refused_wherever_it_comes_from():
    lif = LIF()
    lif.v_thr = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="v_thr gets no gradient"):
        lif(torch.randn(2, 3, 4))


def test_bad_input():
    with pytest.raises(ValueError, match="batch of 3"):
        LIF(torch.ones(2))(torch.randn(4, 3, 5))
    with pytest.raises(ValueError, match="T, B"):
        LIF()(torch.randn(4))
    with pytest.raises(ValueError, match="surrogate"):
        LIF(surrogate="relu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=r"x.float\(\)"):
        LIF()(torch.ones(2, 3, 4, dtype=dtype))
    with pytest.raises(ValueError, match=r"x.float\(\)"):
        LIF()(torch.ones(2, 3, 4), residual=torch.ones(2, 3, 4, dtype=dtype))


def test_the_setting_is_saved_with_the_model():
    """A deployed model is its weights and its setting: both are in the state_dict, loadable with weights_only."""
    def build():
        return nn.Sequential(LIF(), nn.Linear(4, 4), PLIF())

    model, file = build(), io.BytesIO()
    with torch.no_grad():
        model[2].w.fill_(0.7)
    model[0].v_thr, model[0].tau, model[2].v_thr = 1.2, 0.3, torch.tensor(1.1)
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = build()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert (loaded[0].v_thr, loaded[0].tau, loaded[2].v_thr) == (1.2, 0.3, model[2].v_thr.item())
    assert loaded[2].tau == "sigmoid(w)" and loaded[2].decay().item() == model[2].decay().item()
    x = torch.randn(3, 5, 4)
    assert torch.equal(loaded(x), model(x))
    assert list(model.state_dict()) == ["0._extra_state", "1.weight", "1.bias", "2.w", "2._extra_state"]
    assert model.state_dict()["0._extra_state"].tolist() == [1.2, 0.3]
    with neurons(model, v_thr=torch.tensor([1.0, 1.5]), tau=0.5):                       # one value per sample
        loaded.load_state_dict(model.state_dict())
    assert loaded[0].v_thr.tolist() == [1.0, 1.5] and loaded[0].tau.tolist() == [0.5, 0.5] and model[0].v_thr == 1.2
    with pytest.raises(ValueError, match="v_thr must be"):
        loaded[0].set_extra_state(torch.tensor([-1.0, 0.5]))


def test_copies_and_functional_calls_keep_the_setting():
    model, x = nn.Sequential(nn.Linear(4, 4), LIF(1.2), PLIF(0.8)), torch.randn(3, 5, 4)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(functional_call(model, dict(model.named_parameters()), (x,)), expected)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.w"] and not list(model.buffers())


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
