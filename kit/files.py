"""Files. A file is whole or not there; a result is reused only if its data, settings and code are the same; nothing
that is read is ever executed; every reader names its file."""
import contextlib
import functools
import hashlib
import json
import os
import secrets
import statistics
from pathlib import Path

import numpy as np
import torch

from kit.machine import rank

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def replace_file(path):
    """Yields a temporary path of a name that nobody else has, on any host; it becomes `path` if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, result):
    """Writes a result, once however many processes train together."""
    if rank() == 0:
        write_text(path, json.dumps(result, indent=1) + "\n")


def read_json(path):
    """A result that was written whole. Raises ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable result ({error}); delete it and run its command again") from None


def write_arrays(path, **arrays):
    """Arrays or tensors as an .npz file, once however many processes train together."""
    if rank() == 0:
        with replace_file(path) as part, open(part, "wb") as file:
            np.savez_compressed(file, **{name: np.asarray(array) for name, array in arrays.items()})


def fingerprint(*things):
    """Sixteen hexadecimal digits that are equal only for equal things: tensors, networks, and what JSON can hold."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.nn.Module):
            thing = list(thing.state_dict().items())
        if isinstance(thing, torch.Tensor):
            digest.update(f"{thing.dtype}{list(thing.shape)}".encode())
            digest.update(thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(thing, list | tuple):
            digest.update(f"{len(thing)}{fingerprint(*thing)}".encode())
        else:
            digest.update(json.dumps(thing, sort_keys=True).encode())
        digest.update(b";")
    return digest.hexdigest()[:16]


@functools.cache        # what this process runs, also when a file has changed since
def code_of(*patterns):
    """Fingerprint of this repository's files that fit, such as "lab/*.py": what decides a result beside settings."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    return fingerprint([path.read_text(encoding="utf-8") for path in paths])


def kept(path, deciders, run, fresh=False):
    """(result, whether it was there): a dict from `path` if it was made with equal `deciders` (a dict of plain values:
    all that decides the result), else run()'s, written there."""
    made_from = fingerprint(deciders)
    with contextlib.suppress(ValueError, TypeError, LookupError):       # no file, or a damaged one
        result = read_json(path)
        if result["made_from"] == made_from and not fresh:
            return result, True
    result = dict(run(), made_from=made_from)
    write_json(path, result)
    return result, False


def mean_of(rows):
    """Mean of every float in a list of equal dicts; other values are taken from the first."""
    means = dict(rows[0])
    for key in means:
        numbers = [row[key] for row in rows if isinstance(row.get(key), float)]
        if numbers:
            means[key] = round(statistics.fmean(numbers), 4)
    return means


def spread_of(rows):
    """Standard deviation over seeds (n - 1) of every float in a list of equal dicts; empty for one row."""
    numbers = {key: [row[key] for row in rows if isinstance(row.get(key), float)] for key in rows[0]}
    return {key: round(statistics.stdev(v), 4) for key, v in numbers.items() if len(v) > 1}
