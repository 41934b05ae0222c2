"""Files, processes and numbers that every run needs and no reader of the paper does: atomic files, reuse, random numbers, devices.

    write_json(path, result)                     under a temporary name of this process, then renamed: never half a file
    kept(path, deciders, run)                    a result from an earlier run, if everything that decides it is the same
    resume(path, config, model=model, ...)       training goes on after the last whole epoch
    share(rows), sum_over_ranks(x)               one process's part of a batch under torchrun; alone: everything

The rules: a file is whole or not there; a result is reused only if its data, settings, models and code are the same; nothing
that is read is ever executed; every reader names its file.
"""
import ast
import contextlib
import ctypes
import hashlib
import inspect
import json
import os
import textwrap
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


# ---------------------------------------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def replace_file(path):
    """Yields a temporary path of this process beside `path`, which becomes `path` if the block ends well and is removed if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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


# ---------------------------------------------------------------------------------------------------------
# What may be used again

def fingerprint(*things):
    """Sixteen hexadecimal digits that are equal only for equal things: tensors, networks, code, functions with fixed arguments
    (triggers), and plain values."""
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
            digest.update(fingerprint(thing.func.__name__, *map(str, thing.keywords), *thing.args, *thing.keywords.values()).encode())
        else:
            digest.update(json.dumps(thing, sort_keys=True, default=str).encode())
        digest.update(b";")
    return digest.hexdigest()[:16]


def code_of(*things):
    """Fingerprint of the code of modules and functions, blind to comments, docstrings and layout."""
    found = []
    for thing in things:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0].value.value = ""
        found.append(ast.dump(tree))
    return fingerprint(*found)


def kept(path, deciders, run, fresh=False, quiet=False):
    """run()'s result, a dict, from `path` if it was made with equal `deciders` (a dict of plain values: everything that decides the
    result), else run() anew and written there. Returns (result, whether it was there)."""
    made_from = fingerprint(deciders)
    if not fresh and Path(path).exists():
        with contextlib.suppress(ValueError):       # a damaged file is made anew
            result = read_json(path)
            if result.get("made_from") == made_from:
                return result, True
    result = dict(run(), made_from=made_from)
    write_json(path, result, quiet)
    return result, False


def checkpoint_path(config, s):
    """Where the model or trigger that `config` (everything that decides it) describes is kept."""
    return s.runs / config["dataset"] / f"{config['name'].replace(' ', '-')}-seed{config['seed']}-{fingerprint(config)[:8]}.pt"


def write_checkpoint(path, config, **state):
    """Tensors and plain values only, so that reading it never runs anything. state: objects with a state_dict, or such values."""
    if rank_and_ranks()[0] == 0:
        state = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}
        with replace_file(path) as part:
            torch.save(dict(state, config=config), part)


def read_checkpoint(path, config, s, **parts):
    """Loads the state in a checkpoint into `parts`, objects with a load_state_dict, and returns it; None if there is none yet, or
    with --fresh. Raises ValueError for a damaged file or one of another run."""
    if s.fresh or not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["config"] != config:
            raise ValueError("it belongs to a run with other settings")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state
    except Exception as error:      # torch.load has many: zip, pickle, key, type and runtime errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise ValueError(f"{path}: not a checkpoint of this run ({reason}); delete it, or start anew with --fresh") from None


# ---------------------------------------------------------------------------------------------------------
# Processes and devices

def rank_and_ranks():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(rows):
    """This process's part of a batch's rows."""
    rank, ranks = rank_and_ranks()
    return rows[rank::ranks]


def sum_over_ranks(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def data_parallel(model):
    """The model, its gradients averaged over the processes of torchrun if there are several."""
    return nn.parallel.DistributedDataParallel(model) if rank_and_ranks()[1] > 1 else model


def say(line):
    """Prints once, however many processes train together."""
    if rank_and_ranks()[0] == 0:
        print(line, flush=True)


@contextlib.contextmanager
def processes(s):
    """Under torchrun: joins the group, one process per device, rank 0 writes. Alone: nothing. Yields the settings to use."""
    if "WORLD_SIZE" not in os.environ:
        yield s
        return
    cuda = s.device.startswith("cuda")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    if cuda:
        s = replace(s, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(s.device)
    try:
        yield s
    finally:
        dist.destroy_process_group()


def autocast(s):
    """bfloat16 arithmetic where the hardware has it (--amp). The neuron itself always computes in float32."""
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.amp == "on")


def keep_memory():
    """Tells glibc to keep freed memory instead of handing it back and asking again every step: up to 1.6x faster on a CPU."""
    with contextlib.suppress(OSError, AttributeError):          # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)                           # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 31 - 1)                           # M_MMAP_THRESHOLD
