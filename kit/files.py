"""Files that are whole or not there, fingerprints of what decides a result, means over seeds."""
import contextlib
import functools
import hashlib
import json
import os
import secrets
import statistics
from pathlib import Path

import torch

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


def mean_of(rows):
    """Mean of every float in a list of equal dicts; other values are taken from the first."""
    means = dict(rows[0])
    for key in means:
        numbers = [row[key] for row in rows if isinstance(row.get(key), float)]
        if numbers:
            means[key] = round(statistics.fmean(numbers), 4)
    return means
