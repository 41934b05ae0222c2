"""The same on a GPU: spikes and gradients, training and its resumption, bfloat16, one process under torchrun. Skipped
where there is none; the rest of the tests runs on the CPU."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import ROOT, TINY, prepared
from torch import nn

import badsnn
from lif import LIF, lif_reference
from models import build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr("fused.compiled.enabled", True)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_spikes_and_gradients_equal_the_definition(per_sample, channels_last):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 6, 6, device="cuda")
    if channels_last:
        x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 3))
    v_thr = torch.tensor([0.8, 1.0, 1.5], device="cuda") if per_sample else 1.0
    grad, results = torch.randn_like(x), []
    for neuron in (LIF(v_thr, 0.5), lambda x: lif_reference(x, v_thr, 0.5)):
        leaf = x.detach().requires_grad_()
        spikes = neuron(leaf)
        results.append((spikes.detach(), torch.autograd.grad(spikes, leaf, grad)[0]))
    (s, g), (s_ref, g_ref) = results
    assert torch.equal(s, s_ref) and torch.allclose(g, g_ref, atol=1e-5) and 0 < s.mean() < 1


def test_batchnorm_inside_the_neuron():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 4, 3, 8, 6, 6, device="cuda")
    bn = nn.BatchNorm2d(8).cuda()
    norm = bn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    assert (LIF().cuda()(x, bn.train(), residual) == LIF()(norm + residual)).float().mean() > 0.999


@pytest.mark.parametrize("name", ["resnet19", "vgg16"])
def test_networks_answer_as_on_the_cpu(name):
    torch.manual_seed(0)
    model, x = build_model(name, 10, T=2, width=8).eval(), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        cpu, gpu = model(x), model.cuda()(x.cuda()).cpu()
    assert (cpu - gpu).abs().mean() < 0.1 * cpu.std()      # a spike that flips by rounding changes what follows


def test_training_in_both_precisions_and_its_resumption(workplace):
    data, s = prepared("--device", "cuda", "--epochs", "3")
    whole = badsnn.train(data, replace(s, runs=Path("whole")), "badsnn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(badsnn.runs, "print_epoch", stop_after(2))
        with pytest.raises(KeyboardInterrupt):
            badsnn.train(data, replace(s, runs=Path("parts")), "badsnn")
    again = badsnn.train(data, replace(s, runs=Path("parts")), "badsnn")
    assert again.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-2)   # sums in no fixed order
    assert len(again.history) == 3 and again.history[-1]["loss"] < again.history[0]["loss"]
    half = badsnn.train(data, replace(s, amp="on", runs=Path("half")), "badsnn")
    assert half.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=0.1)


def stop_after(epoch):
    def print_epoch(row, *_, **__):
        if row and row["epoch"] == epoch:
            raise KeyboardInterrupt
    return print_epoch


def test_the_attack_alone_and_as_one_process_of_torchrun(workplace):
    badsnn.main(["attack", *TINY, "--device", "cuda", "--v-thr-a", "1.1"])
    alone = json.loads(Path("runs/results/digits/attack.json").read_text())
    assert alone["device"].startswith("cuda") and 0 <= alone["at_chosen"]["ca"] <= 100
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
                           str(ROOT / "badsnn.py"), "attack", *TINY, "--device", "cuda", "--results", "other",
                           "--runs", "other", "--v-thr-a", "1.1"], capture_output=True, text=True, timeout=300,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path("other/digits/attack.json").exists()


def test_memory_grows_with_the_batch_only():
    """What a step keeps is freed: the tenth step needs no more memory than the second."""
    model = build_model("resnet19", 10, T=4, width=16).cuda()
    peaks = []
    for _ in range(10):
        torch.cuda.reset_peak_memory_stats()
        model(torch.rand(64, 3, 32, 32, device="cuda")).square().mean().backward()
        model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks[2:]) <= 1.02 * peaks[1]
