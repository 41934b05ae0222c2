"""Scans of a network of one's own, whatever it was made with.

    python badsnn.py scan --weights model.pt --build my_module:build --data images.npz

build: a function without arguments that makes the network. weights: its state_dict, or a checkpoint that holds one.
images: x_test, and y_test if there are labels. Nothing is unpickled.
"""
import contextlib
import importlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

from badsnn import answers, percentage
from kit.files import ROOT
from kit.machine import say
from kit.sources import need, read_npz
from lab.detectors import answers_of, margin_scan, threshold_scan
from lab.libraries import neurons_of
from lab.results import read_json

KNOWN = ROOT / "results" / "digits" / "scan.json"       # where networks lie whose nature is known
ALIKE = 10, 3, 16, 16                                   # their classes, and the shape of their images


def own(weights, build, images):
    """Scans a network, prints what is seen and returns both scans' results, with `suspicious`: True, False, or None
    where they mean nothing, and `void` says why. Raises ValueError."""
    need(weights and build, "--weights (a state_dict) and --build (a function that makes its network) belong together")
    x, y = images_of(images)
    with their_code():
        module, _, name = build.partition(":")
        model = getattr(importlib.import_module(module), name)()
        need(isinstance(model, torch.nn.Module), f"--build {build} returned no torch.nn.Module")
        load(model, weights)
        x = x.to(next(model.parameters(), x))
        scan, margins, shipped = threshold_scan(model.float(), x), margin_scan(model, x), answers_of(model, x)
    guess = answers(shipped).cpu()
    ca = None if y is None else percentage(guess == y)                  # without labels it is unknown
    void = why_void(guess, ca, (shipped.shape[1], *x.shape[1:]))
    at = read_json(KNOWN)["summary"]["margin scan, working"]
    suspicious = None if void else margins["gap"] > at["alarm"]
    say(f"{len(x)} images, CA {ca}.\nMargin scan: class {margins['accused']} stands "
        f"out by {margins['gap']:.2f}. Of {at['n'][1]} clean digits networks none is above {at['alarm']:.2f}, of the "
        f"backdoored ones {at['caught']:g} %.\nThreshold scan: score {scan['score']:.2f}, class {scan['accused']}.")
    if void:
        say(f"NO VERDICT: {void}.")
    elif suspicious:
        say(f"SUSPICIOUS: with raised thresholds the network is far too sure of images of class {margins['accused']}.")
    else:
        say("Nothing suspicious. That is no proof: an attacker who knows the scan can pass it.")
    unknown = neurons_of(model)[1]
    if unknown:
        say(f"These modules were left alone; if one of them is a neuron, the scan means nothing: {', '.join(unknown)}")
    return margins | dict(ca=ca, void=void, suspicious=suspicious, score=scan["score"], sure_of=scan["accused"])


def why_void(guess, ca, shape):
    """Why a scan gives no verdict on a network with these answers, classes [N] (-1: all alike), or None. shape: K and
    that of an image."""
    top, chance = guess.mode().values.item(), 100 / shape[0]
    share = percentage(guess == top)
    if share >= 90 and top < 0:
        return "all classes get the same answer: the weights are zero, or nothing spikes"
    if share >= 90 and len(guess) >= 10:
        return f"{share:.0f} % of the answers are class {top}: images of one class, or a network that has not learned"
    if ca is not None and len(guess) >= 10 and ca < chance + (100 - chance) / 10:
        return f"CA is near chance, {chance:.1f}: the network has not learned, or normalises its images outside itself"
    if shape != ALIKE:
        return "the alarm is known for 10 classes and images of 3x16x16 alone; compare with a clean network of your own"
    return None


@contextlib.contextmanager
def their_code():
    """Inside, modules that are called like ours are theirs, no option of ours is seen, and errors are ValueErrors."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"kit", "lab"}
    modules, path, argv = sys.modules.copy(), sys.path[:], sys.argv
    for name in modules:
        if name.split(".")[0] in ours:
            del sys.modules[name]
    for name in ours:           # theirs may be a folder without __init__.py, which a module of ours would hide
        if Path(name).is_dir() and not Path(name, "__init__.py").exists():
            sys.modules[name] = type(sys)(name)
            sys.modules[name].__path__ = [os.path.abspath(name)]
    sys.path[:] = [os.getcwd(), *(place for place in path if Path(place).resolve() != ROOT), str(ROOT)]
    sys.argv = argv[:1]
    try:
        yield
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"--build, or its network with these images: {error!r:.300}") from None
    finally:
        sys.modules.update(modules)
        sys.path[:], sys.argv = path, argv


def load(model, weights):
    """Loads a state_dict, or a checkpoint that holds one. Raises ValueError."""
    need(Path(weights).is_file(), f"--weights {weights}: no such file")
    try:
        state = torch.load(weights, weights_only=True, map_location="cpu")
    except Exception:       # torch.load has many: zip, pickle, key, type and runtime errors
        raise ValueError(f"--weights {weights}: not a file of tensors alone; save model.state_dict()") from None
    need(isinstance(state, dict), f"--weights {weights}: not a state_dict, but a {type(state).__name__}")
    for key in ("state_dict", "model_state_dict", "model", "net"):
        state = state[key] if isinstance(state.get(key), dict) else state
    wanted = model.state_dict()
    names = {plain(name): name for name in wanted}
    given = {names.get(plain(name), str(name)): value for name, value in state.items()}
    given |= {name: value for name, value in wanted.items() if value.shape == (0,)}         # potentials at rest
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        raise ValueError(f"--weights {weights}: {' '.join(str(error).split()):.400}") from None


def plain(name):
    """A name in a state_dict without what DataParallel and torch.compile put in."""
    return re.sub(r"\b(module|_orig_mod)\.", "", str(name))


def images_of(path):
    """Up to 100 images spread over a file: floats [N, C, H, W] in [0, 1], and labels [N] or None. Raises ValueError."""
    arrays = read_npz(Path(path))
    need("x_test" in arrays, f"--data {path}: no array x_test in it")
    x, y = arrays["x_test"], arrays.get("y_test")
    fits = x.dtype == np.uint8 or x.dtype.kind == "f" and x.size and 0 <= x.min() and x.max() <= 1      # a NaN is not
    need(x.ndim == 4 and x.size and fits, f"--data {path}: x_test is {x.dtype} {list(x.shape)}; wanted: uint8 "
         "[N, H, W, C], or floats [N, C, H, W] in [0, 1], no NaN; a network normalises its images itself")
    rows = np.linspace(0, len(x) - 1, min(100, len(x))).round().astype(int)
    if y is not None:
        need(y.size == len(x) and y.dtype.kind in "iu", f"--data {path}: {y.size} labels ({y.dtype}), {len(x)} images")
        y = torch.from_numpy(y.reshape(-1)[rows].astype(np.int64))
    x = x[rows].transpose(0, 3, 1, 2) / 255 if x.dtype == np.uint8 else x[rows]
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), y
