"""Where the data sets come from, as plain arrays: x_train, x_test uint8 [N, H, W, 3] or event counts [N, T, 2, 34, 34],
y_train, y_test [N], class_names, note. The first use converts a set to ROOT/NAME.npz; later runs read only that file.
torchvision and tonic download and check; tonic (GPL-3.0) is imported only where events are read."""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from kit.files import replace_file

IMAGE_SETS = ("digits", "cifar10", "cifar100", "gtsrb")
EVENT_SETS = ("ndigits", "nmnist")
KEYS = ("x_train", "y_train", "x_test", "y_test")
BY_HAND = {"cifar10": "cifar-10-python.tar.gz in {root}/", "cifar100": "cifar-100-python.tar.gz in {root}/",
           "gtsrb": "GTSRB-Training_fixed, GTSRB_Final_Test_Images and GTSRB_Final_Test_GT, unpacked, in {root}/gtsrb/",
           "nmnist": "the recordings as {root}/NMNIST/Train/<digit>/*.bin and {root}/NMNIST/Test/<digit>/*.bin"}


def need(fact, otherwise):
    if not fact:
        raise ValueError(otherwise)


def read(name, root, T):
    """The arrays of a set by its name, converted once, or of an .npz file. Raises ValueError with the remedy."""
    if str(name).endswith(".npz"):
        return checked(read_npz(Path(name)), name)
    known = IMAGE_SETS + EVENT_SETS
    need(name in known, f"unknown dataset {name!r}; known: {', '.join(known)}, or a path to an .npz file")
    path = Path(root) / (f"{name}-T{T}.npz" if name in EVENT_SETS else f"{name}.npz")
    return checked(read_npz(path), path) if path.exists() else convert(name, path, T)


def read_npz(path):
    need(path.is_file(), f"{path}: no such file; np.savez writes one")
    try:        # nothing is ever unpickled
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as file:
            return {key: np.asarray(file[key]) for key in (*KEYS, "class_names", "note") if key in file.files}
    except Exception as error:          # numpy, zipfile and zlib each have their own errors for a damaged file
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({error}); delete it or make it anew") from None


def checked(arrays, path):
    """The arrays of a file whose data can be used. Every refusal names the file and the remedy."""
    for key in KEYS:
        need(key in arrays, f"{path}: has no array '{key}'; write all four with np.savez(path, x_train=x_train, ...)")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        images = x.ndim == 4 and x.shape[3] == 3 and min(x.shape[1:3]) >= 16
        events = x.ndim == 5 and x.shape[2:] == (2, 34, 34)
        need(images or events, f"{path}: x_{part} must be [N, H, W, 3] with H and W at least 16, or event counts "
             f"[N, T, 2, 34, 34], not {list(x.shape)}; see np.transpose, and np.repeat for grey images")
        need(x.dtype == np.uint8 and (events or x.size == 0 or x.max() > 1), f"{path}: x_{part} must be uint8, 0 to "
             f"255, not {x.dtype}, nor floats in [0, 1] that were cast: (x * 255).astype(np.uint8) makes it of these")
        need(y.ndim == 1 and y.dtype.kind in "iu", f"{path}: y_{part} must be whole numbers [N], not {y.dtype} "
             f"{list(y.shape)}; write y.ravel().astype(int), from one-hot rows y.argmax(1)")
        need(len(x) == len(y) > 0, f"{path}: x_{part} has {len(x)} samples and y_{part} {len(y)}; each needs a label")
    need(arrays["x_train"].shape[1:] == arrays["x_test"].shape[1:], f"{path}: x_train and x_test differ in shape")
    labels, wanted = np.unique(arrays["y_train"]).tolist(), np.unique(arrays["y_test"]).tolist()
    need(labels == list(range(max(2, len(labels)))) and {*wanted} <= {*labels}, f"{path}: all labels must be 0 to K - "
         f"1, K > 1 classes trained on, not {labels[:9]} and {wanted[:9]}; np.unique(y, return_inverse=True) orders")
    return arrays


def convert(name, path, T):
    """Writes a known set and returns it. Whatever others' code raises becomes one line with the remedy."""
    print(f"preparing {name}: {path} (once)", flush=True)
    makers = dict(digits=digits, ndigits=lambda: digits(T), nmnist=lambda: nmnist(path.parent, T))
    try:
        arrays = checked(makers[name]() if name in makers else image_set(name, path.parent), path)
    except Exception as error:
        by_hand = BY_HAND.get(name, "the packages of requirements.txt into this Python").format(root=path.parent)
        raise ValueError(f"{name} could not be downloaded or read ({error!r}); put {by_hand} by hand, or {path} "
                         f"with {', '.join(KEYS)}") from error
    with replace_file(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)
    return arrays


def digits(T=None):
    """scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), enlarged to 16x16 and three channels. With T: as
    SIMULATED events, made the way N-MNIST was: a sensor watches a still image in three quick eye movements."""
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, scale_factor=2 if T is None else 2.5, mode="bilinear").clamp(0, 1)
    if T is None:
        return split(x.mul(255).round().byte().permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy(), y, 0.2)
    frames = to_frames(simulate_saccades(F.pad(x[:, 0], (4, 4, 4, 4))), T)
    return split(frames, y, 0.2, note="events simulated from scikit-learn's digits, not recorded")


def split(x, y, test_share, **more):
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
    """N-MNIST (Orchard et al. 2015) from ROOT/NMNIST/{Train,Test}/<digit>/*.bin, in its official split; of a part of
    the set, all recordings are pooled and 250 in 1,100 are kept for testing."""
    from tonic import datasets, io
    pattern = "[Nn][Mm][Nn][Ii][Ss][Tt]/*/[0-9]/[!.]*.bin"          # macOS leaves ._0001.bin beside 0001.bin
    if not any(root.glob(pattern)):
        datasets.NMNIST(str(root), train=True), datasets.NMNIST(str(root), train=False)        # downloads and unpacks
    files = sorted(sorted(root.glob(pattern)), key=lambda file: file.parts[-3].lower(), reverse=True)   # Train first
    for file in files:
        need(file.stat().st_size % 5 == 0, f"{file} is damaged: cut off within an event; remove it")
    recordings = (io.read_mnist_file(str(file), datasets.NMNIST.dtype) for file in files)
    x = to_frames(tqdm(recordings, "N-MNIST", len(files), disable=None), T, files)
    y = np.array([int(file.parent.name) for file in files])
    if len(y) == 70000:
        return dict(x_train=x[:60000], y_train=y[:60000], x_test=x[60000:], y_test=y[60000:], note="N-MNIST")
    return split(x, y, 250 / 1100, note=f"{len(y):,} of N-MNIST's 70,000 recordings, pooled and split")


def to_frames(recordings, T, names=None):
    """Events -> counts per step and pixel, uint8 [N, T, 2, 34, 34]. Each step holds the same number of events."""
    from tonic.transforms import ToFrame
    frame, frames = ToFrame(sensor_size=(34, 34, 2), n_event_bins=T), []
    for i, events in enumerate(recordings):
        whole = 1 <= T <= len(events) and max(events["x"].max(), events["y"].max()) < 34
        need(whole and events["t"][0] < events["t"][-1], f"{names[i] if names else i} is damaged: it needs {T} or more "
             "events in 34x34 pixels, at times that rise; remove it")
        frames.append(frame(events).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def simulate_saccades(images, threshold=0.35, steps=20):
    """Events of a simulated 34x34 sensor over which still images [N, 28, 28] in [0, 1] move: three saccades of 100 ms
    along a triangle (Orchard et al. 2015), each cut into `steps`. A pixel fires an ON (OFF) event when the logarithm of
    its brightness has risen (fallen) by `threshold` since its last. Returns N arrays (x, y, t in microseconds, p)."""
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
