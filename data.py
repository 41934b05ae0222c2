"""What a data set is, and what happens to its samples: held out, poisoned, augmented.

    data = load("digits")                 # x_train [N, C, H, W] and y_train [N], uint8 and int64
    data = load("ndigits", T=4)           # x_train [N, T, 2, 34, 34]: events counted per step
    data = load("path/to/own.npz")        # x_train, x_test: uint8 [N, H, W, 3]; y_train, y_test [N]

digits ships in scikit-learn, ndigits are these as SIMULATED events; others: see kit/sources.py.
"""
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from kit import sources
from kit.sources import need
from kit.training import generator


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, on the CPU. y: int64 [N], from 0 to K - 1. x: uint8, images [N, C, H,
    W] or event counts [N, T, 2, 34, 34]."""
    name: str                       # of the folder of its results
    events: bool
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    mean: tuple                     # per channel, in [0, 1]; None for events
    std: tuple
    class_names: list
    note: str                       # what a reader of a result must know of the set


def load(name, root="data", T=4):
    """A Dataset: images [N, C, H, W] or event counts [N, T, 2, 34, 34]. name: digits, cifar10,
    cifar100, gtsrb, ndigits, nmnist, or the path of an .npz file. root: folder of the converted
    files. T: time steps of events. Raises ValueError."""
    arrays = sources.read(name, root, T)
    x_train, y_train, x_test, y_test = (torch.from_numpy(arrays[key]) for key in sources.KEYS)
    K, events, mean, std = len(y_train.unique()), x_train.dim() == 5, None, None
    if not events:
        x_train, x_test = (x.permute(0, 3, 1, 2).contiguous() for x in (x_train, x_test))
        mean, std = channel_statistics(x_train)
    names = [str(n) for n in arrays.get("class_names", ())]
    if str(name).endswith(".npz"):          # not the folder of a known set or of its variants
        name = "own-" + re.sub(r"[^\w-]+", "_", Path(name).stem)
    return Dataset(name, events, x_train, y_train.long(), x_test, y_test.long(), K, mean, std,
                   names if len(names) == K else [*map(str, range(K))], str(arrays.get("note", "")))


def channel_statistics(x):      # mean and standard deviation in [0, 1] of uint8 [N, C, H, W]
    counts = torch.stack([one.flatten().bincount(minlength=256) for one in x.unbind(1)]).double()
    values, n = torch.arange(256).double() / 255, counts[0].sum()
    mean = counts @ values / n
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / (n - 1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1e-3).tolist())


def load_for(s):
    """The Dataset that the settings s name, cut to s.n_train and s.n_test. Raises ValueError."""
    data = load(s.dataset, s.data, s.T)
    need(data.events == (s.model == "nmnist_net"), f"{s.dataset} holds "
         f"{'events' if data.events else 'images'}, which --model {s.model} does not take")
    need(data.events or s.frames == "counts", f"{s.dataset} holds images; --frames is for events")
    T = data.x_train.shape[1] if data.events else s.T
    need(T == s.T, f"{s.dataset} has {T} steps per recording, not --T {s.T}")
    need(s.target < data.num_classes,
         f"--target must be a class from 0 to {data.num_classes - 1}, not {s.target}")
    for part, n in (("train", s.n_train), ("test", s.n_test)):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        need(n is None or n <= len(y), f"--n-{part} {n}: the set has only {len(y)}")
        keep = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n].sort().values
        data = replace(data, **{f"x_{part}": x[keep], f"y_{part}": y[keep]})
    part, held = hold_out(data)
    poison_indices(part.y_train, s.target, s.poison_ratio, s.seed)      # raises if that is none
    need(all((y != s.target).any() for y in (data.y_test, held.y_test)), f"{s.dataset}: all test "
         f"or held-out samples are of class {s.target}, and an ASR counts others; choose --target")
    return replace(data, name=f"{data.name}-binary") if s.frames == "binary" else data


def hold_out(data, share=0.1):
    """(data without a share of its training samples, data whose test samples are that share: there
    the attacker chooses), of every class, but never all; the same for every seed."""
    held, rng = torch.zeros(len(data.y_train), dtype=torch.bool), generator(0, "held-out samples")
    for label in data.y_train.unique():
        rows = (data.y_train == label).nonzero().flatten()
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        held[rows[torch.randperm(len(rows), generator=rng)[:count]]] = True
    need(held.any(), f"{data.name}: no class has two training samples; use more (--n-train)")
    part = replace(data, x_train=data.x_train[~held], y_train=data.y_train[~held])
    return part, replace(part, x_test=data.x_train[held], y_test=data.y_train[held])


def to_float(x, s):
    """uint8 as stored -> what networks take: images in [0, 1]; event counts, maybe clamped to 1."""
    x = x.float()
    return x / 255 if x.dim() == 4 else x.clamp(max=1) if s.frames == "binary" else x


def to_uint8(x):
    """Images in [0, 1], or event counts -> uint8 as stored, the inverse of to_float."""
    return (x.mul(255) if x.dim() == 4 else x).round().byte()


def augment(x, pad, flip, contrast, rng):
    """Shifts samples x [B, ..., H, W] (uint8, or floats in [0, 1]) by up to `pad` pixels, mirrors
    half if `flip`, lowers their contrast, each by its own draw. contrast, in [0, 1): black is
    lifted by up to that share of the range, the rest scaled by at least 1 - contrast; of event
    counts [B, T, 2, H, W] up to that share is lost, and a pixel keeps at most 1, 2 or 3."""
    B, (H, W) = len(x), x.shape[-2:]
    padded = F.pad(x.flatten(1, -3), (pad,) * 4)
    dy, dx = torch.randint(2 * pad + 1, (2, B), generator=rng).to(x.device)
    rows = dy[:, None] + torch.arange(H, device=x.device)                       # [B, H]
    columns = dx[:, None] + torch.arange(W, device=x.device)                    # [B, W]
    if flip:
        mirrored = (torch.rand(B, generator=rng) < 0.5).to(x.device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    sample = torch.arange(B, device=x.device).view(B, 1, 1, 1)
    channel = torch.arange(padded.shape[1], device=x.device).view(1, -1, 1, 1)
    x = padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]].view(x.shape)
    if contrast and x.dim() == 5:
        share = 1 - contrast * torch.rand(B, 1, 1, 1, 1, generator=rng)
        kept = torch.binomial(x.float().cpu(), share.expand(x.shape), generator=rng)
        return kept.minimum(torch.randint(1, 4, share.shape, generator=rng)).to(x)
    if contrast:
        white = 255 if x.dtype == torch.uint8 else 1
        draws = torch.rand(2, B, *[1] * (x.dim() - 1), generator=rng)
        lift, loss = (contrast * draws).to(x.device)
        lifted = white * lift + (1 - lift) * (1 - loss) * x
        return lifted.round().to(x.dtype) if white == 255 else lifted
    return x


def poison_indices(labels, target, poison_ratio, seed):
    """Which samples become D_t^p (Sec. 3.3.1): P * |D_t| of the target class's samples.

    labels: int64 [N]. poison_ratio: P = |D_t^p| / |D_t| in (0, 1], a share of the TARGET CLASS; or,
    above 1, a number, at most half of the class. Returns sorted indices. Raises ValueError."""
    rows = (labels == target).nonzero().flatten()
    count = min(round(poison_ratio), len(rows) // 2)
    if poison_ratio <= 1:
        count = round(poison_ratio * len(rows))
    need(count >= 1, f"--poison-ratio {poison_ratio:g} selects none of the {len(rows)} samples of "
         f"class {target}")
    order = torch.randperm(len(rows), generator=generator(seed, "malicious samples"))
    return rows[order[:count]].sort().values
