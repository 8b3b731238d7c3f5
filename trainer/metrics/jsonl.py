"""`metrics.jsonl`: the truth that every mirror can be rebuilt from. Imports no JAX.

One JSON object a line: `step`, `split` (`train`, `val` or `diagnostics`), then numbers, then `timing`, an object of everything
that may differ between two runs of the same config and seed. Floats are written so that they read back bit for bit. JSON has no
NaN or infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", which `float()` understands and
`read_metrics` turns back into floats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import StrataError

SPLITS = ("train", "val", "diagnostics")
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends rows; each is with the operating system when `write` returns, and on the disk after `flush`.

    A last line that a crash cut short is dropped when the file is opened.

    Args:
      path: made if missing.

    Raises:
      StrataError: the file cannot be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self._file = open(self.path, "r+b" if self.path.exists() else "x+b", buffering=0)
            self._offset = _end_of_last_line(self._file)
            self._cut(self._offset)
        except OSError as error:
            raise self._error(error) from error

    @property
    def offset(self) -> int:
        """Bytes of complete rows. A checkpoint stores it; `truncate` goes back to it."""
        return self._offset

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row.

        Args:
          row: `step` (int), `split`, numbers (Python, NumPy or zero-dimensional arrays; also lists and dicts of them), and
            `timing`, where strings are allowed too.

        Raises:
          ValueError: `step` or `split` is missing or wrong, or a value is not a number; nothing is written.
          StrataError: the disk is full or the file not writable; earlier rows are untouched.
        """
        data = (encode(row) + "\n").encode()
        try:
            written = self._file.write(data)
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            self._cut(self._offset)
            raise self._error(error) from error
        self._offset += len(data)

    def flush(self) -> None:
        """Returns when every row is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._error(error) from error

    def truncate(self, offset: int) -> None:
        """Drops the rows after `offset`, those that a resumed run is going to write again.

        Raises:
          StrataError: the file is shorter than that, or `offset` is not the end of a row: it is not the file that the
            checkpoint was saved with.
        """
        if offset > self._offset:
            raise StrataError(
                f"{self.path} has {self._offset} bytes of rows, the checkpoint was saved with {offset}: rows are missing"
            )
        if offset:
            self._file.seek(offset - 1)
            if self._file.read(1) != b"\n":
                raise StrataError(f"{self.path} has no row that ends at byte {offset}: it was changed since the checkpoint")
        self._cut(offset)
        self._offset = offset
        self.flush()

    def close(self) -> None:
        """`flush`, then closes the file; may be called twice."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, offset: int) -> None:
        self._file.truncate(offset)
        self._file.seek(offset)

    def _error(self, error: OSError) -> StrataError:
        return StrataError(f"the metrics in {self.path} cannot be written: {error.strerror}")


def encode(row: Mapping[str, Any]) -> str:
    """One row as a line of JSON without its newline: `step`, `split`, the numbers in the order given, `timing` last.

    Raises:
      ValueError: as in `MetricsWriter.write`.
    """
    step, split = row.get("step"), row.get("split")
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise ValueError(f"a row of metrics needs an integer step, got {step!r}")
    if split not in SPLITS:
        raise ValueError(f"a row of metrics needs a split, one of {SPLITS}, got {split!r}")
    numbers = {key: _plain(key, value) for key, value in row.items() if key not in ("step", "split", "timing")}
    timing = {key: _plain(key, value, text=True) for key, value in row.get("timing", {}).items()}
    tree = {"step": step.__index__(), "split": split, **numbers, **({"timing": timing} if timing else {})}
    return json.dumps(tree, allow_nan=False, separators=(", ", ": "))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete rows of a file, floats equal bit for bit to those written; a torn last line is left out.

    Raises:
      StrataError: the file is missing, or a line in it is not a row; the message has the line's number.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StrataError(f"the metrics in {path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            row["step"], row["split"]
        except (ValueError, KeyError, TypeError) as error:
            raise StrataError(f"line {number} of {path} is not a row of metrics: {line[:80]!r}") from error
        rows.append({key: value if key in ("split", "timing") else _restored(value) for key, value in row.items()})
    return rows


def end_of_rows(path: str | os.PathLike[str], offset: int, step: int, split: str) -> int:
    """Where the rows of a step and split end that begin at `offset`, in bytes; `offset` if there are none."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:
                break
            if (row.get("step"), row.get("split")) != (step, split):
                break
            offset += len(line)
    return offset


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under the names that mirrors use: `train/loss`, `train/alpha/0`, `timing/mfu`.

    Of a row of diagnostics only the numbers that stand alone: thousands of curves, one a layer, head or pair of layers, would
    bury the others. `python -m trainer.inspect` draws them.
    """
    listed = row["split"] != "diagnostics"
    found: dict[str, float] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                collect(f"{name}/{key}", item)
        elif isinstance(value, list | tuple) and listed:
            for index, item in enumerate(value):
                collect(f"{name}/{index}", item)
        elif isinstance(value, int | float):
            found[name] = value

    for key, value in row.items():
        if key not in ("step", "split", "timing"):
            collect(f"{row['split']}/{key}", value)
    # Evaluation has its own speed; it must not appear as a dip in the training curve.
    collect("timing" if row["split"] == "train" else f"timing/{row['split']}", row.get("timing", {}))
    return found


def _plain(key: str, value: Any, *, text: bool = False) -> Any:
    if hasattr(value, "tolist"):  # NumPy scalars, and NumPy or JAX arrays
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int) or (text and isinstance(value, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{key}.{name}", item, text=text) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, item, text=text) for item in value]
    raise ValueError(f"metric {key} = {value!r} is not a number")


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if isinstance(value, dict):
        return {name: _restored(item) for name, item in value.items()}
    return value


def _end_of_last_line(file: Any) -> int:
    """The byte after the last newline."""
    position = file.seek(0, os.SEEK_END)
    while position:
        start = max(0, position - 65536)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0
