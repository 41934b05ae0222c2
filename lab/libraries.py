"""Neurons of this project and of other libraries: where each keeps its threshold, so that a scan can change it.

Known are the neurons of lif.py, SpikingJelly, snnTorch and sinabs, copies of them, and what is derived from them. A
further library needs one entry in PACKAGES if its neurons keep the threshold in one attribute.
"""
import contextlib

from torch import nn

# package, or module in one -> the attribute of its neurons that is the threshold, and the method that puts one to rest
PACKAGES = {"lif": ("v_thr", None), "spikingjelly": ("v_threshold", "reset"), "snntorch": ("threshold", "reset_mem"),
            "sinabs": ("spike_threshold", "reset_states")}


def neurons_of(model):
    """Neurons (a list of modules), and the sorted class names of modules that are neither a neuron known here, nor
    derived from torch's own, nor made of other modules: look at these before you trust that all were found."""
    found, unknown = {}, set()
    for name, m in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)       # a part of a neuron, such as its surrogate
        bases = [base.__module__ for base in type(m).__mro__ if base is not nn.Module]
        if entry(m) and not inside:
            found[name] = m
        elif not (inside or any(m.children()) or any(base.startswith("torch.") for base in bases)):
            unknown.add(type(m).__name__)
    return list(found.values()), sorted(unknown)


def entry(m):
    """A neuron's entry in PACKAGES; None where m is no neuron that is known."""
    for base in type(m).__mro__:
        for package in PACKAGES.keys() & set(base.__module__.split(".")):
            if hasattr(m, PACKAGES[package][0]):
                return PACKAGES[package]
    return None


@contextlib.contextmanager
def scaled(model, factor=1.0):
    """Inside, the thresholds of all neurons that are known are `factor` times their own, in the library's own form, and
    neurons that keep their potential between calls are put to rest before each call of the model."""
    found, _ = neurons_of(model)
    before = [(m, entry(m)[0], getattr(m, entry(m)[0])) for m in found]
    resets = [getattr(m, entry(m)[1]) for m in found if hasattr(m, str(entry(m)[1]))]

    def rest(*_):
        for reset in resets:
            reset()
    hook = model.register_forward_pre_hook(rest)
    try:
        for m, name, old in before:
            value = old * factor                            # a new one: nothing is changed in place
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value.detach(), old.requires_grad)
            setattr(m, name, value)
        yield model
    finally:
        hook.remove()
        for m, name, old in before:
            setattr(m, name, old)
