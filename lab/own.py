"""The threshold scan of a network of one's own, whatever it was made with.

    python badsnn.py scan --weights model.pt --build my_module:build --data images.npz

build: a function without arguments that makes the network; your code, run as if started in this folder. weights: its
state_dict, or a checkpoint that holds one. images: an .npz or .npy file. Nothing that is read is unpickled.
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
    """Scans a network, prints what is seen and returns the scan's result, with `suspicious`: True, False, or None where
    the scan means nothing, and `void` says why. Raises ValueError."""
    need(weights and build, "--weights (a state_dict) and --build (a function that makes its network) belong together")
    x, y = images_of(images)
    with their_code():
        model = built(build)
        load(model, weights)
        try:
            result = threshold_scan(model.float(), x.to(next(model.parameters(), x)))
        except ValueError:
            raise
        except (Exception, SystemExit) as error:        # the code is yours, and so are its errors
            raise ValueError(f"the network does not take images {list(x.shape)}: {error!r:.300}") from None
    known = read_json(known)
    at = summary(known["rows"], known["n_design"])[[name for name, n in SHOWN.items() if n <= len(x)][0]]
    guess = answers(result["shipped"]).cpu()
    result["ca"] = None if y is None else percentage(guess == y)
    result["void"] = why_void(guess, result["ca"], result["shipped"].shape[1])
    result["suspicious"] = None if result["void"] else result["score"] > at["alarm"]
    say(f"{'v_thr':>7} {'class':>5} {'share':>6} {'probability':>11} {'entropy':>8}")
    for v, share, p, h in zip(result["v_thr"], result["share"], result["probability"], result["entropy"]):
        say(f"{v:7.3f} {p.argmax():5} {share[p.argmax()]:6.2f} {p.max():11.3f} {h:8.3f}")
    say(f"\n{len(x)} images, CA {'unknown, as there are no labels' if y is None else result['ca']}; answers read as "
        f"{result['reading']}; score {result['score']:.3f}. Of {known['dataset']} models shown as many images, "
        f"{at['caught']:g} % of the backdoored and {at['false_alarms']:g} % of the clean ones score above "
        f"{at['alarm']:.3f}.")
    verdicts = {None: f"NO VERDICT: {result['void']}.",
                True: f"SUSPICIOUS: with another threshold the network becomes sure of class {result['accused']}.",
                False: "Nothing suspicious. That is no proof: an attacker who knows the scan can pass it."}
    say(verdicts[result["suspicious"]])
    if unknown := neurons_of(model)[1]:
        say(f"These modules were left alone; if one of them is a neuron, the scan means nothing: {', '.join(unknown)}")
    return result


def why_void(guess, ca, k):
    """Why a scan says nothing of a network with these answers, classes [N] (-1: all alike), or None."""
    classes, counts = guess.unique(return_counts=True)
    top, share, chance = classes[counts.argmax()].item(), 100 * counts.max().item() / len(guess), 100 / k
    if top < 0 and share >= 90:
        return "all classes get the same answer: the weights are zero, or nothing spikes"
    if len(guess) >= 10 and share >= 90:
        return f"{share:.0f} % of the answers are class {top}: images of one class, or a network that has not learned"
    if len(guess) >= 10 and ca is not None and ca < chance + (100 - chance) / 10:
        return (f"CA is near chance, {chance:.1f}: the network has not learned, or wants other images than these in "
                "[0, 1]; normalisation belongs into the network")
    return None


# ----- The network


@contextlib.contextmanager
def their_code():
    """Inside, the program is theirs: of modules that are called like ours theirs win, and ours are found last; no
    option of ours is seen. Afterwards all is as before."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"kit", "lab"}
    last = SimpleNamespace(find_spec=lambda name, path, target=None: PathFinder.find_spec(name, path or [str(ROOT)]))
    modules, path, argv = sys.modules.copy(), sys.path[:], sys.argv

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
    forget()
    sys.path[:] = [os.getcwd(), *(place for place in path if Path(place).resolve() != ROOT)]
    sys.argv = argv[:1]
    sys.meta_path.append(last)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        forget()
        sys.modules.update(modules)
        sys.path[:], sys.argv = path, argv
        sys.meta_path.remove(last)


def built(build):
    """The network that their function makes."""
    module, _, name = build.partition(":")
    try:
        model = getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as error:        # the code is yours, and so are its errors
        raise ValueError(f"--build {build}: {error!r:.300}; wanted: module:function, without arguments") from None
    need(isinstance(model, torch.nn.Module), f"--build {build} returned no torch.nn.Module")
    return model


def load(model, weights):
    """Loads a state_dict, from within a checkpoint too. Raises ValueError with the first names that differ."""
    try:
        state = torch.load(weights, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ValueError(f"--weights {weights}: {error}") from None
    except Exception:       # torch.load has many: zip, pickle, key, type and runtime errors
        raise ValueError(f"--weights {weights}: not a file of tensors, or there is more in it, which is not read as "
                         "that could run code; torch.save(model.state_dict(), ...) makes one") from None
    names = {plain(name): name for name in model.state_dict()}
    wanted = {short: shape_of(model.state_dict()[name]) for short, name in names.items()}
    given = max(tables(state, wanted), key=lambda table: (len(wanted.keys() & table), len(table)), default={})
    shapes = {name: shape_of(value) for name, value in given.items()}
    at_rest = {name for name in wanted if (0,) in (wanted[name], shapes.get(name))}     # potentials of an earlier call
    wrong = {"missing": {name for name in wanted.keys() - given if not name.endswith("num_batches_tracked")},
             "unexpected": given.keys() - wanted,
             "of another shape": {name for name in wanted.keys() & given if wanted[name] != shapes[name]}}
    listed = [f"{kind}: {', '.join(sorted(found - at_rest)[:3])}" for kind, found in wrong.items() if found - at_rest]
    need(not listed, f"--weights {weights} does not fit what --build makes; {'; '.join(listed)}")
    model.load_state_dict({names[name]: value for name, value in given.items() if name not in at_rest}, strict=False)


def shape_of(value):
    return tuple(getattr(value, "shape", "?"))


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
        arrays = dict(x=file) if isinstance(file, np.ndarray) else {name: file[name] for name in file.files if name in (
            "x_test", "y_test", "x_train", "y_train", "x", "y")}
        part = next(part for part in ("_test", "_train", "") if f"x{part}" in arrays)
    except Exception as error:      # np.load has many: zip, value, key and type errors
        reason = "no x_test, x_train or x in it" if isinstance(error, StopIteration) else f"{error}".split("\n")[0]
        raise ValueError(f"--data {path}: {reason}; wanted: an .npz or .npy file of images") from None
    x, y = arrays[f"x{part}"], arrays.get(f"y{part}")
    need(x.ndim in (3, 4) and x.size, f"--data {path}: images are [N, H, W, C] or [N, C, H, W], not {list(x.shape)}")
    rows = np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(int)
    if y is not None:
        y = y.argmax(1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(-1)            # one-hot rows
        need(len(y) == len(x) and y.dtype.kind in "iuf", f"--data {path}: {len(y)} labels ({y.dtype}), {len(x)} images")
        y = torch.from_numpy(y[rows].astype(np.int64))
    x = x[rows] if x.ndim == 4 else x[rows, None]
    x = x.transpose(0, 3, 1, 2) if x.shape[1] > 3 and x.shape[3] <= 4 else x
    need(x.dtype.kind in "biuf" and np.isfinite(x).all(), f"--data {path}: pixels must be numbers (no NaN)")
    whole, low, high = x.dtype.kind in "iu", x.min(), x.max()
    need(0 <= low and high <= (255 if whole else 1) and not (whole and high <= 1),
         f"--data {path}: floats must lie in [0, 1], whole numbers from 0 to 255, not from {low} to {high}; a network "
         "normalises its images itself")
    return torch.from_numpy(np.ascontiguousarray(x / 255 if whole else x, dtype=np.float32)), y
