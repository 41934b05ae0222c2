"""Result files. A result is used again only if its data, settings and code are the same; a reader names its file."""
import contextlib
import json
from pathlib import Path

from kit.files import fingerprint, replace_file
from kit.machine import rank


def kept(path, data, s, code, run, **decides):
    """(result, whether it was there): a dict from `path` if it was made from the same data, settings and code (the
    fingerprint of files), and the same `decides`, plain values; else run()'s, written there."""
    made_from = fingerprint(data.x_train, data.y_train, data.x_test, data.y_test, s.of(), decides, code)
    with contextlib.suppress(ValueError, TypeError, LookupError):       # no file, or a damaged one
        result = read_json(path)
        if result["made_from"] == made_from and not s.fresh:
            return result, True
    result = dict(run(), made_from=made_from)
    write_json(path, result)
    return result, False


def read_json(path):
    """A result that was written whole. Raises ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable result ({error}); delete it and run its command again") from None


def write_json(path, result):
    """Writes a result, once however many processes train together."""
    if rank() == 0:
        write_text(path, json.dumps(result, indent=1) + "\n")


def write_text(path, text):
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")
