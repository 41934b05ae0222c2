"""The same on a GPU: the neuron, and a training. Skipped where there is none."""
from dataclasses import replace

import pytest
import torch
from common import prepared

import badsnn
from kit import machine
from lif import LIF, lif_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("wanted", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_and_gradients_equal_the_definition(dtype, wanted, monkeypatch):
    monkeypatch.setitem(machine._compiling, "possible", True)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 6, 6, device="cuda").to(dtype)
    v_thr, grad, results = torch.tensor([0.8, 1.0, 1.5], device="cuda"), torch.randn_like(x), []
    for neuron, where in ((LIF(v_thr, 0.5), "cuda"), (lambda x: lif_reference(x.float(), v_thr.cpu(), 0.5), "cpu")):
        leaf = x.detach().to(where).requires_grad_()
        with machine.compiling(wanted), torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            spikes = neuron(leaf)
        results.append((spikes.detach().float().cpu(),
                        torch.autograd.grad(spikes, leaf, grad.to(leaf.device, spikes.dtype))[0].float().cpu()))
    (s, g), (s_ref, g_ref) = results
    assert torch.equal(s, s_ref) and 0 < s.mean() < 1
    assert torch.allclose(g, g_ref, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("bf16", [False, True])
def test_one_step_of_training_as_on_the_cpu(digits, tmp_path, bf16):
    data, s = prepared(data=digits, epochs=1, batch_size=270, runs=tmp_path / "cpu")
    cpu, gpu = (badsnn.train(data, one, "badsnn") for one in (
        s, replace(s, device="cuda", bf16=bf16, runs=tmp_path / "gpu")))
    assert gpu.history[0]["loss"] == pytest.approx(cpu.history[0]["loss"], rel=0.02 if bf16 else 1e-3)
    again = badsnn.train(data, replace(s, device="cuda", bf16=bf16, runs=tmp_path / "gpu"), "badsnn")
    for p, q, r in zip(gpu.parameters(), again.parameters(), cpu.parameters()):
        assert torch.equal(p, q) and torch.allclose(p.cpu(), r, atol=0.05 if bf16 else 1e-2)
