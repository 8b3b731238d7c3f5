"""Files that are either wholly there or not there: written beside, synced to disk, then renamed. Imports no JAX."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spare spaces: equal values give equal text.

    Raises:
      TypeError: something in `value` is not JSON.
      ValueError: a float is not finite, which JSON cannot say.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces `path` by `data`; a reader, and a restart after a crash, sees the old file or the new one, never a part.

    Raises:
      OSError: the disk is full, or the directory cannot be written; the old file is untouched.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """`write_bytes_atomic` of readable JSON (two spaces of indent, keys in the order given, a final newline)."""
    text = json.dumps(value, indent=2, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode())


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Makes renames inside a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
