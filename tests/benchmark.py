"""How fast is the neuron, and a training step? Run by hand; pytest does not collect it.

    pip install --no-deps spikingjelly loguru           # optional, for comparison
    python tests/benchmark.py                           # writes results/benchmark.json; on a GPU benchmark_gpu.json

Three neurons: ours compiled, ours as it is defined, SpikingJelly's, whose spikes must be ours. (a) One layer of them
forward and backward; (b) a training step of ResNet-19, width 16, batch 64, T = 4; (c) its peak memory. Every subject
lives in a process of its own; they take turns, one step each, and medians are compared: machines are noisy, ratios
less so.
"""
import argparse
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

from kit import files, machine
from lif import LIF, Spike
from models import build_model

REPEATS, DEVICE = 9, "cuda" if torch.cuda.is_available() else "cpu"
NEURONS = ["ours", "definition"] + (["spikingjelly"] if find_spec("spikingjelly") else [])
SUBJECTS = "layer 4x64x16x32x32", "layer 4x64x64x8x8", "train float32", "train bfloat16"


class Triangle(nn.Module):
    """Our surrogate in the form that SpikingJelly's neurons call: v - v_thr -> spikes."""

    def forward(self, d):
        return Spike.apply(d, "triangle")


class Jelly(nn.Module):
    """SpikingJelly's neuron in place of ours; it keeps a state, which its users reset before every batch."""

    def __init__(self):
        super().__init__()
        from spikingjelly.activation_based.neuron import LIFNode
        self.node = LIFNode(tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=Triangle(), step_mode="m")

    def forward(self, x):
        self.node.reset()
        return self.node(x)


def layer_step(neuron, shape):
    shape = tuple(map(int, shape.split("x")))
    x, grad, f = torch.randn(shape, requires_grad=True), torch.randn(shape), neuron()
    assert torch.equal(f(x), LIF()(x)), "its spikes are not ours"
    return lambda: torch.autograd.grad(f(x), x, grad)


def training_step(neuron, dtype, batch=64):
    model, x, y = build_model("resnet19", 10, T=4), torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LIF):
                setattr(parent, name, neuron())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def peak():
    """Peak memory of this process in MiB: on the GPU if there is one; else resident, from Linux."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def serve(who, kind, what):
    """In a process of its own: runs a subject once for every line on stdin; prints its milliseconds and MiB."""
    torch.set_default_device(DEVICE)
    machine.keep_memory()
    idle, neuron = peak(), Jelly if who == "spikingjelly" else LIF
    with machine.compiling(who == "ours"):
        step = layer_step(neuron, what) if kind == "layer" else training_step(neuron, what)
        for _ in sys.stdin:
            started = time.perf_counter()
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(1000 * (time.perf_counter() - started), peak() - idle, flush=True)


def measure(subject, threads):
    """{neuron: [median milliseconds, MiB]} of a subject, after two rounds of warm-up."""
    processes, found = {}, {who: [] for who in NEURONS}
    for who in NEURONS:
        command = [sys.executable, __file__, "--threads", str(threads), "--serve", who, *subject.split()]
        processes[who] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(REPEATS + 2):
        for who, process in processes.items():
            print(file=process.stdin, flush=True)
            found[who].append([float(number) for number in process.stdout.readline().split()])
    for process in processes.values():
        process.communicate()
    return {who: [round(statistics.median(ms for ms, _ in turns[2:]), 2), round(turns[-1][1])]
            for who, turns in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    if options.serve:
        torch.set_num_threads(options.threads)
        return serve(*options.serve)
    cores = 1 if DEVICE == "cuda" else machine.cores()          # on a GPU the number of threads does not matter
    result = dict(torch=torch.__version__, device=machine.name_of(DEVICE), cores=cores, repeats=REPEATS,
                  cpu=torch.backends.cpu.get_cpu_capability(), rows=[])
    for threads in sorted({1, min(2, cores)}):
        for subject in SUBJECTS:
            found = measure(subject, threads)
            for who, (ms, mib) in found.items():
                ratio = round(ms / found["ours"][0], 2)
                result["rows"].append(dict(subject=subject, neuron=who, threads=threads, ms=ms, mib=mib, ratio=ratio))
                print("{subject:<22} {neuron:<14} {threads} threads {ms:>9} ms {mib:>6} MiB {ratio:>6}x".format(
                    **result["rows"][-1]), flush=True)
    files.write_json(options.results / ("benchmark_gpu.json" if DEVICE == "cuda" else "benchmark.json"), result)


if __name__ == "__main__":
    main()
