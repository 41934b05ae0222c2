"""The spiking neuron (paper Sec. 3.2, Eq. 1), its surrogate gradient, and its switchable setting (v_thr, tau).

A leaky integrate-and-fire (LIF) neuron does three things per time step:

    charge   v[t] = tau * v[t-1] + x[t]          tau: membrane decay per step, in [0, 1]
    fire     s[t] = 1 if v[t] >= v_thr else 0    v_thr: threshold, > 0
    reset    v[t] = 0 where s[t] = 1             hard reset; gradients flow through it

`lif_reference` below is that definition in plain lines. `LIF` and `PLIF` are the layers that networks use: same
numbers, one fused pass over memory. Nothing is kept between calls: every forward starts at rest, v = 0.

    from lif import LIF, neurons
    spikes = LIF(v_thr=1.0, tau=0.5)(x_seq)           # x_seq [T, B, ...] -> spikes, same shape, 0 or 1
    with neurons(model, v_thr=1.15):                  # every neuron of the model, until the block ends
        logits = model(images)
"""
import contextlib
import logging
import math
import os
import warnings

import torch
import torch.distributed as dist
import torch.fx.experimental._config
from torch import nn

V_THR_N, TAU_N = 1.0, 0.5       # S_n, the nominal setting (Sec. 4.1)

# ---------------------------------------------------------------------------------------------------------
# Surrogate gradients. The spike is a step function: its true derivative is 0 almost everywhere, so nothing
# could be learned. In the backward pass it is replaced by a bump around the threshold, d = v - v_thr.

def triangle(d):
    """ds/dv = max(0, 1 - |d|), for any shape of d = v - v_thr (width 1: the default of SEENN and TET)."""
    return (1 - d.abs()).clamp(min=0)


def arctan(d):
    """ds/dv = 1 / (1 + (pi d)^2), for any shape of d = v - v_thr (PLIF's ATan, Fang et al. 2021, alpha = 2)."""
    return 1 / (1 + (math.pi * d) ** 2)


SURROGATES = {"triangle": triangle, "arctan": arctan}


class Spike(torch.autograd.Function):
    """Step function forward, surrogate gradient backward: d = v - v_thr (any shape) -> 0 or 1."""

    @staticmethod
    def forward(ctx, d, surrogate):
        ctx.save_for_backward(d)
        ctx.surrogate = surrogate
        return (d >= 0).to(d.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * SURROGATES[ctx.surrogate](ctx.saved_tensors[0]), None


def lif_reference(x_seq, v_thr=V_THR_N, tau=TAU_N, surrogate="triangle"):
    """The definition of the neuron, slow and plain, differentiated by autograd (Eq. 1 at a time step of 1).

    x_seq: input currents [T, B, ...]. v_thr > 0 and tau in [0, 1]: a number, or one value per sample [B].
    Returns spikes, same shape and dtype. Everything else in this file must agree with these six lines.
    """
    v_thr, tau = (_per_sample(p, x_seq).view(-1, *[1] * (x_seq.dim() - 2)) for p in (v_thr, tau))
    v, spikes = torch.zeros_like(x_seq[0]), []
    for x in x_seq:
        v = tau * v + x                               # charge
        s = Spike.apply(v - v_thr, surrogate)         # fire
        v = v * (1 - s)                               # reset
        spikes.append(s.to(x_seq.dtype))
    return torch.stack(spikes)


# ---------------------------------------------------------------------------------------------------------
# The fused neuron. In a network, a neuron's input is BatchNorm(convolution), in a residual block plus the
# shortcut. All of these are limited by memory, not by arithmetic, so they are done in ONE pass:
#
#     x[t] = sum over the inputs of (scale * input[t] + shift)      scale, shift: BatchNorm, or nothing
#
# Forward reads the inputs and writes the spikes, nothing else; backward computes v again from the inputs
# (cheaper than writing and reading it). Tensors here are [T, B, M, C]: C channels last, M pixels.
# v_thr and tau are tensors [B], so that changing them never compiles anything again.

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)    # it warns where CUDA's files lie beside no GPU
torch._dynamo.config.recompile_limit = 64              # dtypes, with or without BatchNorm or residual, training or not
torch.fx.experimental._config.use_duck_shape = False   # two sizes that happen to be equal stay two sizes


class compiled:
    """Decorator: the function compiled by torch.compile, or as it is where that fails (no C++ compiler, say); said once."""
    enabled = os.environ.get("BADSNN_COMPILE", "1") != "0"

    def __init__(self, fn):
        self.fn, self.fast = fn, torch.compile(fn, dynamic=True)

    def __call__(self, *args):
        if compiled.enabled:
            try:
                return self.fast(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                compiled.enabled = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"torch.compile does not work here ({reason}); the neuron runs uncompiled, a few times slower", stacklevel=2)
        return self.fn(*args)


def _charge(v, tau, inputs, scales, shifts, t):
    v = tau * v
    for x, scale, shift in zip(inputs, scales, shifts):
        x = x[t].float()
        v = v + (x if scale is None else x * scale + shift)
    return v


@compiled
def _lif_forward(inputs, scales, shifts, v_thr, tau):
    v_thr, tau = v_thr[:, None, None], tau[:, None, None]
    v, spikes = 0.0, []
    for t in range(inputs[0].shape[0]):
        v = _charge(v, tau, inputs, scales, shifts, t)
        fired = v >= v_thr
        v = torch.where(fired, 0.0, v)
        spikes.append(torch.where(fired, 1.0, 0.0).to(inputs[0].dtype))
    return torch.stack(spikes)


@compiled
def _lif_backward(grad, inputs, scales, shifts, v_thr, tau, surrogate, learn_tau):
    """Returns dL/dx [T, B, M, C] and, for PLIF, dL/dtau [B]. By hand, backwards in time, with g = dL/d(v after reset):

        v after reset = v (1 - s)   =>   dL/ds = grad - g v,   dL/dv = g (1 - s) + dL/ds * surrogate(v - v_thr)
        v[t] = tau v[t-1] + x[t]    =>   dL/dx = dL/dv,   g[t-1] = tau dL/dv,   dL/dtau = sum of dL/dv * v[t-1]
    """
    v_thr, tau = v_thr[:, None, None], tau[:, None, None]
    T = grad.shape[0]
    v, before, charged = torch.zeros_like(grad[0], dtype=torch.float32), [], []
    for t in range(T):
        before.append(v)
        v = _charge(v, tau, inputs, scales, shifts, t)
        charged.append(v)
        v = torch.where(v >= v_thr, 0.0, v)
    g, grad_tau, grad_x = 0.0, 0.0, [None] * T
    for t in reversed(range(T)):
        v = charged[t]
        grad_s = grad[t].float() - g * v
        grad_v = torch.where(v >= v_thr, 0.0, g) + grad_s * SURROGATES[surrogate](v - v_thr)
        if learn_tau:
            grad_tau = grad_tau + grad_v * before[t]
        grad_x[t] = grad_v.to(grad.dtype)
        g = tau * grad_v
    return torch.stack(grad_x), grad_tau.sum((1, 2)) if learn_tau else None


@compiled
def _moments(x, origin):
    """Sums of x - origin and of its square, per channel: [T, B, M, C] -> [2, C]. An origin near the mean avoids cancellation."""
    d = x.float() - origin
    return torch.stack([d.sum(2), (d * d).sum(2)]).sum((1, 2))


@compiled
def _norm_sums(grad, x, mean):
    """The two sums of BatchNorm's backward, of grad and of grad * (x - mean), per channel -> [2, C]."""
    g = grad.float()
    return torch.stack([g.sum(2), (g * (x.float() - mean)).sum(2)]).sum((1, 2))


@compiled
def _norm_backward(grad, x, a, b, c):
    """The gradient through BatchNorm is a * grad + b * x + c, with a, b, c per channel."""
    return (a * grad.float() + b * x.float() + c).to(x.dtype)


def _sum_over_ranks(x):
    """Data-parallel training (torchrun): BatchNorm must see the whole batch, not this process's share."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def _flat(x, channels_last):
    """[T, B, ...] -> [T, B, M, C], without a copy when x lies in memory as asked.

    .data: torch.compile compiles a function once more for tensors that are views of others; so none of ours are.
    """
    if channels_last and x.dim() > 3:
        x = x.movedim(2, -1)
        return x.reshape(*x.shape[:2], -1, x.shape[-1]).contiguous().data
    return x.reshape(*x.shape[:2], 1, -1).contiguous().data


def _unflat(x, shape, channels_last):
    if channels_last and len(shape) > 3:
        return x.view(*shape[:2], *shape[3:], shape[2]).movedim(-1, 2)
    return x.view(shape)


class _FusedLIF(torch.autograd.Function):
    """spikes = LIF(sum of the inputs, each batch-normalised or as it is). Arguments: settings, then (x, weight, bias) per input."""

    @staticmethod
    def forward(ctx, surrogate, norms, v_thr, tau, *terms):
        inputs, weights, biases = terms[0::3], terms[1::3], terms[2::3]
        v_thr, tau = v_thr.data, tau.data      # .data: see _flat
        shape = inputs[0].shape
        # a lone contiguous input needs no notion of channels; everything else runs with channels last
        last = any(norms) or len(inputs) > 1 or not inputs[0].is_contiguous()
        inputs = [_flat(x, last) for x in inputs]
        stats, scales, shifts = [], [], []
        for x, norm, weight, bias in zip(inputs, norms, weights, biases):
            stat = _batch_statistics(norm, x) if norm else None
            scale = weight * stat[1] if norm else None
            stats.append(stat)
            scales.append(scale)
            shifts.append(bias - stat[0] * scale if norm else None)
        spikes = _lif_forward(inputs, scales, shifts, v_thr, tau)
        ctx.save_for_backward(v_thr, tau, *inputs)
        ctx.more = surrogate, norms, shape, last, stats, scales, shifts
        return _unflat(spikes, shape, last)

    @staticmethod
    def backward(ctx, grad):
        v_thr, tau, *inputs = ctx.saved_tensors
        surrogate, norms, shape, last, stats, scales, shifts = ctx.more
        grad = _flat(grad, last)
        grad, grad_tau = _lif_backward(grad, inputs, scales, shifts, v_thr, tau, surrogate, ctx.needs_input_grad[3])
        grads = []
        for x, norm, stat, scale in zip(inputs, norms, stats, scales):
            if not norm:
                grads += [_unflat(grad, shape, last), None, None]
                continue
            mean, rstd, n = stat
            grad_weight = grad_bias = None
            b, c = torch.zeros_like(mean), torch.zeros_like(mean)      # two: one for both would be compiled once more
            if n or any(ctx.needs_input_grad[5::3]):
                sums = _norm_sums(grad, x, mean)
                grad_weight, grad_bias = sums[1] * rstd, sums[0]
            if n:   # batch statistics: they depend on x as well
                total = _sum_over_ranks(sums.clone())
                b = -scale * rstd ** 2 * total[1] / n
                c = -scale * total[0] / n - b * mean
            grads += [_unflat(_norm_backward(grad, x, scale, b, c), shape, last), grad_weight, grad_bias]
        return None, None, None, grad_tau, *grads


def _batch_statistics(norm, x):
    """BatchNorm's mean, 1 / std [C] and number of values n per channel (n = 0: running statistics, constants)."""
    if not norm.training:
        return norm.running_mean, (norm.running_var + norm.eps).rsqrt(), 0
    origin = norm.running_mean.clone()
    n = x.numel() // x.shape[-1] * (dist.get_world_size() if dist.is_initialized() else 1)
    mean, square = _sum_over_ranks(_moments(x, origin)) / n
    var = (square - mean ** 2).clamp(min=0)
    mean = mean + origin
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(var * n / max(n - 1, 1), norm.momentum)   # PyTorch keeps the unbiased variance
    norm.num_batches_tracked += 1
    return mean, (var + norm.eps).rsqrt(), n


# ---------------------------------------------------------------------------------------------------------
# The layers.

def check_setting(v_thr=None, tau=None):
    """Raises ValueError unless v_thr > 0 and tau lies in [0, 1]; None is not checked. Numbers, or tensors [B]."""
    for name, value, ok in (("v_thr", v_thr, lambda p: (p > 0) & (p < math.inf)), ("tau", tau, lambda p: (p >= 0) & (p <= 1))):
        if value is None:
            continue
        p = torch.as_tensor(value, dtype=torch.float32)
        if p.dim() > 1:
            raise ValueError(f"{name} must be a number or one value per sample [B], not a tensor of shape {list(p.shape)}")
        if not ok(p).all():
            raise ValueError(f"{name} must be {'greater than 0' if name == 'v_thr' else 'between 0 and 1'}, not {value}")


def _per_sample(p, x_seq):
    """A number or a tensor [B] -> float32 tensor [B] on x_seq's device."""
    p = torch.as_tensor(p, dtype=torch.float32, device=x_seq.device)
    batch = x_seq.shape[1]
    if p.dim() and p.shape[0] not in (1, batch):
        raise ValueError(f"a neuron setting for {p.shape[0]} samples meets a batch of {batch}")
    return p.expand(batch).contiguous()


class LIF(nn.Module):
    """A layer of leaky integrate-and-fire neurons (Eq. 1): v = tau v + x; spike if v >= v_thr; then v = 0.

    v_thr > 0 and tau in [0, 1]: numbers, or tensors [B], one value per sample. Raises ValueError outside these ranges.
    surrogate: "triangle" or "arctan", the stand-in for the spike's derivative.
    """

    def __init__(self, v_thr=V_THR_N, tau=TAU_N, surrogate="triangle"):
        super().__init__()
        check_setting(v_thr, tau)
        if surrogate not in SURROGATES:
            raise ValueError(f"unknown surrogate {surrogate!r}; known: {', '.join(SURROGATES)}")
        self.v_thr, self.tau, self.surrogate = v_thr, tau, surrogate

    def forward(self, x_seq, norm=None, residual=None, residual_norm=None):
        """x_seq: input currents [T, B, ...], T first. Returns spikes (0 or 1), same shape and dtype; starts at rest.

        norm: an nn.BatchNorm2d applied to x_seq first. residual: a second input, added, after its own residual_norm if
        given. So lif(x, bn, r) equals lif(bn(x) + r), with one pass over memory instead of three.
        """
        if x_seq.dim() < 2:
            raise ValueError(f"a neuron needs [T, B, ...], got shape {list(x_seq.shape)}")
        terms, norms = [x_seq, norm and norm.weight, norm and norm.bias], [norm]
        if residual is not None:
            terms += [residual, residual_norm and residual_norm.weight, residual_norm and residual_norm.bias]
            norms.append(residual_norm)
        v_thr, tau = _per_sample(self.v_thr, x_seq), _per_sample(self.decay(), x_seq)
        with torch.autocast(x_seq.device.type, enabled=False):      # bfloat16 in, float32 inside, bfloat16 out
            return _FusedLIF.apply(self.surrogate, norms, v_thr, tau, *terms)

    def decay(self):
        return self.tau

    def extra_repr(self):
        return f"v_thr={self.v_thr}, tau={self.tau}, surrogate={self.surrogate}"


class PLIF(LIF):
    """LIF whose decay is learned, one value per layer: tau = sigmoid(w), w = 0 at the start, so tau = 0.5 (Fang et al. 2021).

    # differs from Fang et al.: the input is not scaled by 1 - tau, so that at the start PLIF is LIF (as in SEENN's code)
    """

    def __init__(self, v_thr=V_THR_N, surrogate="triangle"):
        super().__init__(v_thr, TAU_N, surrogate)
        self.tau = "sigmoid(w)"
        self.w = nn.Parameter(torch.zeros(()))

    def decay(self):
        return self.w.sigmoid()


@contextlib.contextmanager
def neurons(model, v_thr=None, tau=None):
    """Sets v_thr and tau (S_n, S_t, S_a of Sec. 3) of every neuron of the model and restores all on exit, also after an exception.

    Numbers, or tensors [B]: one value per sample of the batch, so that one forward pass can hold both of the paper's
    settings S_n and S_t. None leaves a value as it is. A PLIF keeps the tau that it learned. Raises ValueError.
    """
    check_setting(v_thr, tau)
    layers = [m for m in model.modules() if isinstance(m, LIF)]
    saved = [(m.v_thr, m.tau) for m in layers]
    try:
        for m in layers:
            m.v_thr = m.v_thr if v_thr is None else v_thr
            m.tau = m.tau if tau is None or isinstance(m, PLIF) else tau
        yield model
    finally:
        for m, (v_thr, tau) in zip(layers, saved):
            m.v_thr, m.tau = v_thr, tau


@torch.no_grad()
def count_spikes(model, x):
    """Spikes per sample [B], summed over T and all neurons (Fig. 2b). x: one batch of the model's input."""
    total, hooks = [], []
    for m in model.modules():
        if isinstance(m, LIF):
            hooks.append(m.register_forward_hook(lambda m, args, s: total.append(s.float().flatten(2).sum((0, 2)))))
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(total).sum(0)
