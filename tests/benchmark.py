"""How fast is the neuron, and the whole training step, beside other people's? Run by hand; pytest does not collect it.

    pip install --no-deps spikingjelly loguru snntorch norse nir nirtorch sinabs pbr torchattacks    # each optional
    python tests/benchmark.py             # writes results/benchmark.json; on a GPU benchmark_gpu.json, from (a) to (f)

Every subject lives in a process of its own, set up the way its users set it up; the processes take turns, one step
each, and medians of at least 9 turns are compared (machines are noisy, ratios less so). First: are our spikes
SpikingJelly's?

(a) LIF layer forward + backward; (b) training step of ResNet-19, width 16, batch 64, T = 4, and how much of it is
convolution; (c) its peak memory; (d) evaluation; (e) a plain copy of the bytes that the LIF must move; (f) cost per
epoch against the number of images and T; (g) DeepFool against torchattacks'; (h) accuracy on digits in bfloat16 and
in float32.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import machine
import runs
import torch
import torch.nn.functional as F
from torch import nn

import badsnn
import data as datasets
import settings
from lif import LIF, TAU_N, V_THR_N, lif_reference
from models import build_model
from trigger import deepfool

REPEATS = 9
DTYPES = ("float32", "bfloat16")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Subject:
    """Something to be timed, in its own process: every call runs it once there and returns its milliseconds."""

    def __init__(self, name, threads):
        command = [sys.executable, __file__, "--serve", name, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.DEVNULL)

    def __call__(self):
        """Raises ValueError, with the reason, where the process could not run it."""
        with contextlib.suppress(BrokenPipeError):                   # it has ended; its last line says why
            print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        try:
            milliseconds, self.peak = map(float, answer.split())
        except ValueError:
            raise ValueError(answer or "its process ended") from None
        return milliseconds

    def stop(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def serve(name):
    """The other side of Subject: prepares what is named, then runs it once for every line on stdin."""
    torch.set_default_device(DEVICE)
    idle = peak()
    if "ours" in name:
        machine.keep_memory()              # as our command line does; the others run as their documentation has it
    kind, *rest = name.split()
    try:
        step = KINDS[kind](*rest)
        for _ in sys.stdin:
            started = time.perf_counter()
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(1000 * (time.perf_counter() - started), peak() - idle, flush=True)
    except Exception as error:          # a referee that is not installed, or does not run here, is no reason to stop
        print(f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:80]}", flush=True)


def peak():
    """Peak memory of this process in MiB, on the GPU if there is one; else resident, from Linux (ru_maxrss would count
    the parent's as well)."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024


def interleaved(names, threads, memory=None):
    """Median milliseconds of the subjects named, measured in turns after two rounds of warm-up; those that do not run
    are left out. memory: a dict that receives their peak memory in MiB above a process that has only imported torch."""
    subjects, times = {name: Subject(name, threads) for name in names}, {}
    for turn in range(REPEATS + 2):
        for name, subject in list(subjects.items()):
            try:
                milliseconds = subject()
                times.setdefault(name, []).extend([milliseconds] * (turn >= 2))
            except ValueError as error:
                print(f"  without {name} ({error})")
                subjects.pop(name).stop()
                times.pop(name, None)
    for name, subject in subjects.items():
        if memory is not None:
            memory[name] = round(subject.peak)
        subject.stop()
    return {name: round(statistics.median(t), 3) for name, t in times.items()}


# ---------------------------------------------------------------------------------------------------------
# Other people's LIF, v = 0.5 v + x, threshold 1, hard reset, as their documentation uses them: x_seq -> spikes.

def spikingjelly_lif():
    from spikingjelly.activation_based import functional, neuron, surrogate
    layer = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=surrogate.ATan(), step_mode="m")

    def run(x):
        functional.reset_net(layer)
        return layer(x)
    return run


def snntorch_lif():
    import snntorch
    from snntorch import surrogate
    layer = snntorch.Leaky(beta=0.5, threshold=1.0, spike_grad=surrogate.atan(), reset_mechanism="zero")

    def run(x):
        memory, spikes = layer.init_leaky(), []
        for step in x:
            s, memory = layer(step, memory)
            spikes.append(s)
        return torch.stack(spikes)
    return run


def norse_lif():
    from norse.torch import LIFBoxCell, LIFBoxParameters
    cell = LIFBoxCell(p=LIFBoxParameters(tau_mem_inv=torch.tensor(500.0)), dt=0.001)

    def run(x):
        state, spikes = None, []
        for step in x:
            s, state = cell(step, state)
            spikes.append(s)
        return torch.stack(spikes)
    return run


def sinabs_lif():
    import sinabs.activation as activation
    import sinabs.layers
    layer = sinabs.layers.LIF(tau_mem=1.4427, norm_input=False, reset_fn=activation.MembraneReset())

    def run(x):
        layer.reset_states()
        return layer(x.transpose(0, 1)).transpose(0, 1)             # sinabs wants [B, T, ...]
    return run


REFEREES = {"spikingjelly": spikingjelly_lif, "snntorch": snntorch_lif, "norse": norse_lif, "sinabs": sinabs_lif}


def same_spikes_as_spikingjelly():
    from spikingjelly.activation_based import functional, neuron
    layer = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, step_mode="m")
    x = torch.randn(8, 4, 16, 8, 8)
    functional.reset_net(layer)
    assert torch.equal(layer(x), LIF()(x)), "our spikes differ from SpikingJelly's"
    print("spikes equal SpikingJelly's")


# ---------------------------------------------------------------------------------------------------------
# (a), (e): one layer

def layer_step(who, shape):
    """Forward + backward of one LIF layer; for "copy", a copy of the five tensors that it has to read or write."""
    shape = tuple(map(int, shape.split("x")))
    x, grad, target = torch.randn(shape, requires_grad=True), torch.randn(shape), torch.empty(shape)
    if who == "copy":
        def copy():
            for _ in range(3):          # x, grad, x read; spikes, grad_x written: 5 tensors; three copies move 6
                target.copy_(grad)
        return copy
    name, _, compiled = who.partition("+")
    f = {"ours": LIF, "reference": lambda: lif_reference}.get(name) or REFEREES[name]
    f = torch.compile(f()) if compiled else f()
    return lambda: torch.autograd.grad(f(x), x, grad)


# ---------------------------------------------------------------------------------------------------------
# (b), (c), (d): the network

class JellyBlock(nn.Module):
    def __init__(self, c_in, c_out, stride, node):
        super().__init__()
        from spikingjelly.activation_based import layer
        self.conv1 = layer.Conv2d(c_in, c_out, 3, stride, 1, bias=False, step_mode="m")
        self.conv2 = layer.Conv2d(c_out, c_out, 3, 1, 1, bias=False, step_mode="m")
        self.bn1, self.bn2 = layer.BatchNorm2d(c_out, step_mode="m"), layer.BatchNorm2d(c_out, step_mode="m")
        self.sn1, self.sn2 = node(), node()
        self.down = nn.Identity() if stride == 1 and c_in == c_out else nn.Sequential(
            layer.AvgPool2d(stride, step_mode="m"), layer.Conv2d(c_in, c_out, 1, bias=False, step_mode="m"),
            layer.BatchNorm2d(c_out, step_mode="m"))

    def forward(self, s):
        return self.sn2(self.bn2(self.conv2(self.sn1(self.bn1(self.conv1(s))))) + self.down(s))


class JellyResNet19(nn.Module):
    """The same network on SpikingJelly's multi-step layers, built the way its documentation builds networks."""

    def __init__(self, width=16, T=4):
        super().__init__()
        from spikingjelly.activation_based import neuron
        self.T = T

        def node():
            return neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=triangle(), step_mode="m")
        self.stem, self.sn = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)), node()
        blocks, c_in = [], width
        for c_out, n, stride in ((width, 3, 1), (2 * width, 3, 2), (4 * width, 2, 2)):
            blocks += [JellyBlock(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1, node) for i in range(n)]
            c_in = c_out
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(c_in, 10)

    def forward(self, x):
        from spikingjelly.activation_based import functional
        functional.reset_net(self)
        s = self.sn(self.stem(x).unsqueeze(0).repeat(self.T, 1, 1, 1, 1))
        return self.head(self.blocks(s).mean((3, 4))).mean(0)


def triangle():
    """Our triangle surrogate in the form that SpikingJelly's neurons call: f(v - v_thr) -> spikes."""
    from lif import Spike

    class Call(nn.Module):
        def forward(self, d):
            return Spike.apply(d, "triangle")
    return Call()


def ours(width=16, T=4):
    return build_model("resnet19", 10, T=T, width=width)


NETWORKS = {"ours": ours, "spikingjelly": JellyResNet19}


def training_step(who, dtype, batch=64, size=32, **network):
    model, x, y = NETWORKS[who](**network), torch.rand(batch, 3, size, size), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def convolutions_step(who, dtype, batch=64):
    """Nothing but the convolutions of our training step, forward and backward, on inputs of the same shapes."""
    model, calls = NETWORKS[who](), []
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, inputs, out: calls.append(
                (m, inputs[0].detach().to(out.dtype), torch.ones_like(out))))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"), torch.no_grad():
        model(torch.rand(batch, 3, 32, 32))

    def step():
        for m, x, grad in calls:
            x, weight = x.requires_grad_(x.shape[1] > 3), m.weight.detach().to(x.dtype).requires_grad_()
            out = F.conv2d(x, weight, None, m.stride, m.padding)
            torch.autograd.grad(out, [weight, x] if x.requires_grad else weight, grad)
    return step


def evaluation(who, dtype, batch=256):
    model, x = NETWORKS[who]().eval(), torch.rand(batch, 3, 32, 32)

    def step():
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            model(x)
    return step


def epoch(who, dtype, images, T):
    """A training pass over so many images, batch 32, 16x16 pixels."""
    step = training_step(who, dtype, batch=32, size=16, width=8, T=int(T))

    def run():
        for _ in range(int(images) // 32):
            step()
    return run


KINDS = {"layer": layer_step, "train": training_step, "convolutions": convolutions_step, "evaluate": evaluation,
         "epoch": epoch}


# ---------------------------------------------------------------------------------------------------------
# (g): DeepFool

def deepfool_against_torchattacks(images=64):
    """Seconds and mean L2 on the images that both turn, of a small trained network on 32x32 images; equal settings."""
    import torchattacks
    torch.manual_seed(0)
    model, y = build_model("resnet19", 10, T=4, width=8), torch.arange(images) % 10
    x = 0.5 * torch.rand(images, 3, 32, 32)
    for k in range(10):
        x[y == k, ..., 3 * k:3 * k + 3] += 0.25                              # a brighter stripe at another place
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    answer = model(x).argmax(1)
    torchattacks.DeepFool(model, steps=1)(x[:2], answer[:2])         # both warm up: kernels for one image and for many
    deepfool(model, x, 10, max_iter=10, max_step=None)
    started = time.perf_counter()
    ours_delta, ours_turned = deepfool(model, x, 10, max_iter=10, overshoot=0.02, max_step=None, with_success=True)
    ours_seconds, started = time.perf_counter() - started, time.perf_counter()
    theirs = torchattacks.DeepFool(model, steps=10, overshoot=0.02)(x, answer)
    theirs_seconds = time.perf_counter() - started
    theirs_turned = model(theirs).argmax(1) != answer
    both = ours_turned & theirs_turned
    l2 = [round(d[both].flatten(1).norm(dim=1).mean().item(), 4) for d in (ours_delta, theirs - x)]
    return {"images": images, "seconds": [round(ours_seconds, 2), round(theirs_seconds, 2)],
            "turned": [int(ours_turned.sum()), int(theirs_turned.sum())], "mean L2 where both turn": l2,
            "speed-up": round(theirs_seconds / ours_seconds, 1)}


# ---------------------------------------------------------------------------------------------------------
# (h): what bfloat16 costs in accuracy

def accuracy(seeds=3):
    """Accuracy in percent on digits of clean models, three seeds each, in bfloat16 and in float32."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, amp in (("bfloat16", "on"), ("float32", "off")):
            for seed in range(seeds):
                s = settings.preset("digits", amp=amp, seed=seed, runs=Path(folder))
                data = datasets.load_for(s)
                model = badsnn.train(data, s)
                found.setdefault(dtype, []).append(badsnn.evaluate(model, data, s, V_THR_N, TAU_N)["ca"])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    if options.serve:
        torch.set_num_threads(options.threads)
        return serve(options.serve)
    gpu = DEVICE == "cuda"
    cores = 1 if gpu else os.cpu_count()        # on a GPU the number of threads does not matter
    result = {"torch": torch.__version__, "cores": cores, "repeats": REPEATS,
              "cpu": torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability()}
    try:
        same_spikes_as_spikingjelly()
    except ImportError as error:
        print(f"without spikingjelly ({error}); pip install --no-deps spikingjelly loguru")
    for threads in sorted({1, min(2, cores)}):
        for shape in ("4x64x16x32x32", "4x64x32x16x16", "4x64x64x8x8"):
            compiled = [f"{name}+compiled" for name in REFEREES] if shape.endswith("32x32") else []
            names = [f"layer {who} {shape}" for who in ("ours", "reference", "copy", *REFEREES, *compiled)]
            result[f"layer {shape}, {threads} thread(s), ms"] = interleaved(names, threads)
        memory = {}
        steps = result[f"training step, {threads} thread(s), ms"] = interleaved(
            [f"{what} {dtype}" for dtype in DTYPES
             for what in ("train ours", "train spikingjelly", "convolutions ours")], threads, memory)
        if "faster type" not in result:             # with one thread
            result["faster type"] = best = min(DTYPES, key=lambda dtype: steps[f"train ours {dtype}"])
        result[f"evaluation of 256 images, {threads} thread(s), ms"] = interleaved(
            [f"evaluate ours {best}", "evaluate spikingjelly float32"], threads)
        print(json.dumps({k: v for k, v in result.items() if f"{threads} thread" in k}, indent=1), flush=True)
    result["peak memory, MiB"] = memory
    result["epoch of n images in T steps, ms"] = {
        "images": interleaved([f"epoch ours {best} {n} 4" for n in (64, 128, 256, 512)], threads),
        "T": interleaved([f"epoch ours {best} 128 {T}" for T in (2, 4, 8, 16)], threads)}
    machine.keep_memory()
    try:
        if not gpu:
            result["deepfool, ours and torchattacks"] = deepfool_against_torchattacks()
    except ImportError:
        print("without torchattacks; pip install --no-deps torchattacks")
    if best == "bfloat16" and not gpu:
        result["accuracy on digits, percent, one per seed"] = accuracy()
    result["summary"] = summary(result, best)
    for what, value in result["summary"].items():
        print(f"{what}: {value}")
    runs.write_json(options.results / ("benchmark_gpu.json" if gpu else "benchmark.json"), result)


def summary(r, best):
    """The ratios that matter, in words; where there are two numbers, with one thread / with two."""
    counts = sorted({1, min(2, r["cores"])})
    layers = [{key.split()[1]: t for key, t in r[f"layer 4x64x16x32x32, {n} thread(s), ms"].items()} for n in counts]
    steps, evaluated = ([r[f"{what}, {n} thread(s), ms"] for n in counts]
                        for what in ("training step", "evaluation of 256 images"))

    def both(text, measured):
        return " / ".join(map(text, measured))

    def fastest(layer, names):
        name = min((name for name in layer if names(name)), key=layer.get)
        return f"{name.partition('+')[0]} {layer[name] / layer['ours']:.1f}x"

    lines = {"LIF layer, forward + backward, 4x64x16x32x32": both(lambda t: f"{t['ours']:.1f} ms", layers),
             "the reference loop, slower by": both(lambda t: f"{t['reference'] / t['ours']:.1f}x", layers),
             "against a copy of the bytes that it must move": both(lambda t: f"{t['ours'] / (t['copy'] * 5 / 6):.1f}x",
                                                                   layers)}
    kinds = {"the fastest library, slower by": lambda name: name in REFEREES,
             "the fastest library under torch.compile, slower by": lambda name: name.endswith("+compiled")}
    for title, names in kinds.items():
        if all(any(map(names, layer)) for layer in layers):
            lines[title] = both(lambda t: fastest(t, names), layers)
    mine = f"train ours {best}"
    speed = both(lambda t: f"{64000 / t[mine]:.0f}", steps)
    lines["ResNet-19 width 16, training, batch 64, T = 4"] = f"{speed} images/s in {best}"
    for dtype in DTYPES:
        for who, title in (("ours", "a training step"), ("spikingjelly", "SpikingJelly's training step")):
            if all(f"train {who} {dtype}" in t for t in steps):
                lines[f"{title} against the convolutions alone, {dtype}"] = both(
                    lambda t: f"{t[f'train {who} {dtype}'] / t[f'convolutions ours {dtype}']:.2f}x", steps)
    if all("train spikingjelly float32" in step for step in steps):
        lines["the most that could be: SpikingJelly's step against our convolutions alone"] = both(
            lambda t: f"{t['train spikingjelly float32'] / t[f'convolutions ours {best}']:.1f}x", steps)
        lines["peak memory of float32 training"] = "{} MiB, SpikingJelly {} MiB".format(
            *(r["peak memory, MiB"][f"train {who} float32"] for who in NETWORKS))
        ours_speed = both(lambda t: f"{256000 / t[f'evaluate ours {best}']:.0f}", evaluated)
        theirs_speed = both(lambda t: f"{256000 / t['evaluate spikingjelly float32']:.0f}", evaluated)
        lines["evaluation"] = f"{ours_speed} images/s, SpikingJelly {theirs_speed}"
    if "deepfool, ours and torchattacks" in r:
        d = r["deepfool, ours and torchattacks"]
        ours_l2, theirs_l2 = d["mean L2 where both turn"]
        lines["DeepFool, 64 images of 32x32: torchattacks, slower by"] = (
            f"{d['speed-up']:.1f}x; mean L2 {ours_l2:.3f} (ours), {theirs_l2:.3f}")
    for what, times in r["epoch of n images in T steps, ms"].items():
        lines[f"cost per epoch against {what}"] = ", ".join(f"{name.split()[3 if what == 'images' else 4]}: {t:.0f} ms"
                                                            for name, t in times.items())
    if "accuracy on digits, percent, one per seed" in r:
        found = r["accuracy on digits, percent, one per seed"]
        lines["accuracy on digits, three seeds"] = "; ".join(
            f"{dtype} {sum(v) / len(v):.1f} ({', '.join(f'{x:.1f}' for x in v)})" for dtype, v in found.items())
    return lines


if __name__ == "__main__":
    main()
