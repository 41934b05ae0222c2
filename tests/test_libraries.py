"""Neurons of other libraries: found, set, put back, and at rest at every call. Each library is optional; without any of
them a neuron of each form, written here, stands in its place."""
import importlib.util
import types

import pytest
import torch
from torch import nn

from lab import libraries
from lab.detectors import threshold_scan
from lif import LIF, PLIF
from models import build_model


def stand_in(package, **attributes):
    """A layer that claims to come from `package`: x -> 1 where x reaches its threshold."""
    class Neuron(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

        def forward(self, x):
            return (x >= libraries.get_threshold(self)).float()
    Neuron.__module__ = f"{package}.somewhere"
    return Neuron()


class P(types.SimpleNamespace):
    def _replace(self, **changes):
        return P(**(vars(self) | changes))


FORMS = {"spikingjelly": lambda: stand_in("spikingjelly", v_threshold=1.0),
         "snntorch": lambda: stand_in("snntorch", threshold=torch.tensor(1.0)),
         "sinabs": lambda: stand_in("sinabs", spike_threshold=nn.Parameter(torch.tensor(1.0))),
         "norse": lambda: stand_in("norse", p=P(v_th=torch.tensor(1.0)))}


def real(name):
    """The library's own leaky neuron; skips where it is not installed."""
    library = pytest.importorskip(name, exc_type=ImportError)
    if name == "spikingjelly":
        from spikingjelly.activation_based import neuron
        return neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0)
    if name == "snntorch":
        return library.Leaky(beta=0.5, threshold=1.0, init_hidden=True, reset_mechanism="zero")
    if name == "sinabs":
        import sinabs.layers
        return sinabs.layers.LIF(tau_mem=1.4427, norm_input=False)
    from norse.torch import LIFBoxCell, LIFBoxParameters
    return LIFBoxCell(p=LIFBoxParameters(tau_mem_inv=torch.tensor(500.0)), dt=0.001)


@pytest.mark.parametrize("make", [*FORMS.values(), *(lambda name=name: real(name) for name in FORMS)],
                         ids=[*(f"form of {name}" for name in FORMS), *FORMS])
def test_thresholds_are_found_set_and_put_back(make):
    model = nn.Sequential(nn.Linear(4, 4), make())
    found, unknown = libraries.neurons_of(model)
    assert found == [model[1]] and unknown == []
    with libraries.scaled(model, 1.5), libraries.scaled(model, 2.0):
        assert float(libraries.get_threshold(model[1])) == pytest.approx(3.0)
    with pytest.raises(RuntimeError), libraries.scaled(model, 3.0):
        raise RuntimeError
    assert float(libraries.get_threshold(model[1])) == 1.0 and not model._forward_pre_hooks


@pytest.mark.parametrize("name", FORMS)
def test_a_higher_threshold_means_fewer_spikes(name):
    layer, x = real(name), torch.rand(5, 3, 40, generator=torch.Generator().manual_seed(0)) * 4

    class Net(nn.Module):       # T = 5 steps, each library in its own way
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if name == "sinabs":
                return self.layer(x.transpose(0, 1)).sum()
            state, total = None, 0
            for step in x:
                s = self.layer(step, state) if name == "norse" else self.layer(step)
                s, state = s if isinstance(s, tuple) else (s, None)
                total += s.sum()
            return total
    model, counts = Net(), []
    for factor in (0.5, 1.0, 1.4):
        with libraries.scaled(model, factor), torch.no_grad():
            counts.append(float(model(x)))
            assert float(model(x)) == counts[-1], "the second call does not start at rest"
    assert counts[0] > counts[1] > counts[2] > 0


def test_ours_and_what_is_not_known():
    class Strange(nn.Module):
        def forward(self, x):
            return (x > 1).float()
    found, unknown = libraries.neurons_of(nn.ModuleList([LIF(), PLIF(), Strange(), nn.ReLU(), nn.Threshold(1, 0)]))
    assert [type(m) for m in found] == [LIF, PLIF] and unknown == ["Strange"]
    assert libraries.neurons_of(build_model("resnet19", 3, T=2, width=4))[1] == []
    spec = importlib.util.find_spec("lif")
    twin = importlib.util.module_from_spec(spec)                # imported twice, as by code that has a copy of it
    spec.loader.exec_module(twin)
    layers = nn.Sequential(twin.LIF(v_thr=1.1), twin.PLIF(v_thr=torch.tensor([1.0, 2.0])))
    with libraries.scaled(layers, 2):
        assert layers[0].v_thr == 2.2 and layers[1].v_thr.tolist() == [2.0, 4.0]
    assert layers[0].v_thr == 1.1 and layers[1].v_thr.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="no spiking neuron.*Strange"):
        threshold_scan(nn.Sequential(Strange()), torch.rand(2, 4))
