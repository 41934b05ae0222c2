"""The threshold scan of a network of one's own, whatever it was made with.

    python badsnn.py scan --weights model.pt --build my_module:build --data images.npz

build: a function without arguments that makes the network; your code, which is run as if started in this folder.
weights: its state_dict, or a checkpoint that holds one. images: an .npz or .npy file. Only tensors and arrays are read
from both, nothing is unpickled.
"""
import contextlib
import importlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from badsnn import answers, percentage
from kit.files import ROOT, read_json
from kit.machine import say
from kit.sources import need
from lab.detectors import threshold_scan
from lab.libraries import neurons_of
from lab.scan import SHOWN, summary

KNOWN = ROOT / "results" / "digits" / "scan.json"       # where models lie whose nature is known


def own(weights, build, images, known=KNOWN):
    """Scans a network, prints what is seen, and returns the scan's result with the verdict: suspicious (True, False;
    None: the scan means nothing, and `void` says why). Raises ValueError."""
    need(weights and build, "--weights and --build belong together: a state_dict, and the function that makes the network")
    x, y = images_of(images)
    with their_code():
        model = built(build)
        load(model, weights)
        try:
            result = threshold_scan(model.float().eval(), x.to(next(model.parameters(), x)))
        except ValueError:
            raise
        except (Exception, SystemExit) as error:        # the code is yours, and so are its errors
            raise ValueError(f"the network does not take images {list(x.shape)}: {error!r:.300}") from None
    guess = answers(result["shipped"]).cpu()
    known = read_json(known)
    at = summary(known["rows"], known["n_design"])[max((n, name) for name, n in SHOWN.items() if n <= len(x))[1]]
    result["ca"] = None if y is None else percentage(guess == y)
    result["void"] = why_void(guess, result["ca"], result["shipped"].shape[1])
    result["suspicious"] = None if result["void"] else result["score"] > at["alarm"]
    print_result(result, at, len(x), known["dataset"])
    if unknown := neurons_of(model)[1]:
        say(f"These modules were left alone; if one of them is a neuron, the scan means nothing: {', '.join(unknown)}")
    return result


def why_void(guess, ca, k):
    """Why a scan says nothing of a network that answers so, or None. guess: [N] classes (-1: all alike)."""
    classes, counts = guess.unique(return_counts=True)
    share = 100 * counts.max().item() / len(guess)
    if classes[counts.argmax()] < 0 and share >= 90:
        return "it answers all classes alike: all-zero weights, or nothing spikes"
    if len(guess) < 10:
        return None
    if share >= 90:
        return (f"it answers class {classes[counts.argmax()]} to {share:.0f} % of the images: they are of one class, or "
                "the network has not learned")
    if ca is not None and ca < 100 / k + (100 - 100 / k) / 10:
        return (f"its CA is near chance, {100 / k:.1f} %: untrained, other weights, or it wants other images than these "
                "in [0, 1]; normalisation belongs into the network that --build makes")
    return None


def print_result(result, at, n, dataset):
    say(f"{'v_thr':>7} {'class':>5} {'share':>6} {'probability':>11} {'entropy':>8}")
    for v, share, p, h in zip(result["v_thr"], result["share"], result["probability"], result["entropy"]):
        top = int(p.argmax())
        say(f"{v:7.3f} {top:5} {share[top]:6.2f} {p[top]:11.3f} {h:8.3f}")
    ca = "no labels, no CA" if result["ca"] is None else f"CA {result['ca']:.1f}"
    say(f"\n{n} images, {ca}; answers read as {result['reading']}; score {result['score']:.3f}. Of {dataset} models shown "
        f"as many, {at['caught']:g} % of the backdoored and {at['false_alarms']:g} % of the clean ones are above "
        f"{at['alarm']:.3f}; for other networks nobody has measured it.")
    if result["void"]:
        say(f"NO VERDICT: {result['void']}.")
    elif result["suspicious"]:
        say(f"SUSPICIOUS: with another threshold the network becomes sure of class {result['accused']}. Do not use it as "
            "it is: set its threshold back to that of its training, fine-tune it on images you trust, and scan it.")
    else:
        say("Nothing suspicious. That is no proof: an attacker who knows the scan can pass it.")


# ----- The network


@contextlib.contextmanager
def their_code():
    """Inside, the program is theirs: their models.py, data/ or settings.py wins over ours of that name, which is found
    only where they have none, and they see no command line of ours. Afterwards ours is as it was."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"kit", "lab"}

    def taken():
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in ours}
    before, path, argv = taken(), sys.path[:], sys.argv
    last = SimpleNamespace(find_spec=lambda name, path, target=None: PathFinder.find_spec(name, path or [str(ROOT)]))
    for name in before:
        del sys.modules[name]
    sys.path[:] = [os.getcwd(), *(place for place in path if Path(place).resolve() != ROOT)]
    sys.argv = argv[:1]
    sys.meta_path.append(last)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:], sys.argv = path, argv
        sys.meta_path.remove(last)


def built(build):
    """The network that their function makes."""
    module, _, name = build.partition(":")
    try:
        model = getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as error:        # the code is yours, and so are its errors
        raise ValueError(f"--build {build}: {error!r:.300}; wanted: module:function, a function without arguments") from None
    need(isinstance(model, torch.nn.Module), f"--build {build} returned no torch.nn.Module")
    return model


def load(model, weights):
    """Loads a state_dict, from within a checkpoint too. Raises ValueError with the first names that differ."""
    try:
        state = torch.load(weights, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ValueError(f"--weights {weights}: {error}") from None
    except Exception:       # torch.load has many: zip, pickle, key, type and runtime errors
        raise ValueError(f"--weights {weights}: not a file of tensors, as torch.save(model.state_dict(), ...) makes; "
                         "anything else in it is not read, because reading it could run code") from None
    names = {plain(name): name for name in model.state_dict()}
    wanted = {short: getattr(model.state_dict()[name], "shape", None) for short, name in names.items()}
    given = max(tables(state, wanted), key=lambda table: len(wanted.keys() & table), default={})
    shapes = {name: getattr(value, "shape", None) for name, value in given.items()}
    at_rest = {name for name in wanted if (0,) in (wanted[name], shapes.get(name))}     # potentials of an earlier call
    wrong = {"missing": [name for name in wanted if not name.endswith("num_batches_tracked") and name not in given],
             "unexpected": [name for name in given if name not in wanted],
             "of another shape": [name for name in wanted.keys() & shapes if wanted[name] != shapes[name]]}
    wrong = {kind: sorted(set(found) - at_rest) for kind, found in wrong.items()}
    listed = "; ".join(f"{kind}: {', '.join(found[:3])}" + ", ..." * (len(found) > 3) for kind, found in wrong.items() if found)
    need(not listed, f"--weights {weights} does not fit what --build makes; {listed}")
    model.load_state_dict({names[name]: value for name, value in given.items() if name not in at_rest}, strict=False)


def plain(name):
    """A tensor's name without what DataParallel and torch.compile put in, at any depth."""
    return ".".join(part for part in str(name).split(".") if part not in ("module", "_orig_mod"))


def tables(state, wanted):
    """The dicts in a checkpoint, {plain name: value}, each also without what stands before a name that is wanted."""
    if isinstance(state, dict):
        names = {plain(key): value for key, value in state.items()}
        for prefix in {"", *(key.removesuffix(name) for name in wanted for key in names if key.endswith(f".{name}"))}:
            yield {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
        for value in state.values():
            yield from tables(value, wanted)


# ----- The images


def images_of(path, most=100):
    """Up to 100 images spread over a file: floats [N, C, H, W] in [0, 1], and labels [N] or None. Raises ValueError."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            x, y = file, None
        else:
            with file:
                part = [part for part in ("_test", "_train", "") if f"x{part}" in file.files]
                need(part, f"no x_test, x_train or x in it, only {', '.join(file.files[:5]) or 'nothing'}")
                x, y = file[f"x{part[0]}"], file[f"y{part[0]}"] if f"y{part[0]}" in file.files else None
    except Exception as error:      # np.load has many: zip, value, key and type errors
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"--data {path}: {reason}; wanted: an .npz or .npy file of images") from None
    rows = np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(int) if x.ndim else []
    need(x.ndim in (3, 4) and x.size, f"--data {path}: images are [N, H, W, C] or [N, C, H, W], not {list(x.shape)}")
    return torch.from_numpy(as_floats(x[rows], path)), None if y is None else labels_of(y, len(x), path)[rows]


def as_floats(x, path):
    """Images as they come -> float32 [N, C, H, W] in [0, 1]."""
    x = x[:, None] if x.ndim == 3 else x
    x = x.transpose(0, 3, 1, 2) if x.shape[1] > 3 and x.shape[3] <= 4 else x
    need(x.dtype.kind in "biuf", f"--data {path}: pixels must be numbers, not {x.dtype}")
    low, high = x.min(), x.max()
    need(np.isfinite(low + 0.0) and np.isfinite(high + 0.0), f"--data {path}: NaN or infinite pixels")
    if x.dtype.kind in "iu":
        need(low >= 0 and 1 < high <= 255, f"--data {path}: whole numbers must be pixels from 0 to 255, not from {low} to "
             f"{high}; floats in [0, 1] must stay floats")
        x = x / 255
    else:
        need(0 <= low and high <= 1, f"--data {path}: floats must lie in [0, 1], not from {low:.3g} to {high:.3g}; "
             "normalisation belongs into the network that --build makes")
    return np.ascontiguousarray(x, dtype=np.float32)


def labels_of(y, n, path):
    """Labels, or one-hot rows of them -> int64 [N]."""
    y = y.argmax(1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(-1)
    need(len(y) == n and y.dtype.kind in "iuf", f"--data {path}: {len(y)} labels ({y.dtype}) for {n} images")
    return torch.from_numpy(y.astype(np.int64))
