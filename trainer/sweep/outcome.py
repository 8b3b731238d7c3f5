"""What became of a run, told from its directory alone: its state, how far it is, and the number it is compared by.

Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strata import StrataError
from trainer.metrics.jsonl import read_metrics
from trainer.run_directory import RunDirectory
from trainer.sweep.experiment import Metric

STATES = ("missing", "running", "finished", "preempted", "broken", "failed", "diverged")
"""`broken`: its process is gone and did not say why. `failed` and `diverged` ended with a reason."""

OVER = ("finished", "diverged", "failed")
"""States that a report does not wait for: a failed run may be started again, but need not be."""

TAIL = 65536
"""Bytes at the end of `metrics.jsonl` that the progress is read from."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The state of one run."""

    state: str
    step: int = 0
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether it will not go on if started again: it is finished, or diverged and would do so once more."""
        return self.state in ("finished", "diverged")

    def extended_from(self, steps: int) -> int | None:
        """`steps`, the updates planned (0: as many as it likes), of a run that went on beyond them; otherwise None."""
        return steps if 0 < steps < self.step else None


def outcome(directory: str | Path, steps: int) -> Outcome:
    """The state of the run in `directory`, which is to make `steps` updates (0: as many as it likes)."""
    run = RunDirectory(directory)
    try:
        status = run.read_status() or {}
    except StrataError as error:
        return Outcome("broken", message=str(error))
    if run.running:
        return Outcome("running", int(status.get("step", 0)))
    if not (run.path / "config.json").is_file():
        return Outcome("missing")
    state, step, message = status.get("state"), int(status.get("step", 0)), str(status.get("message", ""))
    if 0 < steps < step:  # it was extended, and its longer part is another experiment's, however it ended
        return Outcome("finished", step)
    if state == "finished":
        return Outcome("finished" if step >= steps else "preempted", step, message)
    if state == "failed":
        return Outcome("diverged" if message.startswith("Diverged") else "failed", step, message)
    if state == "preempted":
        return Outcome("preempted", step, message)
    return Outcome("broken", step)


def last_rows(directory: str | Path) -> dict[str, dict[str, Any]]:
    """The newest row of each split, read from the end of the file; empty while there is none."""
    try:
        with open(Path(directory) / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in lines[:-1]:
        try:
            row = json.loads(line)
            found[row["split"]] = row
        except (ValueError, KeyError, TypeError):  # the first line of the piece may begin in the middle
            continue
    return found


def row_at(directory: str | Path, step: int) -> dict[str, Any]:
    """The row of a step, of training if there is one, else of held-out data; empty if there is neither."""
    try:
        rows = read_metrics(Path(directory) / "metrics.jsonl")
    except StrataError:
        return {}
    found = {row["split"]: row for row in rows if row["step"] == step}
    return found.get("train") or found.get("val") or {}


def series(rows: Sequence[Mapping[str, Any]], metric: Metric) -> list[tuple[int, float]]:
    """`(step, value)` of the rows of the metric's split that have it."""
    found = [(row["step"], _number(row, metric.name)) for row in rows if row["split"] == metric.split]
    return [(step, float(number)) for step, number in found if isinstance(number, int | float)]


def _number(row: Mapping[str, Any], name: str) -> Any:
    """`row[name]`, or what the dotted path leads to within dicts; None if there is nothing."""
    if name in row:
        return row[name]
    found: Any = row
    for step in name.split("."):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def value(rows: Sequence[Mapping[str, Any]], metric: Metric, extended_from: int | None = None) -> float | None:
    """The number of a run for a metric of kind `value`; None if no row has it, or none is of the step asked for.

    Args:
      extended_from: the updates that were planned, of a run that went on beyond them. Later rows do not count, and its last
        evaluation is the one at that step: an earlier row is of less training.
    """
    points = series(rows, metric)
    if extended_from is not None:
        points = [(step, y) for step, y in points if step <= extended_from]
        if metric.last_evaluation and points and points[-1][0] != extended_from:
            return None
    if isinstance(metric.at, int):
        return next((y for step, y in points if step == metric.at), None)
    if not points:
        return None
    if metric.at == "last":
        return points[-1][1]
    finite = [y for _, y in points if not math.isnan(y)]
    if metric.at == "median":
        return statistics.median(finite) if finite else math.nan
    return (min(finite) if metric.lower_is_better else max(finite)) if finite else math.nan


def crossing(points: Sequence[tuple[float, float]], target: float, lower_is_better: bool = True) -> float | None:
    """Where a curve first reaches `target`, linear between its points; None if it never does."""
    before: tuple[float, float] | None = None
    for x, y in points:
        if y == target or (y < target) == lower_is_better and not math.isnan(y):
            if before is None or not math.isfinite(before[1]):
                return float(x)
            x0, y0 = before
            return x0 + (x - x0) * (target - y0) / (y - y0)
        before = (x, y)
    return None


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """`(step, seconds)` spent in updates up to each training row: compilation, evaluation and saving not counted."""
    found, seconds, last = [], 0.0, 0
    for row in rows:
        if row["split"] == "train" and "step_seconds" in row.get("timing", {}):
            seconds += (row["step"] - last) * float(row["timing"]["step_seconds"])
            last = row["step"]
            found.append((last, seconds))
    return found
