"""Neurons of other libraries: where each keeps its threshold, so that lif.neurons and the threshold scan work on them.

    found, unknown = neurons_of(model)      the neurons, and classes of modules that may be neurons
    get_threshold(neuron), set_threshold(neuron, 1.5)
    reset(neurons)                          some libraries keep the membrane potential between calls; this clears it

Known are the neurons of this repository, SpikingJelly, snnTorch, norse and sinabs, and classes derived from them. A
further library needs one entry in PACKAGES if its neurons keep the threshold in one attribute.
"""
import torch
from torch import nn

# package -> the attribute of its neurons that is the threshold; norse keeps it in a named tuple p, as v_th
PACKAGES = {"lif": "v_thr", "spikingjelly": "v_threshold", "snntorch": "threshold", "sinabs": "spike_threshold",
            "norse": "p"}
RESETS = ("reset", "reset_mem", "reset_states")         # of SpikingJelly, snnTorch and sinabs; norse passes its state


def neurons_of(model):
    """Neurons (a list of modules), and the sorted class names of modules that are neither a neuron known here, nor
    torch's own, nor made of other modules: look at these before you trust that all neurons were found."""
    found, unknown = {}, set()
    for name, m in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):        # a part of a neuron, such as its surrogate
            continue
        if _attribute(m):
            found[name] = m
        elif not any(m.children()) and not any(base.__module__.startswith("torch.") for base in type(m).__mro__
                                               if base is not nn.Module):
            unknown.add(type(m).__name__)
    return list(found.values()), sorted(unknown)


def _attribute(m):
    """The name of a neuron's threshold; None where m is no neuron that is known."""
    for base in type(m).__mro__:
        name = PACKAGES.get(base.__module__.split(".")[0])
        if name and hasattr(m, name) and (name != "p" or hasattr(m.p, "v_th")):
            return name
    return None


def get_threshold(m):
    """The threshold of a neuron: a number or a tensor that later changes leave alone."""
    value = getattr(m, _attribute(m))
    value = value.v_th if _attribute(m) == "p" else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def set_threshold(m, value):
    """Sets the threshold of a neuron; where the library keeps a tensor, a number fills it."""
    name, old = _attribute(m), getattr(m, _attribute(m))
    if name == "p":
        m.p = m.p._replace(v_th=torch.as_tensor(value))
    elif isinstance(old, nn.Parameter):
        old.copy_(torch.as_tensor(value))
    elif isinstance(old, torch.Tensor) and name != "v_thr":
        setattr(m, name, torch.as_tensor(value, dtype=old.dtype, device=old.device))
    else:
        setattr(m, name, value)


def reset(neurons):
    """Puts every neuron to rest that keeps its potential between calls."""
    for m in neurons:
        for name in RESETS:
            if hasattr(m, name):
                getattr(m, name)()
