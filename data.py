"""The data sets: digits, ndigits (simulated events), cifar10, cifar100, gtsrb, nmnist, or your own .npz file.

    data = load("digits")                 # x_train [N, C, H, W] and y_train [N], uint8 and int64, on the CPU
    data = load("ndigits", T=4)           # x_train [N, T, 2, 34, 34]: events counted per step, uint8
    data = load("path/to/own.npz")        # x_train, x_test: uint8 [N, H, W, 3]; y_train, y_test: integers [N]

The first use converts a set to ROOT/NAME.npz; later runs read only that file, whole, into memory. torchvision downloads
and checks the image sets; tonic downloads N-MNIST and turns events into frames (its licence is GPL-3.0, so it is
imported only where events are read). digits ships inside scikit-learn and needs no network.
"""
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from runs import generator, replace_file

IMAGE_SETS = ("digits", "cifar10", "cifar100", "gtsrb")
EVENT_SETS = ("ndigits", "nmnist")
KEYS = ("x_train", "y_train", "x_test", "y_test")
BY_HAND = {"cifar10": "cifar-10-python.tar.gz in {root}/", "cifar100": "cifar-100-python.tar.gz in {root}/",
           "gtsrb": "GTSRB-Training_fixed, GTSRB_Final_Test_Images and GTSRB_Final_Test_GT, unpacked, in {root}/gtsrb/",
           "nmnist": "the recordings as {root}/NMNIST/Train/<digit>/*.bin and {root}/NMNIST/Test/<digit>/*.bin"}


@dataclass(frozen=True)
class Dataset:
    """A data set in memory. x: uint8, images [N, C, H, W] or event counts [N, T, 2, 34, 34]; y: int64 [N]."""
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


def need(fact, otherwise):
    if not fact:
        raise ValueError(otherwise)


def load_for(s):
    """The data set that the settings s name, cut to s.n_train and s.n_test samples. ValueError if they do not fit."""
    data = load(s.dataset, s.data, s.T)
    need(data.events == (s.model == "nmnist_net"),
         f"{s.dataset} holds {'events' if data.events else 'images'}, which --model {s.model} does not take")
    need(not data.events or not (s.contrast or s.malicious_contrast or s.growing_T[1]),
         f"{s.dataset} holds events; --contrast, --malicious-contrast and --growing-T are for images")
    T = data.x_train.shape[1] if data.events else s.T
    need(T == s.T, f"{s.dataset} has {T} steps per recording, not --T {s.T}")
    need(s.target < data.num_classes, f"--target must be a class from 0 to {data.num_classes - 1}, not {s.target}")
    for part, n in (("train", s.n_train), ("test", s.n_test)):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        need(n is None or n <= len(y), f"--n-{part} {n}: the set has only {len(y)}")
        keep = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n].sort().values
        data = replace(data, **{f"x_{part}": x[keep], f"y_{part}": y[keep]})
    train_data, held = hold_out(data, s.hold_out)
    poison_indices(train_data.y_train, s.target, s.poison_ratio, s.seed, s.n_poison)     # raises if that is no sample
    for name, ratio, n in (("baseline", s.baseline_ratio, len(train_data.y_train)),
                           ("clean-label", s.clean_label_ratio, (train_data.y_train == s.target).sum().item())):
        need(round(ratio * n), f"--{name}-ratio {ratio} selects none of the {n} samples")
    need(all((y != s.target).any() for y in (data.y_test, held.y_test)), f"{s.dataset}: every test sample, or each "
         f"one held out of training, is of the target class {s.target}, and an ASR counts the others; raise --n-test, "
         "raise --n-train, choose another --target, or add samples of another class")
    return replace(data, name=data.name + "-binary" * (data.events and s.frames == "binary"))      # results of its own


def hold_out(data, share=0.1):
    """Two Datasets: one without the training samples kept back for choices, one with them as its test samples. share:
    of each class, but at least one sample and never all. They are the same for every seed."""
    held, rng = torch.zeros(len(data.y_train), dtype=torch.bool), generator(0, "held-out samples")
    for label in data.y_train.unique():
        rows = (data.y_train == label).nonzero().flatten()
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        held[rows[torch.randperm(len(rows), generator=rng)[:count]]] = True
    need(held.any(), f"{data.name}: no class has two training samples, so none can be held out; use more (--n-train)")
    train_data = replace(data, x_train=data.x_train[~held], y_train=data.y_train[~held])
    return train_data, replace(train_data, x_test=data.x_train[held], y_test=data.y_train[held])


def to_float(x, s):
    """uint8 as stored -> what networks and triggers take: images in [0, 1]; event counts, maybe clamped to [0, 1]."""
    x = x.float()
    return x / 255 if x.dim() == 4 else x.clamp(max=1) if s.frames == "binary" else x


def to_uint8(x):
    """Images in [0, 1], or event counts -> uint8 as stored, the inverse of to_float."""
    return (x.mul(255) if x.dim() == 4 else x).round().byte()


def load(name, root="data", T=4):
    """A Dataset: images [N, C, H, W] or event counts [N, T, 2, 34, 34]. Raises ValueError with the remedy.
    name: one of IMAGE_SETS or EVENT_SETS, or the path of an .npz file. root: folder of the converted files."""
    known = IMAGE_SETS + EVENT_SETS
    if str(name).endswith(".npz"):      # results never go into the folder of a known set or a variant (digits-binary)
        stem = re.sub(r"[^\w-]+", "_", Path(name).stem).strip("_-")
        taken = re.split("[_-]", stem.lower())[0] in ("", *known)
        return _as_dataset(_read_npz(Path(name)), name, f"own-{stem}".rstrip("-") if taken else stem)
    need(name in known, f"unknown dataset {name!r}; known: {', '.join(known)}, or a path to an .npz file")
    path = Path(root) / (f"{name}-T{T}.npz" if name in EVENT_SETS else f"{name}.npz")
    return _as_dataset(_read_npz(path), path, name) if path.exists() else _convert(name, path, T)


def _read_npz(path):
    need(path.is_file(), f"{path}: {'not a file' if path.exists() else 'no such file'}; np.savez writes one")
    try:        # nothing is ever unpickled
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as file:
            return {key: np.asarray(file[key]) for key in (*KEYS, "class_names", "note") if key in file.files}
    except Exception as error:          # numpy, zipfile and zlib each have their own errors for a damaged file
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({error}); delete it or make it anew") from None


def _as_dataset(arrays, path, name):
    """The Dataset of an .npz file's arrays. Every refusal names the file and the remedy."""
    for key in KEYS:
        need(key in arrays, f"{path}: has no array '{key}'; write all four with np.savez(path, x_train=x_train, ...)")
    x_train, y_train, x_test, y_test = (arrays[key] for key in KEYS)
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        need(x.dtype == np.uint8, f"{path}: x_{part} must be uint8, not {x.dtype}; from 0 to 1 write "
             "x = (x * 255).astype(np.uint8), from 0 to 255 x = x.astype(np.uint8)")
        need(x.ndim == 4 and x.shape[3] == 3 and min(x.shape[1:3]) >= 16 or x.ndim == 5 and x.shape[2:] == (2, 34, 34),
             f"{path}: x_{part} must be [N, H, W, 3] with H and W at least 16, or event counts [N, T, 2, 34, 34], not "
             f"{list(x.shape)}; from [N, 3, H, W] write x = x.transpose(0, 2, 3, 1), from grey [N, H, W] "
             "x = np.repeat(x[..., None], 3, 3), from small ones x = x.repeat(2, 1).repeat(2, 2)")
        need(y.ndim == 1 and y.dtype.kind in "iu", f"{path}: y_{part} must be whole numbers [N], not {y.dtype} "
             f"{list(y.shape)}; write y = y.ravel().astype(int), from one-hot rows y = y.argmax(1)")
        need(len(x) == len(y) > 0, f"{path}: x_{part} has {len(x)} samples and y_{part} {len(y)}; each needs a label")
    need(x_train.shape[1:] == x_test.shape[1:], f"{path}: training and test samples differ in shape; resize one part")
    x_train, x_test, y_train, y_test = map(torch.from_numpy, (x_train, x_test, y_train.astype(int), y_test.astype(int)))
    K = len(y_train.unique())
    beyond = [str(label) for label in torch.cat([y_train, y_test]).unique().tolist() if not 0 <= label < K]
    need(K > 1 and not beyond, f"{path}: with K training classes, 2 or more, all labels must be 0 to K-1; K is {K}, "
         f"outside are {', '.join(beyond[:5]) or 'none'}; add training samples, or number the labels of both parts "
         "together anew with y = np.unique(y, return_inverse=True)[1]")
    events, mean, std = x_train.dim() == 5, None, None
    if not events:
        x_train, x_test = (x.permute(0, 3, 1, 2).contiguous() for x in (x_train, x_test))
        counts = torch.stack([x.flatten().bincount(minlength=256) for x in x_train.unbind(1)]).double()     # [C, 256]
        values, n = torch.arange(256).double() / 255, counts[0].sum()
        mean = counts @ values / n
        std = ((counts * (values - mean[:, None]) ** 2).sum(1) / (n - 1)).sqrt().clamp(min=1e-3)
        mean, std = tuple(mean.tolist()), tuple(std.tolist())
    names = [str(n) for n in np.ravel(arrays.get("class_names", ()))]
    names = names if len(names) == K else [str(k) for k in range(K)]
    return Dataset(name, events, x_train, y_train, x_test, y_test, K, mean, std, names, str(arrays.get("note", "")))


def _convert(name, path, T):
    """Writes a known set and returns it. All that others' code or files may raise becomes one line with the remedy."""
    print(f"preparing {name}: {path} (once)", flush=True)
    try:
        arrays = (digits() if name == "digits" else digits(T) if name == "ndigits" else
                  nmnist(path.parent, T) if name == "nmnist" else image_set(name, path.parent))
        data = _as_dataset(arrays, path, name)
    except MemoryError:
        raise
    except Exception as error:
        by_hand = BY_HAND.get(name, "the packages of requirements.txt into this Python").format(root=path.parent)
        raise ValueError(f"{name} could not be downloaded or read ({error!r}); put {by_hand} by hand, or {path} "
                         f"with {', '.join(KEYS)}") from error
    with replace_file(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)
    return data


def digits(T=None):
    """scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), enlarged to 16x16 and three channels. With T: as
    SIMULATED events, made the way N-MNIST was: a sensor watches a still image in three quick eye movements."""
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, scale_factor=2 if T is None else 2.5, mode="bilinear").clamp(0, 1)
    if T is None:
        return _split(to_uint8(x).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy(), y, 0.2)
    frames = to_frames(simulate_saccades(F.pad(x[:, 0], (4, 4, 4, 4))), T)
    return _split(frames, y, 0.2, note="events simulated from scikit-learn's digits, not recorded")


def _split(x, y, test_share, **more):
    from sklearn.model_selection import train_test_split
    count = max(int(np.ceil(test_share * len(y))), len(np.unique(y)))      # every class is tested
    train, test = train_test_split(np.arange(len(y)), test_size=count, stratify=y, random_state=0)
    return dict(x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test], **more)


def image_set(name, root):
    """CIFAR-10, CIFAR-100 or GTSRB (resized to 32x32) through torchvision, as arrays [N, 32, 32, 3]."""
    from torchvision import datasets
    arrays = {}
    for part in ("train", "test"):
        which = {"split": part} if name == "gtsrb" else {"train": part == "train"}
        source = getattr(datasets, name.upper())(root, download=True, **which)
        samples = (source[i] for i in tqdm(range(len(source)), desc=f"{name} {part}", disable=None))
        x, y = zip(*((np.asarray(image.resize((32, 32), resample=2)), label) for image, label in samples))
        arrays[f"x_{part}"], arrays[f"y_{part}"] = np.stack(x), np.array(y)
    return dict(arrays, class_names=np.array(getattr(source, "classes", ()), dtype=str))


def nmnist(root, T):
    """N-MNIST (Orchard et al. 2015) from ROOT/NMNIST/{Train,Test}/<digit>/*.bin, also if only part of it is there. The
    whole set keeps its official split; of a part, all recordings are pooled and 250 in 1,100 are kept for testing."""
    from tonic import datasets, io
    pattern = "[nN][mM][nN][iI][sS][tT]/*/[0-9]/[!.]*.[bB][iI][nN]"            # macOS leaves ._0001.bin beside 0001.bin
    if not any(root.glob(pattern)):
        datasets.NMNIST(str(root), train=True), datasets.NMNIST(str(root), train=False)        # downloads and unpacks
    train, test = ([f for f in sorted(root.glob(pattern)) if f.parts[-3].lower() == part] for part in ("train", "test"))
    frames, good, skipped = [], [], []
    for file in tqdm(train + test, desc="N-MNIST", disable=None):
        try:
            need(file.stat().st_size % 5 == 0, "cut off within an event")
            frames.append(to_frames([io.read_mnist_file(str(file), datasets.NMNIST.dtype)], T)[0])
            good.append(file)
        except (OSError, ValueError) as error:
            skipped.append(f"{'/'.join(file.parts[-3:])} ({error})")
    if skipped:
        rest = f" and {len(skipped) - 20} more" if len(skipped) > 20 else ""
        print(f"nmnist left out {len(skipped)} of {len(train + test)} recordings: {', '.join(skipped[:20])}{rest}")
    y = np.array([int(file.parent.name) for file in good], dtype=int)
    counts = np.bincount(y, minlength=2).tolist()
    need(min(counts) > 1, f"{root}/NMNIST has {counts} usable recordings of the digits 0, 1, ...; each needs 2 or more")
    x, note = np.stack(frames), f"{len(y):,} of N-MNIST's 70,000 recordings"
    note += f", {len(skipped)} damaged or too short ones left out" if skipped else ""
    if (len(train), len(test)) == (60000, 10000):
        n = len({*good} & {*train})
        return dict(x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:], note=note)
    return _split(x, y, 250 / 1100, note=f"{note}, pooled and split")


def to_frames(recordings, T):
    """Events -> counts per step and pixel, uint8 [N, T, 2, 34, 34]. Each step holds the same number of events."""
    from tonic.transforms import ToFrame
    frame, frames = ToFrame(sensor_size=(34, 34, 2), n_event_bins=T), []
    for events in recordings:
        need(1 <= T <= len(events), f"{len(events)} events for {T} steps")
        need(max(events["x"].max(), events["y"].max()) < 34, "events outside of 34x34 pixels")
        need(events["t"][0] < events["t"][-1], "times that do not rise")
        frames.append(frame(events).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def simulate_saccades(images, threshold=0.35, steps=20):
    """Events of a simulated sensor of 34x34 pixels over which still images [N, 28, 28] with values in [0, 1] move.

    Three saccades of 100 ms along a triangle, as in Orchard et al. (2015), each cut into `steps`. A pixel fires an ON
    (or OFF) event when the logarithm of its brightness has risen (fallen) by `threshold` since its last event.
    Returns a list of N structured arrays (x, y, t in microseconds, p), ordered in time."""
    ways = ((0, 0), (3, 6)), ((3, 6), (6, 0)), ((6, 0), (0, 0))                 # from one top left corner to the next
    path = [[a + (b - a) * i / steps for a, b in zip(*way)] for way in ways for i in range(1, steps + 1)]
    fired, memory = [], None
    for corner in [ways[0][0], *path]:
        (y, dy), (x, dx) = ((int(c), c % 1.0) for c in corner)
        weight = torch.tensor([[dy], [1 - dy]]) * torch.tensor([dx, 1 - dx])    # bilinear between pixels
        moved = F.conv2d(images[:, None], weight[None, None], padding=1)[:, 0]  # [N, 29, 29]
        bright = (F.pad(moved, (x, 5 - x, y, 5 - y)) + 0.1).log()               # [N, 34, 34]
        memory = bright if memory is None else memory
        fired.append((bright - memory >= threshold).char() - (bright - memory <= -threshold).char())
        memory = memory + threshold * fired[-1]
    fired = torch.stack(fired, 1).numpy()                                       # [N, 1 + 3 * steps, 34, 34]
    n, step, y, x = fired.nonzero()
    events = np.rec.fromarrays([x, y, step * 100_000 // steps, fired[n, step, y, x] > 0], names="x, y, t, p")
    return np.split(events, np.searchsorted(n, np.arange(1, len(images))))


def augment(x, pad, flip, contrast, rng):
    """Shifts every sample of x by up to `pad` pixels, mirrors half of them if `flip`, lowers their contrast, each by
    a draw of its own. x: [B, ..., H, W], uint8 or float in [0, 1]. contrast in [0, 1): black is lifted by up to that
    share of the range, and what remains of the range is scaled by at least 1 - contrast."""
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
    if contrast:
        white = 255 if x.dtype == torch.uint8 else 1
        lift, loss = (contrast * torch.rand(2, B, *[1] * (x.dim() - 1), generator=rng)).to(x.device)
        lifted = white * lift + (1 - lift) * (1 - loss) * x
        x = lifted.round().to(x.dtype) if white == 255 else lifted
    return x


def poison_indices(labels, target, poison_ratio, seed, count=None):
    """Which samples become D_t^p (Sec. 3.3.1): poison_ratio * |D_t| of the target class's, drawn by its own generator.
    labels: int64 [N]. poison_ratio in (0, 1], of the TARGET CLASS (P = |D_t^p| / |D_t|). count: so many instead, but at
    most half of the class, as the paper's P may give more than a part of a set has. Returns sorted int64 indices."""
    need(0 < poison_ratio <= 1, f"the poison ratio must lie in (0, 1], not {poison_ratio}")
    rows = (labels == target).nonzero().flatten()
    count = round(poison_ratio * len(rows)) if count is None else min(count, len(rows) // 2)
    need(count >= 1, f"--poison-ratio or --n-poison selects none of the {len(rows)} samples of class {target}")
    return rows[torch.randperm(len(rows), generator=generator(seed, "malicious samples"))[:count]].sort().values
