"""How fast is the neuron, and a training step? Run by hand: python tests/benchmark.py; pytest does not collect it.

Compiled, as it is defined, and SpikingJelly's where it is installed (pip install --no-deps spikingjelly loguru). They
take turns, three times: machines are noisy, ratios less so.
"""
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from kit import machine
from lif import LIF
from models import build_model


def layer_step(neuron):
    x, upstream = torch.randn(4, 64, 16, 32, 32, requires_grad=True), torch.randn(4, 64, 16, 32, 32)

    def step():
        if hasattr(neuron, "reset"):        # SpikingJelly's keeps a state
            neuron.reset()
        torch.autograd.grad(neuron(x), x, upstream)
    return step


def training_step():
    model, x, y = build_model("resnet19", 10, T=4), torch.rand(64, 3, 32, 32), torch.randint(10, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return step


if __name__ == "__main__":
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    machine.keep_memory()
    neuron, training = layer_step(LIF()), training_step()
    steps = {"neuron, compiled": neuron, "neuron": neuron, "training, compiled": training, "training": training}
    if find_spec("spikingjelly"):
        from spikingjelly.activation_based.neuron import LIFNode
        steps["neuron, SpikingJelly"] = layer_step(LIFNode(tau=2.0, decay_input=False, v_reset=0.0, step_mode="m"))
    for name, step in 3 * list(steps.items()):
        with machine.compiling("compiled" in name):
            step()                          # compiles, the first time
            time = Timer("step()", globals=dict(step=step)).blocked_autorange(min_run_time=2)
        print(f"{name:<24} {1000 * time.median:>9.2f} ms", flush=True)
