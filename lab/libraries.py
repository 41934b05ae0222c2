"""Neurons of other libraries: where each keeps its threshold, so that lif.neurons and the threshold scan work on them.

    found, unknown = neurons_of(model)      the neurons, and classes of modules that may be neurons
    get_threshold(neuron)                   a number or a tensor
    before = set_threshold(neuron, 1.5)     and later put_back(neuron, before)
    reset(neurons)                          some libraries keep the membrane potential between calls; this clears it

Known are the neurons of this repository, SpikingJelly, snnTorch, norse and sinabs, and classes derived from them. A
further library needs one entry in PACKAGES if its neurons keep the threshold in one attribute.
"""
import torch
from torch import nn

# package -> the attribute of its neurons that is the threshold (norse keeps it in a named tuple p, as v_th), and the
# method that puts a neuron to rest
PACKAGES = {"lif": ("v_thr", None), "spikingjelly": ("v_threshold", "reset"), "snntorch": ("threshold", "reset_mem"),
            "sinabs": ("spike_threshold", "reset_states"), "norse": ("p", None)}


def neurons_of(model):
    """Neurons (a list of modules), and the sorted class names of modules that are neither a neuron known here, nor
    torch's own, nor made of other modules: look at these before you trust that all neurons were found. (An unknown
    neuron with modules inside, or derived from one of torch's, is not among them.)"""
    found, unknown = {}, set()
    for name, m in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):        # a part of a neuron, such as its surrogate
            continue
        if _entry(m):
            found[name] = m
        elif not any(m.children()) and not any(base.__module__.startswith("torch.") for base in type(m).__mro__
                                               if base is not nn.Module):
            unknown.add(type(m).__name__)
    return list(found.values()), sorted(unknown)


def _entry(m):
    """A neuron's entry in PACKAGES; None where m is no neuron that is known."""
    for base in type(m).__mro__:
        name, rest = PACKAGES.get(base.__module__.split(".")[0], ("", None))
        if name and hasattr(m, name) and (name != "p" or hasattr(m.p, "v_th")):
            return name, rest
    return None


def get_threshold(m):
    """The threshold of a neuron: a number or a tensor."""
    value = getattr(m, _entry(m)[0])
    value = getattr(value, "v_th", value)       # norse
    return value.detach() if isinstance(value, torch.Tensor) else value


def set_threshold(m, value):
    """Sets the threshold of a neuron, in the library's own form, and returns what it had kept. Nothing is changed in
    place, so that gradients of an earlier pass stay right."""
    name = _entry(m)[0]
    before = getattr(m, name)
    if name == "p":
        value = before._replace(v_th=torch.as_tensor(value))
    elif name != "v_thr" and isinstance(before, torch.Tensor):
        value = torch.as_tensor(value, dtype=before.dtype, device=before.device)
        value = nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value
    setattr(m, name, value)
    return before


def put_back(m, before):
    """Undoes set_threshold."""
    setattr(m, _entry(m)[0], before)


def reset(neurons):
    """Puts every neuron to rest that keeps its potential between calls."""
    for m in neurons:
        if _entry(m)[1]:
            getattr(m, _entry(m)[1], lambda: None)()
