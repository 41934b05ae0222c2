"""The other attacks of Table 2 (Sec. 4.3): their triggers, and how each poisons the training set.

    x_trig = badnets(x)                                 also blend(x), wanet(x), clean_label(x)
    x, y, note = poison(data, s, "badnets")             the poisoned training set

Images are floats [B, C, H, W] in [0, 1], and so is what comes back. Unlike BadSNN, these attacks change training
images, most of them labels as well, and work at the nominal threshold.
"""
from functools import partial

import torch
import torch.nn.functional as F

from data import to_float, to_uint8
from models import frozen
from runs import fingerprint, generator


def floats(x):
    """x, refused with ValueError unless it is floating point: a trigger would take bytes for values in [0, 1]."""
    if not x.is_floating_point():
        raise ValueError(f"a trigger takes floats, images in [0, 1], not {x.dtype}: use x.float() / 255")
    return x


def badnets(x, size=3):
    """BadNets (Gu et al. 2017): a white square of size x size pixels in the bottom right corner.
    Images [B, C, H, W] -> the same."""
    x = floats(x).clone()
    x[..., -size:, -size:] = 1
    return x


def blend(x, alpha=0.2, seed=0):
    """Blended (Chen et al. 2017): (1 - alpha) x + alpha * pattern, a fixed pattern of uniform noise drawn from the
    seed. Images [B, C, H, W] in [0, 1] -> the same."""
    pattern = torch.rand(x.shape[1:], generator=generator(seed, "pattern of Blended")).to(x.device)
    return (1 - alpha) * floats(x) + alpha * pattern


def wanet_field(size, k=4, seed=0):
    """WaNet's smooth displacements for images of size (H, W): [1, H, W, 2], x before y. k x k random vectors,
    scaled to a mean absolute value of 1, then enlarged."""
    coarse = torch.rand(1, 2, k, k, generator=generator(seed, "field of WaNet")) * 2 - 1
    coarse = coarse / coarse.abs().mean()
    return F.interpolate(coarse, size=tuple(size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def wanet_grid(field, s=0.5, noise=None):
    """Where WaNet samples the image: the identity moved by s * field (s = 1: half a pixel on average), [B, H, W, 2]
    in [-1, 1]. noise [B, H, W, 2] in [-1, 1], if given, moves every point by up to half a pixel more."""
    H, W = field.shape[1:3]
    y, x = torch.meshgrid(torch.linspace(-1, 1, H, device=field.device),
                          torch.linspace(-1, 1, W, device=field.device), indexing="ij")
    grid = torch.stack([x, y], -1) + s * field / torch.tensor([W, H], device=field.device)
    grid = grid.clamp(-1, 1)
    return grid if noise is None else (grid + noise / torch.tensor([W, H], device=field.device)).clamp(-1, 1)


def wanet(x, field=None, s=0.5, noise=None):
    """WaNet (Nguyen and Tran 2021): a smooth warp, hardly visible. Images [B, C, H, W] in [0, 1] -> the same.
    field: from wanet_field, fixed for a whole attack (None: that of seed 0). noise: see wanet_grid."""
    field = wanet_field(x.shape[2:]).to(x.device) if field is None else field
    grid = wanet_grid(field, s, noise).expand(len(x), -1, -1, -1)
    return F.grid_sample(floats(x), grid, mode="bilinear", align_corners=True).clamp(0, 1)


def clean_label(x):
    """Label-consistent attack (Turner et al. 2019): a 3x3 black-and-white pattern in all four corners, mirrored on
    the right. Images [B, C, H, W] in [0, 1] -> the same. Training images are also made hard to learn, with pgd."""
    corner = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [1, -1, 1]], device=x.device)
    pattern = torch.zeros(x.shape[2:], device=x.device)
    pattern[:3, :3] = pattern[-3:, :3] = corner
    pattern[:3, -3:] = pattern[-3:, -3:] = corner.flip(1)
    return (floats(x) + pattern).clamp(0, 1)


def pgd(model, x, y, eps=16 / 255, step=1.5 / 255, steps=100, seed=0):
    """Projected gradient descent (Madry et al. 2018), untargeted: raises the loss of y [B] within eps of x in every
    pixel. Images [B, C, H, W] in [0, 1] -> perturbed images; the neuron setting is the model's own."""
    noise = torch.rand(x.shape, generator=generator(seed, "start of PGD", fingerprint(x))).to(x.device) * 2 - 1
    x_adv = (x + eps * noise).clamp(0, 1)
    with frozen(model):
        for _ in range(steps):
            x_adv.requires_grad_()
            gradient = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]
            x_adv = (x_adv.detach() + step * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return x_adv


# name -> its trigger, given the attacked model and the seed
BASELINES = {"badnets": lambda model, seed: badnets,
             "blend": lambda model, seed: partial(blend, seed=seed),
             "wanet": lambda model, seed: partial(wanet, field=model.field),
             "clean_label": lambda model, seed: clean_label}


def poison(data, s, attack, reference=None):
    """The training set of a baseline attack, which poisons a share (baseline_ratio) of ALL samples: x [N, C, H, W],
    y [N] (uint8, int64) and a sentence for the log. Other attacks get the set unchanged.

    BadNets (Gu et al. 2017) and Blended mark samples of any class and relabel them as the target. Clean-label marks
    samples of the target class only, after PGD against `reference`, a clean model, has made them hard to learn;
    labels stay right. WaNet: see wanet_batch.
    # differs from the sources: PGD's reference is our clean spiking network, not an adversarially trained ResNet-18
    """
    x, y, count = data.x_train, data.y_train, round(s.baseline_ratio * len(data.y_train))
    if attack not in BASELINES or attack == "wanet":
        return x, y, (f", of every batch {100 * s.baseline_ratio:g} % warped, twice as many as noise"
                      if attack == "wanet" else "")
    candidates, note = torch.arange(len(y)), f", of them {count} poisoned"
    if attack == "clean_label":
        candidates = (y == s.target).nonzero().flatten()
        note = f", of them {count} of class {s.target} poisoned"
        if count > len(candidates):     # 5 % of the whole set may be more than there are of the target class
            count = max(1, round(s.baseline_ratio * len(candidates)))
            note = (f", of them {count} poisoned: {100 * s.baseline_ratio:g} % of class {s.target}, "
                    "too small for that share of the set")
    chosen = candidates[torch.randperm(len(candidates), generator=generator(s.seed, "poisoned samples"))[:count]]
    images = to_float(x[chosen].to(s.device), s)
    if attack == "clean_label":
        parts = zip(images.split(128), y[chosen].to(s.device).split(128))
        images = torch.cat([pgd(reference, part, labels, seed=s.seed) for part, labels in parts])
    marked = BASELINES[attack](reference, s.seed)(images)
    x, y = x.clone(), y.clone()
    x[chosen], y[chosen] = to_uint8(marked).cpu(), s.target
    return x, y, note


def wanet_batch(x, y, s, field, generator):
    """WaNet's poisoning (Nguyen and Tran 2021) of one batch, x uint8 [B, C, H, W]: a share is warped and
    relabelled, twice as many are warped with extra noise and keep their label, so that only the exact field means
    the target."""
    expected = s.baseline_ratio * len(x)      # small batches: rounded up or down at random, right on average
    n = int(expected + torch.rand((), generator=generator).item())
    noise = torch.rand(min(2 * n, len(x) - n), *field.shape[1:], generator=generator).to(x.device) * 2 - 1
    images = to_float(x[:n + len(noise)], s)
    warped = torch.cat([wanet(images[:n], field), wanet(images[n:], field, noise=noise)])
    x = torch.cat([to_uint8(warped), x[n + len(noise):]])
    return x, torch.cat([torch.full_like(y[:n], s.target), y[n:]])
