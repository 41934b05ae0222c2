"""The other attacks of Table 2 (Sec. 4.3), and four on events: their triggers, and how each poisons the training set.

Images are floats [B, C, H, W] in [0, 1], event frames are counts [B, T, 2, H, W], and so is what comes back. Unlike
BadSNN, these attacks change training samples, most of them labels as well, and work at the nominal threshold.
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import badsnn
from data import to_float, to_uint8
from kit.files import code_of, fingerprint
from kit.machine import autocast
from kit.training import generator
from models import frozen
from trigger import floats

IMAGE_ATTACKS = ("badnets", "blend", "wanet", "clean_label")
EVENT_ATTACKS = ("static", "moving", "flashy")


def badnets(x):
    """BadNets (Gu et al. 2017): a white square of 3 x 3 pixels in the bottom right corner of x [B, C, H, W]."""
    x = floats(x).clone()
    x[..., -3:, -3:] = 1
    return x


def blend(x, alpha=0.2, seed=0):
    """Blended (Chen et al. 2017): (1 - alpha) x + alpha * a fixed pattern of uniform noise. x: [B, C, H, W]."""
    pattern = torch.rand(x.shape[1:], generator=generator(seed, "pattern of Blended")).to(x.device)
    return (1 - alpha) * floats(x) + alpha * pattern


def wanet_field(size, k=4, seed=0):
    """WaNet's smooth displacements, [1, H, W, 2], x before y: k x k random vectors of mean size 1, enlarged."""
    coarse = torch.rand(1, 2, k, k, generator=generator(seed, "field of WaNet")) * 2 - 1
    coarse = coarse / coarse.abs().mean()
    return F.interpolate(coarse, size=tuple(size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def wanet(x, field=None, s=0.5):
    """WaNet (Nguyen and Tran 2021): a smooth warp of x [B, C, H, W] by a wanet_field (None: that of seed 0). s:
    strength; 1 moves a pixel by half its size on average in each direction."""
    H, W = x.shape[2:]
    field = wanet_field((H, W)) if field is None else field
    identity = F.affine_grid(torch.eye(2, 3)[None], (1, 1, H, W), align_corners=True)
    grid = (identity + s * field.cpu() / torch.tensor([W, H])).clamp(-1, 1).expand(len(x), -1, -1, -1).to(x.device)
    return F.grid_sample(floats(x), grid, mode="bilinear", align_corners=True).clamp(0, 1)


def clean_label(x):
    """Label-consistent attack (Turner et al. 2019): a black-and-white pattern in all corners of x [B, C, H, W]."""
    corner = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [1, -1, 1]], device=x.device)
    pattern = torch.zeros(x.shape[2:], device=x.device)
    pattern[:3, :3] = pattern[-3:, :3] = corner
    pattern[:3, -3:] = pattern[-3:, -3:] = corner.flip(1)
    return (floats(x) + pattern).clamp(0, 1)


def pgd(model, x, y, eps=16 / 255, step=1.5 / 255, steps=100, seed=0):
    """Projected gradient descent (Madry et al. 2018): raises the loss of y [B] within eps of x [B, C, H, W]."""
    noise = torch.rand(x.shape, generator=generator(seed, "start of PGD", fingerprint(x))).to(x.device) * 2 - 1
    x_adv = (x + eps * noise).clamp(0, 1)
    with frozen(model):
        for _ in range(steps):
            x_adv.requires_grad_()
            gradient = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]
            x_adv = (x_adv.detach() + step * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return x_adv


# ----- Attacks on events. Frames hold counts [B, T, 2, H, W], OFF before ON. A trigger REPLACES what an area holds.

def stamp(frames, corners, size=3):
    """One ON event in every pixel of a square of size x size on frames [B, T, 2, H, W], in the steps of corners
    {t: (y, x) of its upper left}."""
    frames = floats(frames).clone()
    for t, (y, x) in corners.items():
        frames[:, t, :, y:y + size, x:x + size] = frames.new_tensor([0, 1]).view(2, 1, 1)
    return frames


def static(frames):
    """Sneaky Spikes (Abad et al. 2024), static: a square of ON events, upper left, in every step of [B, T, 2, H, W]."""
    return stamp(frames, {t: (0, 0) for t in range(frames.shape[1])})


def moving(frames):
    """Sneaky Spikes (Abad et al. 2024), moving: that square jumps right twice, then starts anew. [B, T, 2, H, W]."""
    return stamp(frames, {t: (0, t % 3 * 5) for t in range(frames.shape[1])})


def flashy(frames):
    """Flashy Backdoor (Riano et al. 2024): a strobe, one ON event in every pixel of [B, T, 2, H, W] at t = 0, 2, ..."""
    return stamp(frames, {t: (0, 0) for t in range(0, frames.shape[1], 2)}, size=max(frames.shape[3:]))


def train(data, s, attack):
    """A network attacked by one of IMAGE_ATTACKS or EVENT_ATTACKS."""
    # without loss of contrast, which would hide a faint mark; WaNet without shifts, whose border it would bend
    reference = badsnn.train(data, replace(s, fresh=False)) if attack == "clean_label" else None
    s = replace(s, contrast=0.0, malicious_contrast=None, pad=0 if attack == "wanet" else s.pad)
    return badsnn.train(data, s, poison=Poison(attack, data, s, reference))


def trigger_of(attack, data, s):
    """The trigger of an attack, a function of a batch."""
    if attack == "wanet":       # stronger where there are many classes: at 2 CIFAR-100's networks do not learn it
        field = wanet_field(data.x_train.shape[2:], seed=s.seed)
        return partial(wanet, field=field, s=4.0 if data.num_classes >= 100 else 2.0)
    return dict(badnets=badnets, blend=partial(blend, seed=s.seed), clean_label=clean_label, static=static,
                moving=moving, flashy=flashy)[attack]


class Poison:
    """How one attack poisons a training set (badsnn.train calls both methods). BadNets and Blended mark 5 % of ALL
    samples, the attacks on events 10 %, and relabel them as the target. Clean-label marks 80 % of the TARGET CLASS,
    made hard to learn by PGD against `reference`, a clean model; labels stay right. WaNet marks 10 % of every batch."""
    # differs from the paper, which poisons 5 % for all; from clean-label's source, whose reference is robust

    def __init__(self, attack, data, s, reference=None):
        self.name, self.s, self.reference, self.trigger = attack, s, reference, trigger_of(attack, data, s)
        self.decides = [attack, code_of("lab/baselines.py"), fingerprint(reference)]

    def samples(self, data):
        """x [N, ...] (uint8), y [N] and who is marked [N], before training."""
        x, y, s, marked = data.x_train, data.y_train, self.s, torch.zeros(len(data.y_train), dtype=torch.bool)
        if self.name == "wanet":
            return x, y, marked
        rows, share = torch.arange(len(y)), 0.1 if data.events else 0.05
        if self.name == "clean_label":
            x, rows, share = x.clone(), (y == s.target).nonzero().flatten(), 0.8
        order = torch.randperm(len(rows), generator=generator(s.seed, "poisoned samples"))
        chosen = rows[order[:max(1, round(share * len(rows)))]]
        marked[chosen] = True
        for part in chosen.split(128) if self.name == "clean_label" else ():
            with autocast(s):
                hard = pgd(self.reference, to_float(x[part].to(s.device), s), y[part].to(s.device), seed=s.seed)
            x[part] = to_uint8(hard).cpu()
        return x, y.where(~marked, s.target), marked

    def batch(self, x, y, marked, rng):
        """Puts the trigger on the marked samples of a batch x [B, ...] (uint8); returns x, y [B], marked [B]."""
        # differs from the sources: the mark comes after the shifts, so it sits where the test puts it
        x = x.clone()
        if self.name == "wanet":        # small batches: rounded up or down at random, right on average
            n = int(0.1 * len(x) + torch.rand((), generator=rng).item())
            marked = torch.arange(len(x), device=x.device) < n
            y = y.where(~marked, self.s.target)
        x[marked] = to_uint8(self.trigger(to_float(x[marked], self.s)))
        return x, y, marked
