"""How fast is the neuron, and the whole training step, beside other people's? Run by hand; pytest does not collect it.

    pip install --no-deps spikingjelly loguru snntorch norse nir nirtorch sinabs pbr torchattacks      # referees, each optional
    python tests/benchmark.py                                                 # writes results/benchmark.json

Everything is measured interleaved in one run (machines are noisy, ratios less so); medians of at least 9. First it checks
that our spikes equal SpikingJelly's. (a) LIF layer forward + backward; (b) training step of ResNet-19, width 16, batch 64,
T = 4; (c) its peak memory, in fresh processes; (d) evaluation; (e) a plain copy of the bytes that the LIF must move;
(f) cost per epoch against the number of images and T; (g) DeepFool against torchattacks'.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import badsnn
from lif import LIF, lif_reference
from models import build_model
from trigger import deepfool

REPEATS = 9


def interleaved(functions, repeats=REPEATS):
    """Median milliseconds of each function, measured in turns after two warm-up rounds."""
    times = {name: [] for name in functions}
    for round_ in range(repeats + 2):
        for name, f in functions.items():
            started = time.perf_counter()
            f()
            if round_ >= 2:
                times[name].append(1000 * (time.perf_counter() - started))
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


def installed():
    found = {}
    for name, make in REFEREES.items():
        try:
            found[name] = make()
            found[name](torch.rand(2, 2, 3))
        except Exception as error:                                   # a referee that does not run here is no reason to stop
            found.pop(name, None)
            print(f"without {name} ({type(error).__name__}: {str(error).splitlines()[0][:80]}); pip install --no-deps {name}")
    return found


def same_spikes_as_spikingjelly():
    from spikingjelly.activation_based import functional, neuron
    layer = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, step_mode="m")
    x = torch.randn(8, 4, 16, 8, 8)
    functional.reset_net(layer)
    assert torch.equal(layer(x), LIF()(x)), "our spikes differ from SpikingJelly's"
    print("spikes equal SpikingJelly's")


# ---------------------------------------------------------------------------------------------------------
# (a), (e): one layer

def layers(referees):
    """Forward + backward of one LIF layer, all implementations; a copy of the five tensors that it has to read or write."""
    results = {}
    for shape in ((4, 64, 16, 32, 32), (4, 64, 32, 16, 16), (4, 64, 64, 8, 8)):
        x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
        source, target = torch.randn(shape), torch.empty(shape)

        def step(f, x=x, grad=grad):
            return lambda: torch.autograd.grad(f(x), x, grad)

        def copy(source=source, target=target):
            for _ in range(3):                    # x, grad, x read; spikes, grad_x written: 5 tensors; three copies move 6
                target.copy_(source)
        functions = {"ours": step(LIF()), "reference loop": step(lif_reference), "copy": copy}
        for name, f in referees.items():
            functions[name] = step(f)
            if results:                           # compiled only at the first shape: it takes minutes
                continue
            try:
                compiled = torch.compile(f)
                compiled(x)
                functions[f"{name} compiled"] = step(compiled)
            except Exception:
                print(f"  {name} does not run under torch.compile")
        results["x".join(map(str, shape))] = interleaved(functions)
    return results


# ---------------------------------------------------------------------------------------------------------
# (b), (c), (d): the network

class JellyBlock(nn.Module):
    def __init__(self, c_in, c_out, stride, node):
        super().__init__()
        from spikingjelly.activation_based import layer
        self.conv1, self.bn1 = layer.Conv2d(c_in, c_out, 3, stride, 1, bias=False, step_mode="m"), layer.BatchNorm2d(c_out, step_mode="m")
        self.conv2, self.bn2 = layer.Conv2d(c_out, c_out, 3, 1, 1, bias=False, step_mode="m"), layer.BatchNorm2d(c_out, step_mode="m")
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


def training_step(model, amp, batch=64):
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def evaluation(model, amp, batch=256):
    x = torch.rand(batch, 3, 32, 32)
    model.eval()

    def step():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model(x)
    return step


def peak_memory(kind):
    """MiB above an idle process that has imported torch, in a fresh process that trains 3 steps in float32."""
    done = subprocess.run([sys.executable, __file__, "--memory-of", kind], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak():
    """Peak resident memory of this process in MiB, from Linux; ru_maxrss would count the parent's as well."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024


def memory_of(kind):
    idle = peak()
    badsnn.keep_memory() if kind == "ours" else None
    step = training_step(ours() if kind == "ours" else JellyResNet19(), amp=False)
    for _ in range(3):
        step()
    print(peak() - idle)


def scaling(amp):
    """Milliseconds of a training pass over n images, batch 32, 16x16 pixels: 4 sizes at T = 4, then 4 T at 128 images."""
    def epoch(n, T):
        model = ours(8, T)
        x, y = torch.rand(32, 3, 16, 16), torch.randint(10, (32,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def run():
            for _ in range(n // 32):
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return run
    return {"images": interleaved({n: epoch(n, 4) for n in (64, 128, 256, 512)}),
            "T": interleaved({T: epoch(128, T) for T in (2, 4, 8, 16)})}


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
    torchattacks.DeepFool(model, steps=1)(x[:2], answer[:2])                 # both warm up: kernels for one image and for many
    deepfool(model, x, 10, max_iter=10, max_step=None)
    started = time.perf_counter()
    ours_delta, ours_turned = deepfool(model, x, 10, max_iter=10, overshoot=0.02, max_step=None, with_success=True)
    ours_seconds, started = time.perf_counter() - started, time.perf_counter()
    theirs = torchattacks.DeepFool(model, steps=10, overshoot=0.02)(x, answer)
    theirs_seconds = time.perf_counter() - started
    theirs_turned = model(theirs).argmax(1) != answer
    both = ours_turned & theirs_turned
    l2 = [round(d[both].flatten(1).norm(dim=1).mean().item(), 4) for d in (ours_delta, theirs - x)]
    return {"images": images, "seconds": [round(ours_seconds, 2), round(theirs_seconds, 2)], "turned": [int(ours_turned.sum()),
            int(theirs_turned.sum())], "mean L2 where both turn": l2, "speed-up": round(theirs_seconds / ours_seconds, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-of", choices=("ours", "spikingjelly"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path("results"))
    a = parser.parse_args()
    if a.memory_of:
        return memory_of(a.memory_of)
    badsnn.keep_memory()
    amp, cores = badsnn.cpu_has_bfloat16(), os.cpu_count()
    result = {"torch": torch.__version__, "cores": cores, "bfloat16 in hardware": amp, "repeats": REPEATS}
    referees = installed()
    if "spikingjelly" in referees:
        same_spikes_as_spikingjelly()
    for threads in sorted({1, min(2, cores)}):
        torch.set_num_threads(threads)
        result[f"layer, {threads} thread(s), ms"] = layers(referees)
        functions = {"ours float32": training_step(ours(), False)}
        if amp:
            functions["ours bfloat16"] = training_step(ours(), True)
        evaluations = {"ours": evaluation(ours(), amp)}
        if "spikingjelly" in referees:
            functions["spikingjelly float32"] = training_step(JellyResNet19(), False)
            evaluations["spikingjelly float32"] = evaluation(JellyResNet19(), False)
            if amp:
                functions["spikingjelly bfloat16"] = training_step(JellyResNet19(), True)
        result[f"training step, {threads} thread(s), ms"] = interleaved(functions)
        result[f"evaluation of 256 images, {threads} thread(s), ms"] = interleaved(evaluations)
        print(json.dumps({k: v for k, v in result.items() if f"{threads} thread" in k}, indent=1), flush=True)
    result["peak memory, MiB"] = {kind: round(peak_memory(kind)) for kind in ("ours", *(["spikingjelly"] * ("spikingjelly" in referees)))}
    result["scaling, ms per epoch"] = scaling(amp)
    try:
        result["deepfool, ours and torchattacks"] = deepfool_against_torchattacks()
    except ImportError:
        print("without torchattacks; pip install --no-deps torchattacks")
    result["summary"] = summary(result, min(2, cores), amp)
    for what, value in result["summary"].items():
        print(f"{what}: {value}")
    badsnn.write_json(a.results / "benchmark.json", result)


def summary(r, threads, amp):
    """The ratios that matter, in words."""
    layer, lines = r[f"layer, {threads} thread(s), ms"]["4x64x16x32x32"], {}
    plain = {n: t for n, t in layer.items() if n in REFEREES}
    compiled = {n: t for n, t in layer.items() if n.endswith("compiled")}
    loop = layer["reference loop"] / layer["ours"]
    lines["LIF layer, forward + backward, 4x64x16x32x32"] = f"{layer['ours']:.1f} ms; reference loop {loop:.1f}x slower"
    for title, others in (("fastest library", plain), ("fastest library under torch.compile", compiled)):
        if others:
            name = min(others, key=others.get)
            lines[f"LIF layer, {title}"] = f"{name}, {others[name] / layer['ours']:.1f}x slower"
    lines["LIF layer, a copy of the same bytes"] = f"{layer['ours'] / (layer['copy'] * 5 / 6):.1f}x the copy"
    step, evaluation_ = r[f"training step, {threads} thread(s), ms"], r[f"evaluation of 256 images, {threads} thread(s), ms"]
    default = step["ours bfloat16" if amp else "ours float32"]
    lines["ResNet-19 width 16, training"] = f"{64000 / default:.0f} images/s, default settings"
    if "spikingjelly float32" in step:
        ratios = [f"{step['spikingjelly float32'] / default:.1f}x default against float32",
                  f"{step['spikingjelly float32'] / step['ours float32']:.1f}x float32"]
        ratios += [f"{step['spikingjelly bfloat16'] / step['ours bfloat16']:.1f}x bfloat16"] if amp else []
        lines["the same on SpikingJelly, slower by"] = ", ".join(ratios)
        memory = r["peak memory, MiB"]
        lines["peak memory of float32 training"] = f"{memory['ours']} MiB against SpikingJelly's {memory['spikingjelly']} MiB"
        speeds = [f"{256000 / t:.0f}" for t in (evaluation_["ours"], evaluation_["spikingjelly float32"])]
        lines["evaluation, images/s"] = f"{speeds[0]}, SpikingJelly {speeds[1]}"
    if "deepfool, ours and torchattacks" in r:
        d = r["deepfool, ours and torchattacks"]
        ours_l2, theirs_l2 = d["mean L2 where both turn"]
        lines["DeepFool, 64 images of 32x32, torchattacks"] = f"{d['speed-up']:.0f}x slower; mean L2 {ours_l2:.3f} (ours), {theirs_l2:.3f}"
    for what, times in r["scaling, ms per epoch"].items():
        lines[f"cost per epoch against {what}"] = ", ".join(f"{k}: {t:.0f} ms" for k, t in times.items())
    return lines


if __name__ == "__main__":
    main()
