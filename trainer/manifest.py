"""The checksum manifest of a checkpoint: written last, and verified before anything is loaded. Imports no JAX.

    manifest.json   {"digest": ..., "manifest": {"step", "metric", "arrays", "files": {path: [bytes, sha256]}}}

Orbax loads data with flipped bits without a word, so whether a checkpoint is whole is decided here, from the bytes on disk:
every file listed must be there with its size and SHA-256, no other file may stand among the arrays, and the manifest
itself must be byte for byte what its own digest says.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from trainer.atomic_files import canonical_json, sync_directory, write_bytes_atomic

NAME = "manifest.json"
ARRAYS = "state"  # the directory that Orbax writes; nothing foreign may be in it
_FORMAT = 1
_THREADS = 2  # SHA-256 runs at 1 to 2 GB/s a thread and releases the interpreter lock


class Damaged(Exception):
    """A checkpoint directory that must not be loaded; the message says why."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint holds."""

    step: int
    metric: float | None  # lower is better; None: not measured, or not finite
    arrays: dict[str, tuple[str, tuple[int, ...]]]  # path in the state -> dtype name, global shape
    files: dict[str, tuple[int, str]]  # path in the directory -> bytes, SHA-256

    def encode(self) -> bytes:
        """The file's bytes; the same manifest always gives the same bytes."""
        tree = {"format": _FORMAT, **dataclasses.asdict(self)}
        digest = hashlib.sha256(canonical_json(tree).encode()).hexdigest()
        return (canonical_json({"digest": digest, "manifest": tree}) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Reads `encode`'s bytes.

        Raises:
          Damaged: one bit of them differs, or another version of this program wrote them.
        """
        try:
            tree = json.loads(data)["manifest"]
            if tree["format"] != _FORMAT:
                raise Damaged(f"{NAME} has format {tree['format']!r}, this version reads {_FORMAT}")
            manifest = cls(
                step=tree["step"],
                metric=tree["metric"],
                arrays={path: (dtype, tuple(shape)) for path, (dtype, shape) in tree["arrays"].items()},
                files={path: (size, digest) for path, (size, digest) in tree["files"].items()},
            )
            intact = manifest.encode() == data
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{NAME} is not readable") from error
        if not intact:
            raise Damaged(f"{NAME} does not match its own checksum")
        return manifest


def write_manifest(directory: Path, *, step: int, metric: float | None, arrays: dict[str, Any]) -> Manifest:
    """Hashes and syncs every file under `directory`, then writes the manifest beside them.

    Args:
      directory: a checkpoint whose files are all written and closed.
      step: updates done.
      metric: lower is better; a non-finite one is stored as None.
      arrays: path in the state -> (dtype name, shape).

    Raises:
      OSError: a file could not be read, or the manifest not be written.
    """
    paths = _files(directory)
    for folder in {path.parent for path in paths}:
        sync_directory(folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda path: _digest(path, sync=True), paths))
    files = {path.relative_to(directory).as_posix(): digest for path, digest in zip(paths, digests, strict=True)}
    if metric is not None:
        metric = float(metric) if math.isfinite(metric) else None
    manifest = Manifest(step=step, metric=metric, arrays=dict(arrays), files=files)
    write_bytes_atomic(directory / NAME, manifest.encode())
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, itself verified; the files it lists are not looked at.

    Raises:
      Damaged: it is missing, altered, or of another step than the directory's name.
    """
    try:
        data = (directory / NAME).read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing, so the save never finished") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {error.strerror}") from error
    manifest = Manifest.decode(data)
    if str(manifest.step) != directory.name:
        raise Damaged(f"{NAME} is of step {manifest.step}")
    return manifest


def verify(directory: Path) -> Manifest:
    """Reads every byte of a checkpoint and compares it with the manifest.

    Raises:
      Damaged: naming the first file, in path order, that is missing, truncated, altered or foreign.
    """
    manifest = read_manifest(directory)
    for name in sorted(manifest.files):
        size, _ = manifest.files[name]
        try:
            found = (directory / name).stat().st_size
        except OSError:
            raise Damaged(f"{name} is missing") from None
        if found != size:
            raise Damaged(f"{name} has {found} bytes instead of {size}")
    for path in _files(directory / ARRAYS):
        name = path.relative_to(directory).as_posix()
        if name not in manifest.files:
            raise Damaged(f"{name} does not belong to it")
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        names = sorted(manifest.files)
        for name, found in zip(names, pool.map(lambda name: _read_digest(directory / name), names), strict=True):
            if found != manifest.files[name]:
                raise Damaged(f"{name} does not match its checksum")
    return manifest


def fingerprint(directory: Path) -> tuple[Any, ...]:
    """Size, time and inode of every file: while it stays the same, an earlier `verify` still holds."""
    found = []
    for path in _files(directory):
        try:
            status = path.stat()
        except OSError:  # deleted by the process that owns it, while this one looks
            continue
        found.append((path.relative_to(directory).as_posix(), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def _files(directory: Path) -> list[Path]:
    found = [Path(folder) / name for folder, _, names in os.walk(directory) for name in names]
    return sorted(found)


def _digest(path: Path, *, sync: bool = False) -> tuple[int, str]:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _read_digest(path: Path) -> tuple[int, str]:
    try:
        return _digest(path)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
