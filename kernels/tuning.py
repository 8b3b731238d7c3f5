"""Tuning tables: which chunk size was measured to be the fastest, by device, back-end, op, dtype, K, V and classes of size.

`kernels/tables/` holds a JSON file a device, written by `python -m kernels.tune`. A call takes the entry of exactly its key;
where there is none it takes the documented default of the back-end, and `kernels.explain` says which of the two it was. Nothing
is guessed from a neighbouring entry. An entry changes speed and the rounding of sums, and nothing else. No JAX in here.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kernels.mosaic_gpu.limits import TILE
from kernels.tpu import limits as tpu
from kernels.xla import limits as xla
from strata.errors import ConfigError

if TYPE_CHECKING:
    from kernels.arguments import Call

TABLES = Path(__file__).parent / "tables"
LEGAL = {
    "xla": (1, xla.LARGEST_CHUNK),
    "tpu": (tpu.SMALLEST_CHUNK, tpu.LARGEST_CHUNK),
    "mosaic_gpu": (TILE, TILE),
}
"""Back-end -> the least and the largest chunk size; powers of two between them are legal. `reference` has no chunks."""
DEFAULTS: dict[str, Callable[[Call], int]] = {
    "xla": xla.default_chunk,
    "tpu": lambda call: tpu.CHUNK,
    "mosaic_gpu": lambda call: TILE,
}
FIELDS: dict[str, type] = {
    "backend": str,
    "op": str,
    "dtype": str,
    "key_size": int,
    "value_size": int,
    "length": int,
    "rows": int,
    "chunk_size": int,
    "measured": dict,
}
"""Of an entry. length and rows are classes of T and B HV (`size_class`); `measured` says on what, and is not read here."""
KEY = tuple(FIELDS)[:7]
HEAD = {"device": str, "machine": str, "entries": list}
"""Of a table. `device` is what `device_name` gives there, `machine` the same for people."""

Key = tuple[str | int, ...]


class Tuned(NamedTuple):
    """The chunk size of a call, before it is cut to the length of the sequence, and where it comes from."""

    chunk_size: int
    reason: str

    def __str__(self) -> str:
        return f"chunks of {self.chunk_size}: {self.reason}"


class Table(NamedTuple):
    """One file: entries by key, and what `measured` says of each."""

    path: Path
    machine: str
    entries: dict[Key, dict[str, Any]]


def size_class(number: int) -> int:
    """The power of four at or above `number`: 2048 tokens are in the class 4096, with 1025 to 4096."""
    bound = 1
    while bound < number:
        bound *= 4
    return bound


def key_of(call: Call, backend: str) -> Key:
    """`KEY` of a call."""
    rows = size_class(call.batch * call.value_heads)
    return (backend, call.op, call.dtype, call.key_size, call.value_size, size_class(call.length), rows)


def tuned(call: Call, backend: str) -> Tuned:
    """The chunk size of a call: the one it names, else that of the device's table, else the default.

    Raises:
      ConfigError: a table is malformed; all mistakes of all tables are listed.
    """
    if call.chunk_size is not None:
        return Tuned(call.chunk_size, "asked for")
    default = DEFAULTS[backend](call)
    table = tables(TABLES).get(call.device)
    if table is None:
        return Tuned(default, f"the default; no tuning table for {call.device}")
    entry = table.entries.get(key_of(call, backend))
    if entry is None:
        return Tuned(default, f"the default; {table.path.name} has no entry for this call")
    return Tuned(entry["chunk_size"], f"tuned, {table.path.name}, measured on {table.machine}")


def device_name(kind: str, device_platform: str) -> str:
    """What tables call a device: JAX's `device_kind`; for a CPU, of which JAX says nothing, its name, vectors and cores."""
    return _processor() if device_platform == "cpu" else kind


@functools.cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(found[1].split()) if (found := re.search(r"^flags\s*:(.+)$", text, re.MULTILINE)) else set()
    vectors = next((shown for flag, shown in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return " ".join(f"{name[1] if name else platform.processor() or platform.machine()} {vectors} {cores} cores".split())


@functools.cache
def tables(directory: Path) -> dict[str, Table]:
    """The tables of a directory, by device. Read once.

    Raises:
      ConfigError: one of them is malformed, or two are of one device; all mistakes are listed.
    """
    found: dict[str, Table] = {}
    wrong: list[str] = []
    for path in sorted(directory.glob("*.json")):
        device, table, mistakes = read(path)
        if device in found:
            mistakes = [*mistakes, f"{found[device].path.name} is of the same device, {device}"]
        wrong += [f"{path}: {sentence}" for sentence in mistakes]
        found[device] = table
    if wrong:
        raise ConfigError("tuning tables are malformed:" + "".join(f"\n  {sentence}" for sentence in wrong))
    return found


def read(path: Path) -> tuple[str, Table, list[str]]:
    """The device and the table of a file, and sentences about what is wrong with it; what is wrong is left out."""
    try:
        text = json.loads(path.read_text())
    except ValueError as error:
        return "", Table(path, "", {}), [f"not JSON: {error}"]
    wrong = _wrong_fields(text, HEAD, "the file")
    if wrong:
        return "", Table(path, "", {}), wrong
    entries: dict[Key, dict[str, Any]] = {}
    for number, entry in enumerate(text["entries"]):
        mistakes = _wrong_fields(entry, FIELDS, "the entry") or _wrong_values(entry)
        if not mistakes:
            key = tuple(entry[name] for name in KEY)
            if key in entries:
                mistakes = ["another entry has the same key"]
            entries[key] = entry
        wrong += [f"entries[{number}]: {sentence}" for sentence in mistakes]
    return text["device"], Table(path, text["machine"], entries), wrong


def _wrong_fields(found: Any, fields: dict[str, type], what: str) -> list[str]:
    if not isinstance(found, dict):
        return [f"{what} is a {type(found).__name__}; expected an object with {', '.join(fields)}"]
    wrong = [f"{what} has no {name}" for name in fields if name not in found]
    wrong += [f"{what} has an unknown field {name!r}; expected {', '.join(fields)}" for name in found if name not in fields]
    # A bool is an int in Python, and a count is no bool.
    return wrong + [
        f"{name} = {found[name]!r}; expected {kind.__name__}"
        for name, kind in fields.items()
        if name in found and type(found[name]) is not kind
    ]


def _wrong_values(entry: dict[str, Any]) -> list[str]:
    backend, chunk = entry["backend"], entry["chunk_size"]
    if backend not in LEGAL:
        return [f"backend = {backend!r}; expected one of {', '.join(LEGAL)}"]
    wrong = []
    least, most = LEGAL[backend]
    if not least <= chunk <= most or chunk & (chunk - 1):
        wrong.append(f"chunk_size = {chunk}; {backend} takes powers of two from {least} to {most}")
    wrong += [
        f"{name} = {entry[name]}; expected a power of four, the class of a size"
        for name in ("length", "rows")
        if entry[name] != size_class(entry[name])
    ]
    return wrong
