"""`ledger.jsonl`: what a sweep did, in the order it happened; rows are only ever appended. Imports no JAX.

    {"event": "plan",  "time", "experiment", "scale", "rules", "runs", ...}        at every start of the launcher
    {"event": "start", "time", "run", "arm", "seed", "stage", "attempt", "pid", "slot"}
    {"event": "end",   "time", "run", "arm", "seed", "stage", "outcome", "step", "exit", "message", "seconds"}

The run directories are the truth; the ledger says when and where, and why a run is not there.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from strata import StrataError

NAME = "ledger.jsonl"
FIELDS: dict[str, dict[str, type]] = {
    "plan": {"rules": list},
    "start": {"run": str},
    "end": {"run": str, "outcome": str, "step": int},
}
"""What readers count on, by event."""


class Ledger:
    """Appends rows; several processes may do so at once (the tasks of a Slurm array).

    Args:
      directory: of the sweep; made if missing.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = Path(directory) / NAME

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """One row, on the disk when this returns; a last line that a crash cut short is dropped first.

        Raises:
          StrataError: the file cannot be written.
        """
        row = {"event": event, "time": round(time.time(), 3), **fields}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                    if file.read(1) != b"\n":
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                file.write((json.dumps(row) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StrataError(f"the ledger {self.path} cannot be written: {error.strerror}") from error
        return row

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; none where there is no file.

        Raises:
          StrataError: a line before the last is no row; the message has its number.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StrataError(f"the ledger {self.path} cannot be read: {error.strerror}") from error
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                whole = isinstance(row["time"], int | float) and all(
                    isinstance(row[name], kind) for name, kind in FIELDS.get(row["event"], {}).items()
                )
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise StrataError(f"line {number} of {self.path} is not a row of a ledger: {line[:80]!r}")
            found.append(row)
        return found


def by_run(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What became of each run: arm, seed, stage, outcome and step of its last end, without when and how often.

    Two launches that were interrupted differently agree here once both are through.
    """
    kept = ("arm", "seed", "stage", "outcome", "step")
    return {run: {name: row.get(name) for name in kept} for run, row in last_ends(rows).items()}


def last_ends(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The last `end` of each run."""
    return {row["run"]: row for row in rows if row["event"] == "end"}


def given_up(end: Mapping[str, Any] | None) -> bool:
    """Whether the last end of a run says that it failed and was not to be tried again."""
    return end is not None and end.get("outcome") == "failed" and not end.get("again")


def unfinished(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Starts without an end, by run: running now, or gone without a word."""
    open_starts: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["event"] == "start":
            open_starts[row["run"]] = row
        elif row["event"] == "end":
            open_starts.pop(row["run"], None)
    return open_starts
