"""The neuron of lif.py, fast: the numbers of `lif_reference` in one pass over memory, compiled by torch.compile.

In a network, a neuron's input is BatchNorm(convolution), in a residual block plus the shortcut. None of these is
limited by arithmetic, all by reading and writing memory; so the kernels below do all of them together:

    x[t] = sum over the inputs of (scale * input[t] + shift)      scale, shift: BatchNorm, or nothing
    v[t] = tau u[t-1] + x[t],   s[t] = step(v[t] - v_thr),   u[t] = v[t] (1 - s[t])      charge, fire, reset: lif.py

The forward pass writes nothing but the spikes; the backward pass computes v again, cheaper than to write and read it.

THE BACKWARD PASS BY HAND. Let h be the surrogate, grad[t] = dL/ds[t] what arrives from above, g = dL/du[t] what arrives
from step t + 1. s[t] acts on L directly and through u[t]; v[t] through s[t] and u[t]. So, backwards in time:

    dL/ds = grad[t] - g v[t]                      dL/dv = g (1 - s[t]) + dL/ds * h(v[t] - v_thr)
    dL/dx[t] = dL/dv                              dL/du[t-1] = tau dL/dv,   dL/dtau = sum over t of dL/dv * u[t-1]

THROUGH BATCHNORM, y = weight (x - mean) rstd + bias with n values per channel: the gradient is a grad + b x + c, where
a = weight rstd and, as mean and rstd depend on x too, b = -a rstd^2 sum(grad (x - mean)) / n and
c = -a sum(grad) / n - b mean. With running statistics, which are constants, b = c = 0.
"""
import logging
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)     # warns of CUDA files beside no GPU
try:
    os.makedirs(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "."), exist_ok=True)
except OSError as error:            # PyTorch's optimisers would fail as well: they import the compiler
    warnings.warn(f"TORCHINDUCTOR_CACHE_DIR cannot be used ({error}); compiled code goes to PyTorch's own folder")
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]


class compiled:
    """Decorator: the function under torch.compile, or as it is where that fails (no C++ compiler, say); said once."""
    enabled = os.environ.get("BADSNN_COMPILE", "1") != "0"

    def __init__(self, fn):
        self.fn, self.fast = fn, None

    def __call__(self, *args):
        if not compiled.enabled:
            return self.fn(*args)
        try:
            if self.fast is None:
                set_up_compiler()
                self.fast = torch.compile(self.fn, dynamic=True)
            return self.fast(*args)
        except Exception as error:
            result = self.fn(*args)         # raises as well if the arguments are to blame, not the compiler
            compiled.enabled = False
            warnings.warn(f"torch.compile fails here ({error!r:.99}); the neuron runs uncompiled, a few times slower")
            return result


def set_up_compiler():
    """Settings without a public name: a PyTorch that lacks one compiles more often, or gives up earlier."""
    dynamo, shapes = torch._dynamo.config, getattr(torch.fx.experimental, "_config", None)
    for config, name, value in ((dynamo, "recompile_limit", 64), (dynamo, "cache_size_limit", 64),    # PyTorch 2.7, 2.6
                                (shapes, "use_duck_shape", False)):          # sizes that happen to be equal stay two
        if hasattr(config, name):
            setattr(config, name, value)


# ----- The kernels. Tensors are [T, B, M, C]: C channels last, M pixels; [T B, M, C] where time plays no part. All
# sizes but T are open, and v_thr and tau are tensors [B]: changing them compiles nothing again.

def _charge(v, tau, inputs, scales, shifts, t):
    v = tau * v
    for x, scale, shift in zip(inputs, scales, shifts):
        x = x[t].float()
        v = v + (x if scale is None else x * scale + shift)
    return v


@compiled
def _lif_forward(inputs, scales, shifts, v_thr, tau):
    """Returns the spikes [T, B, M, C]."""
    v_thr, tau = v_thr[:, None, None], tau[:, None, None]
    v, spikes = 0.0, []
    for t in range(inputs[0].shape[0]):
        v = _charge(v, tau, inputs, scales, shifts, t)
        fired = v >= v_thr
        v = torch.where(fired, 0.0, v)
        spikes.append(torch.where(fired, 1.0, 0.0).to(inputs[0].dtype))
    return torch.stack(spikes)


@compiled
def _lif_backward(grad, inputs, scales, shifts, means, v_thr, tau, surrogate, learn_tau):
    """Returns dL/dx, for PLIF dL/dtau [B], and per input with a mean the sums of dL/dx and dL/dx (input - mean)."""
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
        grad_v = torch.where(v >= v_thr, 0.0, g) + grad_s * surrogate(v - v_thr)
        if learn_tau:
            grad_tau = grad_tau + grad_v * before[t]
        grad_x[t] = grad_v.to(grad.dtype)
        g = tau * grad_v
    grad_x = torch.stack(grad_x)
    sums = [None if mean is None else _sums(grad_x.float(), x.float() - mean) for x, mean in zip(inputs, means)]
    return grad_x, grad_tau.sum((1, 2)) if learn_tau else None, sums


def _sums(a, b):
    return torch.stack([a.sum(-2), (a * b).sum(-2)]).flatten(1, -2).sum(1)    # of a and of a b, per channel: [2, C]


@compiled
def _moments(x, origin):
    """The sums of x - origin and of its square. An origin near the mean avoids cancellation."""
    return _sums(x.float() - origin, x.float() - origin)


@compiled
def _norm_backward(grad, x, a, b, c):
    """The gradient through BatchNorm, with a, b, c per channel; b = c = None stands for zeros."""
    grad = a * grad.float()
    return (grad if b is None else grad + b * x.float() + c).to(x.dtype)


# ----- The autograd function around the kernels. On a CPU, rows of C values that are shorter than a cache line, 64
# bytes, cost up to eight times as much; so p pixels are folded into one row: [M, C] becomes [M / p, p C], no copy.

def _pixels_per_row(x):
    pixels, size = x.shape[3:].numel(), x.shape[2:3].numel() * x.element_size()
    return next((p for p in (8, 4, 2) if pixels % p == 0 and pixels > p and p * size <= 64), 1)


def _wide(a, p):
    return a if p == 1 else torch.cat([a] * p, -1)              # [..., C] -> [..., p C]


def _narrow(sums, p):
    return sums if p == 1 else sums.view(2, p, -1).sum(1)       # [2, p C] -> [2, C]


def _flat(x, p):
    """[T, B, ...] -> [T, B, M / p, p C], without a copy when x lies in memory as asked; p = 0: [T, B, 1, N]."""
    # .data: torch.compile compiles a function once more for tensors that are views of others; so none of ours are
    last = p and x.dim() > 3
    x = x.movedim(2, -1).reshape(*x.shape[:2], -1, p * x.shape[2]) if last else x.reshape(*x.shape[:2], 1, -1)
    return x.contiguous().data


def _unflat(x, shape, p):
    return x.view(*shape[:2], *shape[3:], shape[2]).movedim(-1, 2) if p and len(shape) > 3 else x.view(shape)


class _FusedLIF(torch.autograd.Function):
    """spikes = LIF(sum of the inputs, batch-normalised or not). Arguments: settings, (x, weight, bias) per input."""

    @staticmethod
    def forward(ctx, surrogate, norms, v_thr, tau, *terms):
        originals, weights, biases, shape = terms[0::3], terms[1::3], terms[2::3], terms[0].shape
        # a lone contiguous input needs no notion of channels; everything else runs with channels last
        p = _pixels_per_row(originals[0]) if any(norms) or len(norms) > 1 or not originals[0].is_contiguous() else 0
        inputs = [_flat(x, p) for x in originals]
        stats = [_batch_statistics(norm, x, p) if norm else None for norm, x in zip(norms, inputs)]
        scales = [_wide(weight, p) * stat[1] if stat else None for weight, stat in zip(weights, stats)]
        shifts = [_wide(bias, p) - stat[0] * a if stat else None for bias, stat, a in zip(biases, stats, scales)]
        spikes = _lif_forward(inputs, scales, shifts, v_thr.data, tau.data)
        # keeping the caller's own tensors: PyTorch notices when they change in place before the backward pass
        ctx.save_for_backward(v_thr, tau, *(x if x.data_ptr() == y.data_ptr() else _unflat(y, shape, p)
                                            for x, y in zip(originals, inputs)))
        ctx.more = surrogate, shape, p, stats, scales, shifts
        return _unflat(spikes, shape, p).data    # no view, so that it may be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        v_thr, tau, *inputs = ctx.saved_tensors
        surrogate, shape, p, stats, scales, shifts = ctx.more
        grad, *inputs = [_flat(x, p) for x in (grad, *inputs)]
        needs, grads = ctx.needs_input_grad, []
        means = [stat[0] if stat and (stat[2] or any(needs[5::3] + needs[6::3])) else None for stat in stats]
        grad, grad_tau, sums = _lif_backward(grad, inputs, scales, shifts, means, v_thr.data, tau.data, surrogate,
                                             needs[3])
        for x, stat, scale, s in zip(inputs, stats, scales, sums):
            mean, rstd, n = stat or (None, None, 0)
            grad_weight = grad_bias = b = c = None
            if s is not None:
                s = _narrow(s, p)
                grad_weight, grad_bias = s[1] * rstd[:shape[2]], s[0]
            if n:   # batch statistics: they depend on x as well
                total = _wide(_sum_over_ranks(s.clone()), p)
                b = -scale * rstd ** 2 * total[1] / n
                c = -scale * total[0] / n - b * mean
            grad_in = _norm_backward(grad.flatten(0, 1).data, x.flatten(0, 1).data, scale, b, c) if stat else grad
            grads += [_unflat(grad_in, shape, p), grad_weight, grad_bias]
        return None, None, None, grad_tau, *grads


def _sum_over_ranks(x):
    """Data-parallel training (torchrun): BatchNorm must see the whole batch, not this process's share."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def _batch_statistics(norm, x, p):
    """BatchNorm's mean, 1 / std [p C] and number of values n per channel (n = 0: running statistics, constants)."""
    mean, var, n = norm.running_mean.clone(), norm.running_var, 0       # a copy: backward must not see later changes
    if norm.training:
        n = x.numel() // norm.num_features * (dist.get_world_size() if dist.is_initialized() else 1)
        offset, square = _sum_over_ranks(_narrow(_moments(x.flatten(0, 1).data, _wide(mean, p)), p)) / n
        var = (square - offset ** 2).clamp(min=0)
        mean = offset + mean
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * n / max(n - 1, 1), norm.momentum)   # PyTorch keeps the unbiased variance
        norm.num_batches_tracked += 1
    return _wide(mean, p), _wide((var + norm.eps).rsqrt(), p), n


def _check(x, norm, shape):
    """Raises ValueError for what the kernels would silently take for something else."""
    if not x.is_floating_point():
        raise ValueError(f"a neuron takes floating point numbers, not {x.dtype}: x.float(), for images x.float() / 255")
    if x.shape != shape:
        raise ValueError(f"the residual {list(x.shape)} must have the shape of the input {list(shape)}")
    if norm is None:
        return
    plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None
    if not plain or norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        raise ValueError("the neuron computes BatchNorm itself, so it must be a plain nn.BatchNorm2d (affine, running "
                         f"statistics, a momentum, no hooks), not {norm}; apply anything else before the neuron")
    if x.dim() != 5 or x.shape[2] != norm.num_features or norm.training and x.numel() <= x.shape[2]:
        raise ValueError(f"{norm} needs [T, B, C, H, W], several values per channel in training; got {list(x.shape)}")


def fused_lif(x_seq, v_thr, tau, surrogate, norm=None, residual=None, residual_norm=None):
    """Spikes of x_seq [T, B, ...]. v_thr, tau: float32 [B]; surrogate: a function of v - v_thr; see LIF.forward."""
    terms = [(x_seq, norm)] if residual is None else [(x_seq, norm), (residual, residual_norm)]
    for x, bn in terms:
        _check(x, bn, x_seq.shape)
    arguments = [p for x, bn in terms for p in (x, bn and bn.weight, bn and bn.bias)]
    with torch.autocast(x_seq.device.type, enabled=False):      # bfloat16 in, float32 inside, bfloat16 out
        return _FusedLIF.apply(surrogate, [bn for _, bn in terms], v_thr, tau, *arguments)
