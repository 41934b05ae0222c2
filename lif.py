"""The spiking neuron (Sec. 3.2, Eq. 1): its definition, its surrogate gradient, its layers.

An ordinary network passes numbers from layer to layer. A spiking network passes SPIKES, zeros and
ones, for a few TIME STEPS, T of them; a number is then how often a neuron spikes. The neuron that
turns currents (what a convolution yields) into spikes is called leaky integrate-and-fire, LIF. It
has one variable, its membrane potential v, which starts at 0:

    charge   v[t] = tau * v[t-1] + x[t]         x: input current; tau: the decay, what is left of v
    fire     s[t] = 1 if v[t] >= v_thr else 0   s: the spike, the output; v_thr: the threshold, > 0
    reset    v[t] = 0 where s[t] = 1            after a spike the neuron starts anew

Eq. 1 writes the charge as a differential equation; this is its form for a step of 1 (tau = 0.5: v
halves per step). No neuron keeps anything between calls: every forward pass starts at rest, v = 0.

    spikes = LIF(v_thr=1.0, tau=0.5)(x_seq)     # [T, B, ...], time first -> spikes [T, B, ...]
    with neurons(model, v_thr=1.15):            # every neuron of the model, until the block ends
        logits = model(images)
"""
import contextlib
from functools import partial

import torch
from torch import nn

from kit.machine import compiled

V_THR_N, TAU_N = 1.0, 0.5       # S_n, the nominal setting (Table 1; Sec. 4.1 prints tau as 0.05)

# ----- The surrogate gradient. A spike is a step function of v: its derivative is 0 almost
# everywhere, so nothing could be learned. In the backward pass, and only there, the derivative is
# replaced by a bump around the threshold: a neuron learns where it nearly fired, or nearly did not.

def triangle(d):
    """ds/dv = max(0, 1 - |d|), for d = v - v_thr of any shape (width 1: as in SEENN and TET).
    # differs from SEENN (Li et al. 2023), which trains with "dspike", and from N-MNIST-Net's source
    # (Abad et al. 2024), which trains with arctan
    """
    return (1 - d.abs()).clamp(min=0)


class Spike(torch.autograd.Function):
    """Step function forward, surrogate gradient backward: d = v - v_thr (any shape) -> 0 or 1."""

    @staticmethod
    def forward(ctx, d):
        ctx.save_for_backward(d)
        return (d >= 0).to(d.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * triangle(ctx.saved_tensors[0])


# ----- The neuron

def step(v, x, v_thr, tau):
    """One time step of all neurons: their potentials v and currents x -> new potentials, spikes."""
    v = tau * v + x                             # charge
    s = Spike.apply(v - v_thr)                  # fire
    return v * (1 - s), s                       # reset


def loop(x_seq, v_thr, tau, step=step):
    """All time steps: x_seq [T, B, ...] -> spikes. v_thr, tau: tensors that fit x_seq[0]."""
    v, spikes = torch.zeros_like(x_seq[0]), []
    for x in x_seq:
        v, s = step(v, x, v_thr, tau)
        spikes.append(s)
    spikes[-1] = s + 0 * v.detach()             # NaN stays NaN: a broken network is no silent one
    return torch.stack(spikes)


fast_loop, fast_step = compiled(loop), compiled(step)       # the same lines, for long trainings


def lif_reference(x_seq, v_thr=V_THR_N, tau=TAU_N):
    """The neuron of Eq. 1 by its definition, differentiated by autograd: x_seq [T, B, ...] ->
    spikes. v_thr and tau: a number, or one value per sample [B]. The reset is part of the gradient
    (as in SEENN; some libraries detach it)."""
    return loop(x_seq, per_sample(v_thr, x_seq), per_sample(tau, x_seq))


class LIF(nn.Module):
    """A layer of leaky integrate-and-fire neurons (Eq. 1): [T, B, ...] -> spikes [T, B, ...].

    v_thr > 0 and tau in [0, 1]: numbers, or tensors [B], one value per sample; else ValueError.
    Both are in the state_dict: a deployed model is weights AND setting."""

    def __init__(self, v_thr=V_THR_N, tau=TAU_N):
        super().__init__()
        check_setting(v_thr, tau)
        self.v_thr, self.tau = v_thr, tau

    def forward(self, x_seq):
        """x_seq: input currents [T, B, ...], floats -> spikes, 0 or 1, same shape and dtype."""
        if x_seq.dim() < 2 or not x_seq.is_floating_point():
            raise ValueError(f"a neuron takes floats [T, B, ...], not {x_seq.dtype} {x_seq.shape}")
        image = x_seq.dim() == 5        # in memory as convolutions like it: channels last
        x = (x_seq.movedim(2, -1) if image else x_seq).float()
        run = fast_loop if len(x) <= 8 else partial(loop, step=fast_step)   # compiling unrolls T
        with torch.autocast(x.device.type, enabled=False):
            s = run(x, per_sample(self.v_thr, x), per_sample(self.decay(), x))
        return (s.movedim(-1, 2) if image else s).to(x_seq.dtype)

    def decay(self):
        return self.tau

    def get_extra_state(self):
        """What state_dict() keeps beside the weights: v_thr and tau, float64 [2], or [2, B]."""
        values = (torch.as_tensor(p, dtype=torch.float64, device="cpu").detach()
                  for p in (self.v_thr, self.decay()))
        return torch.stack(torch.broadcast_tensors(*values))

    def set_extra_state(self, state):
        v_thr, tau = (p if p.dim() else p.item() for p in state)
        check_setting(v_thr, tau)
        self.v_thr, self.tau = v_thr, self.tau if isinstance(self, PLIF) else tau


class PLIF(LIF):
    """LIF whose decay is learned, one per layer: tau = sigmoid(w), at first 0.5 (Fang et al. 2021).
    # differs from Fang et al.: the input is not scaled by 1 - tau, so that at the start PLIF is LIF
    """

    def __init__(self, v_thr=V_THR_N):
        super().__init__(v_thr, TAU_N)
        self.tau = "sigmoid(w)"
        self.w = nn.Parameter(torch.zeros(()))

    def decay(self):
        return self.w.sigmoid()


# ----- The setting of a whole model, and what it does


@contextlib.contextmanager
def neurons(model, v_thr=None, tau=None):
    """Sets v_thr and tau (S_n, S_t, S_a of Sec. 3) of every LIF of a model; restores them on exit
    or exception. Numbers, or tensors [B], one value per sample: one pass can hold both S_n and S_t.
    None leaves a value as it is; a PLIF keeps the tau that it learned. Raises ValueError."""
    check_setting(v_thr, tau)
    layers = [m for m in model.modules() if isinstance(m, LIF)]
    before = [(m.v_thr, m.tau) for m in layers]
    try:
        for m in layers:
            m.v_thr = m.v_thr if v_thr is None else v_thr
            m.tau = m.tau if tau is None or isinstance(m, PLIF) else tau
        yield model
    finally:
        for m, setting in zip(layers, before):
            m.v_thr, m.tau = setting


@torch.no_grad()
def count_spikes(model, x):
    """Spikes per sample [B], summed over T and all neurons (Fig. 2b), in eval mode. x: [B, ...]."""
    total, training = [], model.training
    hooks = [m.register_forward_hook(lambda m, x, s: total.append(s.float().flatten(2).sum((0, 2))))
             for m in model.modules() if isinstance(m, LIF)]
    try:
        model.eval()(x)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return torch.stack(total).sum(0)


def check_setting(v_thr=None, tau=None):
    """Raises ValueError unless v_thr > 0 and tau in [0, 1], constants: numbers or tensors [B]."""
    for name, value, least, most in (("v_thr", v_thr, 1e-9, 1e9), ("tau", tau, 0, 1)):
        p = torch.as_tensor(1 if value is None else value, dtype=torch.float32)
        if p.dim() > 1 or p.requires_grad:
            raise ValueError(f"{name} must be a number, or one per sample [B], without gradient")
        if not ((p >= least) & (p <= most)).all():
            raise ValueError(f"{name} must lie between {least:g} and {most:g}, not {value}")


def per_sample(p, x_seq):
    """A number or a tensor [B] -> float32 tensor [B, 1, ...] that fits x_seq[0]."""
    p, batch = torch.as_tensor(p, dtype=torch.float32, device=x_seq.device), x_seq.shape[1]
    if p.dim() and p.shape[0] not in (1, batch):
        raise ValueError(f"a neuron setting for {p.shape[0]} samples meets a batch of {batch}")
    return p.expand(batch).contiguous().view(-1, *[1] * (x_seq.dim() - 2))
