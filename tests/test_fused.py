"""The fused neuron against the definition: spikes, gradients, BatchNorm inside, compilation, refusals."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fused
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from lif import LIF, PLIF, SURROGATES, lif_reference


def fused_and_reference(shape, v_thr=1.0, tau=0.5, surrogate="triangle", dtype=torch.float32):
    """Spikes and input gradients of both paths, for the same random input and upstream gradient."""
    torch.manual_seed(0)
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    results = []
    for neuron in (LIF(v_thr, tau, surrogate), lambda x: lif_reference(x, v_thr, tau, surrogate)):
        x = x.detach().requires_grad_()
        spikes = neuron(x)
        results.append((spikes.detach(), torch.autograd.grad(spikes, x, grad)[0]))
    return results


@pytest.mark.parametrize("T", range(1, 9))
def test_fused_equals_reference_for_every_T(T, monkeypatch):
    """Compiled for T = 1, 2, 4, 8: each is compiled anew, for seconds. The same code runs uncompiled for the rest."""
    if T not in (1, 2, 4, 8):
        monkeypatch.setattr("fused.compiled.enabled", False)
    (s, g), (s_ref, g_ref) = fused_and_reference((T, 3, 5, 4, 7))
    assert torch.equal(s, s_ref) and torch.allclose(g, g_ref, atol=1e-5)
    assert 0 < s.mean() < 1


@pytest.mark.parametrize("shape", [(4, 1), (4, 2, 1), (4, 5, 7), (4, 2, 3, 5, 1), (2, 1, 1, 1, 1), (4, 3, 16, 8, 8)],
                         ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_fused_equals_reference_for_odd_shapes(shape, surrogate):
    (s, g), (s_ref, g_ref) = fused_and_reference(shape, surrogate=surrogate)
    assert s.shape == shape and torch.equal(s, s_ref) and torch.allclose(g, g_ref, atol=1e-5)


def test_a_surrogate_of_ones_own(monkeypatch):
    """One line in SURROGATES is enough, for the definition and for the fused neuron."""
    monkeypatch.setitem(SURROGATES, "sigmoid", lambda d: 4 * torch.sigmoid(4 * d) * torch.sigmoid(-4 * d))
    (s, g), (s_ref, g_ref) = fused_and_reference((4, 3, 5), surrogate="sigmoid")
    assert torch.equal(s, s_ref) and torch.allclose(g, g_ref, atol=1e-5)
    assert not torch.allclose(g, fused_and_reference((4, 3, 5))[0][1], atol=1e-2)


def test_one_setting_per_sample():
    v_thr, tau = torch.tensor([0.7, 1.0, 1.5]), torch.tensor([0.0, 0.5, 1.0])
    (s, g), (s_ref, g_ref) = fused_and_reference((4, 3, 4, 6, 6), v_thr, tau)
    assert torch.equal(s, s_ref) and torch.allclose(g, g_ref, atol=1e-5)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 6, 6)
    for b in range(3):
        alone = LIF(v_thr[b].item(), tau[b].item())(x[:, b:b + 1])
        assert torch.equal(alone, s[:, b:b + 1])


def test_channels_last_and_strided_input():
    x = torch.randn(4, 2, 8, 6, 6)
    expected = lif_reference(x)
    for same in (x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2)),
                 x.transpose(3, 4).contiguous().transpose(3, 4)):
        assert torch.equal(LIF()(same), expected)
    still = torch.randn(2, 8, 6, 6).expand(4, 2, 8, 6, 6)
    assert torch.equal(LIF()(still), lif_reference(still))
    for x in (torch.randn(2, 4).t(), torch.randn(2, 4, 6).transpose(0, 1), torch.randn(3, 2, 1).expand(3, 2, 8)):
        assert torch.equal(LIF()(x), lif_reference(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learned", ["weight", "bias", "none"])
def test_parts_of_a_batchnorm_that_are_frozen(training, learned):
    """The sums that BatchNorm's gradients need are left out only where nobody asks for them."""
    x, grads = torch.randn(2, 4, 8, 4, 4, requires_grad=True), []
    for fused_norm in (True, False):
        norm = nn.BatchNorm2d(8).train(training).requires_grad_(False)
        nn.init.normal_(norm.running_mean, generator=torch.Generator().manual_seed(0))
        leaves = [x] if learned == "none" else [x, getattr(norm, learned).requires_grad_()]
        s = LIF()(x, norm) if fused_norm else lif_reference(norm(x.flatten(0, 1)).unflatten(0, (2, 4)))
        grads.append(torch.autograd.grad((s * torch.arange(4.0)).sum(), leaves))
    for ours, theirs in zip(*grads):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("C", [4, 8, 16, 32])
def test_bfloat16_with_batchnorm(C):
    """The kernels work on several pixels at a time where channels are few: as PyTorch's BatchNorm, in its precision."""
    torch.manual_seed(0)
    x, grad, results = torch.randn(2, 4, C, 8, 8).bfloat16(), torch.randn(2, 4, C, 8, 8).bfloat16(), []
    for fused_norm in (True, False):
        leaf, norm = x.clone().requires_grad_(), nn.BatchNorm2d(C)
        if fused_norm:
            s = LIF()(leaf, norm)
        else:
            s = lif_reference(norm(leaf.float().flatten(0, 1)).unflatten(0, (2, 4))).bfloat16()
        grads = torch.autograd.grad(s, (leaf, norm.weight, norm.bias), grad)
        results.append((*grads, norm.running_mean, norm.running_var))
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype and torch.allclose(ours.float(), theirs.float(), atol=0.05, rtol=0.02)


def test_bfloat16():
    (s, g), (s_ref, _) = fused_and_reference((4, 3, 5, 4, 4), dtype=torch.bfloat16)
    assert s.dtype == g.dtype == torch.bfloat16 and torch.equal(s, s_ref) and g.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual_norm", [True, False, None], ids=["normed residual", "residual", "no residual"])
@pytest.mark.parametrize("C, H, W", [(8, 5, 5), (4, 4, 6), (8, 1, 2)])    # the kernels work on 1, 4, 1 pixels at a time
def test_batchnorm_and_residual_inside_the_neuron(training, residual_norm, C, H, W):
    """lif(x, bn, r, bn_r) is lif_reference(bn(x) + bn_r(r)): spikes, all gradients, running statistics."""
    results = []
    for fast in (True, False):
        torch.manual_seed(1)
        x, r, grad = (torch.randn(2, 4, C, H, W, dtype=torch.float32) for _ in range(3))
        norm, r_norm = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        for m in (norm, r_norm):
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias)
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), m.train(training)
        leaves = [x.requires_grad_(), r.requires_grad_(), *norm.parameters(), *r_norm.parameters()]
        if fast:
            out = LIF()(x, norm, r if residual_norm is not None else None, r_norm if residual_norm else None)
        else:
            current = norm(x.flatten(0, 1)).unflatten(0, (2, 4))
            if residual_norm is not None:
                current = current + (r_norm(r.flatten(0, 1)).unflatten(0, (2, 4)) if residual_norm else r)
            out = lif_reference(current)
        grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        results.append((out, norm.running_mean, norm.running_var, *grads))
    for ours, theirs in zip(*results):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_the_backward_pass_needs_may_not_change_before_it():
    """In place: PyTorch's own error; what the kernels copied may change, and so may running statistics."""
    x = torch.randn(4, 3, 5, 5, 8).movedim(-1, 2).requires_grad_()                        # channels last: not copied
    for call in (LIF(), lambda h: LIF()(h, nn.BatchNorm2d(8)), lambda h: LIF()(h, residual=torch.ones_like(h)),
                 lambda h: LIF()(torch.ones_like(h), residual=h)):
        h = x * 1.0
        h += call(h)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.sum().backward()
    h = x.detach().contiguous().requires_grad_()
    wanted, = torch.autograd.grad(LIF()(h, residual=h).sum(), h)
    spikes = LIF()(h, residual=h)
    with torch.no_grad():
        h += 1
    assert torch.equal(torch.autograd.grad(spikes.sum(), h)[0], wanted)
    v_thr = torch.ones(3)
    spikes = LIF(v_thr)(x)
    v_thr += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()

    norm, grad = nn.BatchNorm2d(8).eval(), torch.randn(4, 3, 8, 5, 5)
    wanted = torch.autograd.grad(LIF()(x, norm), (x, *norm.parameters()), grad)
    spikes = LIF()(x, norm)
    LIF()(x, norm.train())                                       # moves the running statistics
    for ours, theirs in zip(torch.autograd.grad(spikes, (x, *norm.parameters()), grad), wanted):
        assert torch.equal(ours, theirs)


def test_the_output_may_change_in_place():
    x = torch.randn(4, 3, 8)
    results = []
    for neuron in (LIF(), lif_reference):
        leaf = x.clone().requires_grad_()
        s = neuron(leaf)
        s *= torch.arange(8.0)
        s += leaf
        results.append(torch.autograd.grad(s.sum(), leaf)[0])
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("neuron", [LIF(), PLIF()], ids=["LIF", "PLIF"])
def test_no_second_derivative(neuron):
    """The backward pass is written by hand, so nothing can be differentiated twice: said, not silently wrong."""
    x = torch.randn(3, 2, 6, requires_grad=True)
    grad, = torch.autograd.grad((neuron(x) * x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad ** 2).sum().backward()


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register):
    norm = nn.BatchNorm2d(8)
    getattr(norm, register)(lambda *args: None)
    return norm


@pytest.mark.parametrize("norm", [
    Louder(8), nn.SyncBatchNorm(8), nn.GroupNorm(2, 8), nn.Identity(), nn.Sequential(), nn.BatchNorm2d(8, affine=False),
    nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, track_running_stats=False), hooked("register_forward_hook"),
    hooked("register_forward_pre_hook"), hooked("register_full_backward_hook"),
    hooked("register_full_backward_pre_hook")])
@pytest.mark.parametrize("training", [True, False])
def test_only_a_plain_batchnorm_fits_inside_the_neuron(norm, training):
    x = torch.randn(2, 3, 8, 5, 5)
    with pytest.raises(ValueError, match="plain nn.BatchNorm2d"):
        LIF()(x, norm.train(training))
    with pytest.raises(ValueError, match="plain nn.BatchNorm2d"):
        LIF()(x, residual=x, residual_norm=norm)


def test_shapes_that_do_not_fit():
    x, norm = torch.randn(2, 3, 8, 5, 5), nn.BatchNorm2d(8)
    for shape in ((1, 1, 8, 1, 1), (2, 3, 4, 5, 5), (2, 3, 8)):        # one value per channel; channels; no image
        with pytest.raises(ValueError, match="T, B, C, H, W"):
            LIF()(torch.randn(shape), norm)
    assert LIF()(torch.randn(1, 1, 8, 1, 1), norm.eval()).shape == (1, 1, 8, 1, 1)
    for residual in (x[:, :, :, :1], x[:1], x.flatten(3), x.transpose(0, 1)):
        with pytest.raises(ValueError, match="residual"):
            LIF()(x, residual=residual)


def test_uncompiled_is_the_same(monkeypatch):
    """Where there is no C++ compiler the same functions run as plain PyTorch."""
    s, g = fused_and_reference((4, 3, 8, 5, 5))[0]
    monkeypatch.setattr("fused.compiled.enabled", False)
    s_plain, g_plain = fused_and_reference((4, 3, 8, 5, 5))[0]
    assert torch.equal(s, s_plain) and torch.allclose(g, g_plain, atol=1e-6)


def test_one_kernel_serves_training_and_evaluation():
    """Other sizes, views, numbers in place of values per sample, no gradients: nothing is compiled again. (The gradient
    through a BatchNorm in eval mode is a kernel of its own: it is compiled here once, whatever tests ran before.)"""
    x, norm = torch.randn(4, 6, 8, 5, 5), nn.BatchNorm2d(8)
    LIF(torch.ones(6))(x, norm).sum().backward()
    LIF(torch.ones(6))(x, norm.eval()).sum().backward()
    before = counters["stats"]["unique_graphs"]
    LIF(torch.ones(9)[:3], 0.3)(x[:, :3, :, 1:, 2:], norm.eval()).sum().backward()
    LIF(torch.ones(9)[:3], 0.3)(x[:, :3, :, 1:, 2:], norm.train()).sum().backward()
    with torch.no_grad():
        LIF(1.2)(x[:, 1:], norm)
    assert counters["stats"]["unique_graphs"] == before


def test_another_number_of_steps_compiles_the_neuron_alone():
    """T = 1, then 2, then 4, as in training with a growing T: what knows no time is compiled once."""
    for T, kernels in ((3, None), (1, 2), (2, 2)):
        before = counters["stats"]["unique_graphs"]
        LIF(surrogate="arctan")(torch.randn(T, 3, 8, 5, 5), nn.BatchNorm2d(8)).sum().backward()
        assert kernels is None or counters["stats"]["unique_graphs"] - before <= kernels


def test_settings_of_the_compiler_that_a_version_lacks(monkeypatch):
    monkeypatch.setattr("torch._dynamo.config", SimpleNamespace(cache_size_limit=8))
    monkeypatch.delattr("torch.fx.experimental._config")
    fused.set_up_compiler()
    assert vars(torch._dynamo.config) == {"cache_size_limit": 64}


SCRIPT = """
import sys, torch
if sys.argv[1] == "no torch._dynamo":
    sys.modules["torch._dynamo"] = None
from lif import LIF, lif_reference
x = torch.randn(2, 3, 4)
for _ in range(2):
    assert torch.equal(LIF()(x), lif_reference(x))
weight = torch.nn.Parameter(torch.ones(4))
if sys.argv[1] != "no torch._dynamo":
    optimizer = torch.optim.SGD([weight])
    (LIF()(x) * weight).sum().backward(), optimizer.step()
"""


@pytest.mark.parametrize("case, environment, warning", [
    ("compiler", dict(CXX="/nowhere/g++"), "runs uncompiled"),
    ("cache", dict(TORCHINDUCTOR_CACHE_DIR="/dev/null/no", BADSNN_COMPILE="0"), "CACHE_DIR cannot be used"),
    ("no torch._dynamo", {}, "runs uncompiled")])
def test_what_is_missing_for_compiling_is_said_once_and_stops_nothing(case, environment, warning, tmp_path):
    environment = {**os.environ, "BADSNN_COMPILE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "new"), **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT, case], env=environment, cwd=Path(fused.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1 and warning in done.stderr and "Traceback" not in done.stderr
