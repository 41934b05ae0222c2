"""Files that every run needs and no reader of the paper does: results, checkpoints, what may be used again; and
random numbers.

    write_json(path, result)                     under a temporary name of this process, then renamed: never half a file
    kept(path, deciders, run)                    a result from an earlier run, if everything that decides it is the same
    read_checkpoint(path, config, s, model=...)  training goes on after the last whole epoch
    generator(seed, "shuffle", epoch)            a random number generator of its own for every purpose

The rules: a file is whole or not there; a result is reused only if its data, settings, models and code are the
same; nothing that is read is ever executed; every reader names its file.
"""
import ast
import contextlib
import functools
import glob
import hashlib
import inspect
import io
import json
import os
import statistics
import textwrap
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import nn

from machine import of_rank_0, rank_and_ranks, say

# ---------------------------------------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def replace_file(path):
    """Yields a temporary path of this process beside `path`, which becomes `path` if the block ends well and is
    removed if not. What a killed process left there is removed, too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp") if os.name == "posix" else ():
        with contextlib.suppress(ValueError, OverflowError, PermissionError):
            try:
                os.kill(int(left.suffixes[-2][1:]), 0)      # sends nothing: does this process still run?
            except ProcessLookupError:
                left.unlink(missing_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(*folders):
    """Raises ValueError if a folder is none, or cannot be made or written to: asked before hours are spent."""
    for folder in folders:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"cannot write to {folder}: {existing} is not a writable folder")


def write_text(path, text):
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, result, quiet=False):
    """Writes a result, once however many processes train together."""
    if rank_and_ranks()[0] == 0:
        write_text(path, json.dumps(result, indent=1) + "\n")
        if not quiet:
            say(f"written: {path}")


def read_json(path):
    """A result that was written whole. Raises ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable result ({error}); delete it and run its command again") from None


def write_images(path, **images):
    """Images in [0, 1], float [N, C, H, W], as an .npz file of uint8 [N, H, W, C]."""
    if rank_and_ranks()[0] == 0:
        with replace_file(path) as part, open(part, "wb") as file:
            np.savez_compressed(file, **{name: x.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
                                         for name, x in images.items()})


def print_epoch(row, s, chance=0):
    """One line of a training's log (row None: the header), and a warning where the network has collapsed at S_n."""
    if row is None:
        names = (("epoch", 9), ("T", 2), ("loss", 7), ("acc", 6), ("mal_acc", 7), ("CA", 6), ("target_rate", 11),
                 ("sec", 6))
        return say(" ".join(f"{name:>{width}}" for name, width in names) + f" {'ETA':>7}")
    eta = timedelta(seconds=round(row["seconds"] * (s.epochs - row["epoch"]) * s.T / row["T"]))
    mal_acc = f"{row['mal_acc']:7.1f}" if row["mal_acc"] is not None else f"{'-':>7}"
    say(f"{row['epoch']:>5}/{s.epochs:<3} {row['T']:>2} {row['loss']:7.3f} {row['acc']:6.1f} {mal_acc} "
        f"{row['ca']:6.1f} {row['target_rate']:11.1f} {row['seconds']:6.1f} {eta!s:>7}")
    if row["epoch"] > s.warmup and row["T"] == s.T and (row["ca"] < 1.5 * chance or row["target_rate"] > 90):
        say("  warning: collapsed? at the nominal setting the model " + (
            "answers the target to nearly everything" if row["target_rate"] > 90 else "is near chance"))


# ---------------------------------------------------------------------------------------------------------
# Numbers

def mean_of(rows):
    """Mean of every number in a list of equal dicts; other values are taken from the first."""
    def mean(values):
        numbers = [v for v in values if isinstance(v, float)]
        digits = 4 if numbers and max(map(abs, numbers)) < 10 else 2
        return round(sum(numbers) / len(numbers), digits) if numbers else values[0]
    return {key: mean([row.get(key) for row in rows]) for key in rows[0]}


def spread_of(rows):
    """Standard deviation over seeds (n - 1) of every number in a list of equal dicts; empty for one row."""
    numbers = {key: [row[key] for row in rows if isinstance(row.get(key), float)] for key in rows[0]}
    return {key: round(statistics.stdev(v), 4) for key, v in numbers.items() if len(v) > 1}


def generator(seed, *purpose):
    """A torch.Generator for one purpose (words and numbers, such as "shuffle", 3) of a seed. No two purposes draw
    the same numbers."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------------------
# What may be used again

def fingerprint(*things):
    """Sixteen hexadecimal digits that are equal only for equal things: tensors, networks, code, functions with
    fixed arguments (triggers), and plain values."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, nn.Module):
            state = thing.state_dict()
            thing = [*state.keys(), *state.values()]
        if isinstance(thing, torch.Tensor):
            digest.update(f"{thing.dtype}{list(thing.shape)}".encode())
            digest.update(thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(thing, list | tuple):
            digest.update(f"{len(thing)}{fingerprint(*thing)}".encode())
        elif hasattr(thing, "keywords"):        # functools.partial
            digest.update(fingerprint(thing.func.__name__, *map(str, thing.keywords), *thing.args,
                                      *thing.keywords.values()).encode())
        else:
            plain = json.dumps(thing, sort_keys=True, default=lambda one: getattr(one, "__qualname__", str(one)))
            digest.update(plain.encode())
        digest.update(b";")
    return digest.hexdigest()[:16]


@functools.cache        # what this process runs, also when a file has changed since
def code_of(*things):
    """Fingerprint of the code of modules and functions, blind to comments, docstrings and layout."""
    found = []
    for thing in things:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if (isinstance(body, list) and body and isinstance(body[0], ast.Expr)
                    and isinstance(body[0].value, ast.Constant)):
                body[0].value.value = ""
        found.append(ast.dump(tree))
    return fingerprint(*found)


def kept(path, deciders, run, fresh=False, quiet=False):
    """run()'s result, a dict, from `path` if it was made with equal `deciders` (a dict of plain values: everything
    that decides the result), else run() anew and written there. Returns (result, whether it was there)."""
    result = None if fresh else earlier(path, deciders)
    if result:
        return result, True
    result = dict(run(), made_from=fingerprint(deciders))
    write_json(path, result, quiet)
    return result, False


def earlier(path, deciders):
    """The result in `path` if it was made with equal `deciders`, else None; a damaged file counts as none."""
    result = {}
    with contextlib.suppress(ValueError):
        result = read_json(path) if rank_and_ranks()[0] == 0 else {}
    there = isinstance(result, dict) and result.get("made_from") == fingerprint(deciders)
    return of_rank_0(result if there else None)


def folder_of(data, s):
    """The folder of a data set's results, or of a variant's."""
    return s.results / (f"{data.name}_{s.variant}" if s.variant else data.name)


def checkpoint_path(config, s):
    """Where the model or trigger that `config` (everything that decides it) describes is kept."""
    return (s.runs / config["dataset"]
            / f"{config['name'].replace(' ', '-')}-seed{config['seed']}-{fingerprint(config)[:8]}.pt")


def write_checkpoint(path, config, **state):
    """Tensors and plain values only, so that reading it never runs anything. state: objects with a state_dict, or
    such values."""
    if rank_and_ranks()[0] == 0:
        state = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}
        whole = io.BytesIO()            # torch.save into a full disk would raise what no caller expects
        torch.save(dict(state, config=config), whole)
        with replace_file(path) as part:
            part.write_bytes(whole.getbuffer())


def read_checkpoint(path, config, s, **parts):
    """Loads the state in a checkpoint into `parts`, objects with a load_state_dict, and returns it; None if there
    is none yet, or with --fresh. Raises ValueError for a damaged file or one of another run."""
    there = not s.fresh and rank_and_ranks()[0] == 0 and path.exists()
    try:
        state = of_rank_0(torch.load(path, weights_only=True, map_location="cpu") if there else None)
        if state is None:
            return None
        if state["config"] != config:
            raise ValueError("it belongs to a run with other settings")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state
    except Exception as error:      # torch.load has many: zip, pickle, key, type and runtime errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise ValueError(f"{path}: not a checkpoint of this run ({reason}); delete it, "
                         "or start anew with --fresh") from None
