"""The data sets: digits, ndigits (simulated events), cifar10, cifar100, gtsrb, nmnist, or your own .npz file.

    data = load("digits")                 # x_train [N, C, H, W] and y_train [N], uint8 and int64, on the CPU
    data = load("ndigits", T=4)           # x_train [N, T, 2, 34, 34]: events counted per step, uint8
    data = load("path/to/own.npz")        # x_train, x_test: uint8 [N, H, W, 3]; y_train, y_test: integers [N]

The first use converts a set to ROOT/NAME.npz; later runs read only that file, whole, into memory. torchvision downloads
and checks the image sets; tonic downloads N-MNIST and turns events into frames (its licence is GPL-3.0, so it is
imported only where events are read). digits ships inside scikit-learn and needs no network.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from runs import replace_file

IMAGE_SETS = ("digits", "cifar10", "cifar100", "gtsrb")
EVENT_SETS = ("ndigits", "nmnist")
SENSOR = (34, 34, 2)                                       # N-MNIST's: width, height, polarities
KEYS = ("x_train", "y_train", "x_test", "y_test")
BY_HAND = {"cifar10": "cifar-10-python.tar.gz in {root}/", "cifar100": "cifar-100-python.tar.gz in {root}/",
           "gtsrb": "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip, unpacked, in {root}/gtsrb/",
           "nmnist": "the recordings as {root}/NMNIST/Train/<digit>/*.bin and {root}/NMNIST/Test/<digit>/*.bin"}


@dataclass(frozen=True)
class Dataset:
    """A data set in memory. x_train, x_test: uint8, images [N, C, H, W] or event counts [N, T, 2, 34, 34]; y_train, y_test: int64 [N]."""
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


def load_for(s):
    """The data set that the settings s name, cut to s.n_train and s.n_test samples. Raises ValueError where data and settings do not
    fit."""
    data = load(s.dataset, s.data, s.T)
    if data.events != (s.model == "nmnist_net"):
        holds, takes = ("events", "images") if data.events else ("images", "events")
        raise ValueError(f"{s.dataset} holds {holds}; --model {s.model} takes {takes}")
    if data.events and data.x_train.shape[1] != s.T:
        raise ValueError(f"{s.dataset} has {data.x_train.shape[1]} steps per recording, not --T {s.T}")
    if s.target >= data.num_classes:
        raise ValueError(f"--target must be a class from 0 to {data.num_classes - 1}, not {s.target}")
    for part, n in (("train", s.n_train), ("test", s.n_test)):
        if n is not None:
            x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
            if n > len(y):
                raise ValueError(f"--n-{part} {n}: the set has only {len(y)}")
            keep = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n].sort().values
            data = replace(data, **{f"x_{part}": x[keep], f"y_{part}": y[keep]})
    poison_indices(data.y_train, s.target, s.poison_ratio, s.seed)      # raises if that is no sample
    if round(s.baseline_ratio * len(data.y_train)) < 1:
        raise ValueError(f"--baseline-ratio {s.baseline_ratio} selects none of the {len(data.y_train)} training samples")
    if data.events and s.frames == "binary":
        data = replace(data, name=f"{data.name}-binary")                # results and checkpoints of its own
    return data


def to_float(x, s):
    """uint8 as stored -> what networks and triggers take: images in [0, 1]; event counts as they are, or clamped to [0, 1]."""
    if x.dim() == 4:
        return x.float() / 255
    return x.float().clamp(max=1) if s.frames == "binary" else x.float()


def to_uint8(x):
    """Images in [0, 1] -> uint8 as stored, the inverse of to_float."""
    return x.mul(255).round().byte()


def load(name, root="data", T=4, seed=0):
    """Loads a data set into memory, converting it first if need be.

    name: one of IMAGE_SETS or EVENT_SETS, or the path of an .npz file. root: folder of the converted files.
    T: steps per recording (event sets only). seed: of the split, where a set has no official one.
    Returns a Dataset: x_train and x_test are images [N, C, H, W] or event counts [N, T, 2, 34, 34]. Raises ValueError with the remedy.
    """
    path = Path(name) if str(name).endswith(".npz") else None
    if path is None:
        if name not in IMAGE_SETS + EVENT_SETS:
            raise ValueError(f"unknown dataset {name!r}; known: {', '.join(IMAGE_SETS + EVENT_SETS)}, or a path to an .npz file")
        if T < 1:
            raise ValueError(f"T must be at least 1, not {T}")
        path = Path(root) / (f"{name}-T{T}.npz" if name in EVENT_SETS else f"{name}.npz")
        if not path.exists():
            print(f"preparing {name}: {path} (once)", flush=True)
            arrays = _convert(name, Path(root), T, seed)
            with replace_file(path) as part, open(part, "wb") as file:
                np.savez(file, **arrays)
    return _as_dataset(path, str(name))


def _as_dataset(path, name):
    arrays = _read_npz(path)
    for key in KEYS:
        if key not in arrays:
            raise ValueError(f"{path}: has no array '{key}'; needed are {', '.join(KEYS)}")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        events = x.ndim == 5
        if x.dtype != np.uint8:
            raise ValueError(f"{path}: x_{part} must be uint8, not {x.dtype}")
        if not (x.ndim == 4 and x.shape[3] == 3 and min(x.shape[1:3]) >= 16) and not (events and x.shape[2:] == (2, 34, 34)):
            raise ValueError(f"{path}: x_{part} must be [N, H, W, 3] with H and W of at least 16 "
                             f"(or event counts [N, T, 2, 34, 34]), not {list(x.shape)}")
        if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
            raise ValueError(f"{path}: y_{part} must be whole numbers [N], not {y.dtype} {list(y.shape)}")
        if len(x) != len(y) or not len(x):
            raise ValueError(f"{path}: x_{part} has {len(x)} samples and y_{part} has {len(y)}")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ValueError(f"{path}: training and test samples differ in shape")
    y_train, y_test = arrays["y_train"].astype(np.int64), arrays["y_test"].astype(np.int64)
    num_classes = int(y_train.max()) + 1
    if y_train.min() < 0 or y_test.min() < 0 or y_test.max() >= num_classes or num_classes < 2:
        raise ValueError(f"{path}: labels must run from 0 to K-1 with K >= 2, and the test set may hold no class that training lacks")
    x_train, x_test = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["x_test"])
    mean = std = None
    if not events:
        x_train, x_test = (x.permute(0, 3, 1, 2).contiguous() for x in (x_train, x_test))
        pixels = x_train.transpose(0, 1).flatten(1).double().div(255)         # [C, N * H * W]
        mean, std = tuple(pixels.mean(1).tolist()), tuple(pixels.std(1).clamp(min=1e-3).tolist())
    names = arrays.get("class_names")
    names = [str(n) for n in names] if names is not None and len(names) == num_classes else [str(k) for k in range(num_classes)]
    return Dataset(name=Path(name).stem, events=events, x_train=x_train, y_train=torch.from_numpy(y_train), x_test=x_test,
                           y_test=torch.from_numpy(y_test), num_classes=num_classes, mean=mean, std=std, class_names=names,
                           note=str(arrays.get("note", "")))


def _read_npz(path):
    """Every array of an .npz file; nothing is ever unpickled."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except Exception as error:      # numpy, zipfile and zlib each have their own errors for a damaged file
        raise ValueError(f"{path}: not a readable .npz file of plain arrays ({error}); delete it or make it anew") from None


def _convert(name, root, T, seed):
    if name == "digits":
        return digits(seed)
    if name == "ndigits":
        return ndigits(T, seed)
    try:
        return nmnist(root, T, seed) if name == "nmnist" else image_set(name, root)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{name} could not be downloaded or read ({reason}); put "
                         f"{BY_HAND[name].format(root=root)} by hand, or {root / name}.npz with {', '.join(KEYS)}") from None


def digits(seed=0, size=16):
    """scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), enlarged to 16x16 and three equal channels; 80 % train."""
    x, y = _small_digits(size)
    x = x.mul(255).round().byte().unsqueeze(-1).expand(-1, -1, -1, 3).numpy()
    return _split(x, y, 0.2, seed)


def _small_digits(size):
    """Grey images [N, size, size] in [0, 1] and labels [N]."""
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16
    return F.interpolate(x, size=(size, size), mode="bilinear").clamp(0, 1)[:, 0], y


def _split(x, y, test_share, seed, **more):
    from sklearn.model_selection import train_test_split
    train, test = train_test_split(np.arange(len(y)), test_size=test_share, stratify=y, random_state=seed)
    return dict(x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test], **more)


def image_set(name, root):
    """CIFAR-10, CIFAR-100 or GTSRB (resized to 32x32) through torchvision, as arrays [N, 32, 32, 3]."""
    from torchvision import datasets
    arrays = {}
    for part in ("train", "test"):
        if name == "gtsrb":
            source = datasets.GTSRB(root, split=part, download=True)
            images = (np.asarray(image.resize((32, 32), resample=2)) for image, _ in tqdm(source, desc=f"gtsrb {part}", disable=None))
            arrays[f"x_{part}"] = np.stack(list(images))
            arrays[f"y_{part}"] = np.array([label for _, label in source._samples])
        else:
            source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, train=part == "train", download=True)
            arrays[f"x_{part}"], arrays[f"y_{part}"] = source.data, np.array(source.targets)
            arrays["class_names"] = np.array(source.classes)
    return arrays


def nmnist(root, T, seed=0):
    """N-MNIST (Orchard et al. 2015) from ROOT/NMNIST/{Train,Test}/<digit>/*.bin, also when only part of it is there.

    The whole set keeps its official split; of a part, all recordings are pooled and 250 in 1,100 are kept for testing.
    """
    from tonic.datasets import NMNIST
    from tonic.io import read_mnist_file
    folder = root / "NMNIST"
    if not any(folder.glob("*/*/*.bin")):
        NMNIST(str(root), train=True), NMNIST(str(root), train=False)          # downloads and unpacks
    frames, labels = {}, {}
    for part in ("Train", "Test"):
        files = sorted(folder.glob(f"{part}/[0-9]/*.bin"))
        labels[part] = np.array([int(file.parent.name) for file in files], dtype=np.int64)
        events = (read_mnist_file(str(file), NMNIST.dtype) for file in tqdm(files, desc=f"N-MNIST {part}", disable=None))
        frames[part] = to_frames(events, T)
    if (len(labels["Train"]), len(labels["Test"])) == (60000, 10000):
        return dict(x_train=frames["Train"], y_train=labels["Train"], x_test=frames["Test"], y_test=labels["Test"])
    x, y = (np.concatenate([part["Train"], part["Test"]]) for part in (frames, labels))
    return _split(x, y, 250 / 1100, seed, note=f"{len(y):,} of N-MNIST's 70,000 recordings, pooled and split")


def to_frames(recordings, T):
    """Events -> counts per step and pixel, uint8 [N, T, 2, 34, 34]. Each step holds the same number of events."""
    from tonic.transforms import ToFrame
    frame = ToFrame(sensor_size=SENSOR, n_event_bins=T)
    return np.stack([frame(events).clip(0, 255).astype(np.uint8) for events in recordings])


def ndigits(T, seed=0):
    """digits as SIMULATED events, made the way N-MNIST was: a sensor watches a still image in three quick eye movements."""
    x, y = _small_digits(20)
    frames = to_frames(simulate_saccades(F.pad(x, (4, 4, 4, 4))), T)
    return _split(frames, y, 0.2, seed, note="events simulated from scikit-learn's digits, not recorded")


def simulate_saccades(images, threshold=0.35, steps=20):
    """Events of a simulated sensor of 34x34 pixels that moves over still images [N, 28, 28] with values in [0, 1].

    Three saccades of 100 ms along a triangle, as in Orchard et al. (2015), each cut into `steps`. A pixel fires an ON
    (or OFF) event when the logarithm of its brightness has risen (fallen) by `threshold` since its last event.
    Returns a list of N structured arrays (x, y, t in microseconds, p), ordered in time.
    """
    corners = [(0, 0), (3, 6), (6, 0), (0, 0)]                                  # top left corner of the image, in pixels
    path = [tuple(a + (b - a) * i / steps for a, b in zip(p, q)) for p, q in zip(corners, corners[1:]) for i in range(1, steps + 1)]
    memory = _brightness(images, corners[0])
    found = []                                                                  # columns: image, step, y, x, polarity
    for step, corner in enumerate(path):
        change = _brightness(images, corner) - memory
        fired = (change >= threshold).int() - (change <= -threshold).int()
        memory += threshold * fired
        n, y, x = fired.nonzero(as_tuple=True)
        found.append(torch.stack([n, torch.full_like(n, step), y, x, (fired[n, y, x] > 0).long()]))
    found = torch.cat(found, 1).numpy()
    found = found[:, np.lexsort((found[1], found[0]))]
    events = np.zeros(found.shape[1], dtype=[("x", int), ("y", int), ("t", int), ("p", int)])
    events["x"], events["y"], events["p"] = found[3], found[2], found[4]
    events["t"] = (found[1] + 1) * 100_000 // steps
    return np.split(events, np.searchsorted(found[0], np.arange(1, len(images))))


def _brightness(images, corner):
    """log brightness [N, 34, 34] of the images with their top left corner at (y, x), bilinear between pixels."""
    (y, dy), (x, dx) = (divmod(c, 1) for c in corner)
    kernel = torch.tensor([[1.0 - dy], [dy]]) * torch.tensor([[1.0 - dx, dx]])                      # [2, 2]
    shifted = F.conv2d(images.unsqueeze(1), kernel.flip(0, 1).view(1, 1, 2, 2), padding=1)[:, 0]   # [N, 29, 29]
    canvas = torch.zeros(len(images), SENSOR[1] + 1, SENSOR[0] + 1)
    canvas[:, int(y):int(y) + 29, int(x):int(x) + 29] = shifted
    return (canvas[:, :SENSOR[1], :SENSOR[0]] + 0.1).log()


def augment(x, pad, flip, contrast, generator):
    """Random shift by up to `pad` pixels, mirroring if `flip`, and less contrast if `contrast` > 0: [B, ..., H, W], one draw per sample.

    contrast in [0, 1): black is lifted by up to that share of the whole range, and what remains of the range is scaled by at least
    1 - contrast. x: uint8 in 0..255 or float in [0, 1].
    """
    B, (H, W) = len(x), x.shape[-2:]
    padded = F.pad(x.flatten(1, -3), (pad,) * 4)
    dy, dx = torch.randint(2 * pad + 1, (2, B), generator=generator).to(x.device)
    rows = dy[:, None] + torch.arange(H, device=x.device)                       # [B, H]
    columns = dx[:, None] + torch.arange(W, device=x.device)                    # [B, W]
    if flip:
        mirrored = (torch.rand(B, generator=generator) < 0.5).to(x.device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    sample = torch.arange(B, device=x.device).view(B, 1, 1, 1)
    channel = torch.arange(padded.shape[1], device=x.device).view(1, -1, 1, 1)
    x = padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]].view(x.shape)
    if contrast:
        white = 255 if x.dtype == torch.uint8 else 1
        lift, loss = (contrast * torch.rand(2, B, *[1] * (x.dim() - 1), generator=generator)).to(x.device)
        lifted = white * lift + (1 - lift) * (1 - loss) * x
        x = lifted.round().to(x.dtype) if white == 255 else lifted
    return x


def poison_indices(labels, target, poison_ratio, seed):
    """Which samples become D_t^p (Sec. 3.3.1): poison_ratio * |D_t| of the target class's, drawn by their own generator.

    labels: int64 [N]. poison_ratio in (0, 1], of the TARGET CLASS (P = |D_t^p| / |D_t|). Returns sorted int64 indices.
    Raises ValueError if that is no sample.
    """
    if not 0 < poison_ratio <= 1:
        raise ValueError(f"the poison ratio must lie in (0, 1], not {poison_ratio}")
    candidates = (labels == target).nonzero().flatten()
    count = round(poison_ratio * len(candidates))
    if count < 1:
        raise ValueError(f"a poison ratio of {poison_ratio} selects none of the {len(candidates)} samples of class {target}")
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return candidates[order[:count]].sort().values
