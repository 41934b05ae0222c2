"""Neurons of other libraries: found, set, put back, and at rest at every call. Each library is optional."""
import pytest
import torch
from torch import nn

from lab import libraries
from lab.detectors import threshold_scan
from lif import LIF, PLIF

LIBRARIES = ("spikingjelly", "snntorch", "sinabs")


def real(name):
    """The library's own leaky neuron; skips where it is not installed."""
    library = pytest.importorskip(name, exc_type=ImportError)
    if name == "spikingjelly":
        from spikingjelly.activation_based import neuron
        return neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0)
    if name == "snntorch":
        return library.Leaky(beta=0.5, threshold=1.0, init_hidden=True, reset_mechanism="zero")
    import sinabs.layers
    return sinabs.layers.LIF(tau_mem=1.4427, norm_input=False)


class Net(nn.Module):
    """T = 5 steps of one neuron, each library in its own way; answers with the number of spikes."""
    def __init__(self, name):
        super().__init__()
        self.name, self.layer = name, real(name)

    def forward(self, x):
        if self.name == "sinabs":
            return self.layer(x.transpose(0, 1)).sum()
        return sum(self.layer(step).sum() for step in x)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_higher_threshold_means_fewer_spikes_from_rest_at_every_call(name):
    model, counts = Net(name), []
    x = torch.rand(5, 3, 40, generator=torch.Generator().manual_seed(0)) * 4
    for factor in (0.5, 1.0, 1.4):
        with libraries.scaled(model, factor), torch.no_grad():
            counts += [float(model(x))]
            assert float(model(x)) == counts[-1]
    assert counts[0] > counts[1] > counts[2] > 0
    assert float(getattr(model.layer, libraries.entry(model.layer)[0])) == 1 and not model._forward_pre_hooks


def test_ours_and_what_is_not_known():
    class Strange(nn.Module):
        def forward(self, x):
            return (x > 1).float()
    layers = nn.Sequential(LIF(v_thr=1.1), PLIF(v_thr=torch.tensor([1.0, 2.0])), Strange(), nn.ReLU())
    found, unknown = libraries.neurons_of(layers)
    assert [type(m) for m in found] == [LIF, PLIF] and unknown == ["Strange"]
    with libraries.scaled(layers, 2):
        assert layers[0].v_thr == 2.2 and layers[1].v_thr.tolist() == [2.0, 4.0]
    assert layers[0].v_thr == 1.1 and layers[1].v_thr.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="no spiking neuron.*Strange"):
        threshold_scan(nn.Sequential(Strange()), torch.rand(2, 4))
