"""What figures draw of runs, kept in a file beside the report: curves outlive run directories as the numbers do.

`report.curves.jsonl` has rows in the form of `metrics.jsonl` with the run's directory as `run` before them, so that
`pandas.read_json(..., lines=True)` reads it. Evaluations are whole. Of training rows and of numbers over layers there are at
most `MOST` a run, spread evenly, with `DIGITS` digits: enough to draw, and no number is taken from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from trainer.metrics.jsonl import encode
from trainer.report.heat_maps import arrays
from trainer.report.records import Record
from trainer.report.results import Results
from trainer.sweep import outcome as outcomes
from trainer.sweep.changes import flat
from trainer.sweep.experiment import Metric

MOST = 64
DIGITS = 5

T = TypeVar("T")


def curves(results: Results) -> str:
    """The file's content: the finished runs that are compared, in the order of the arms."""
    names = curve_names(results)
    lines = []
    for arm in results.arms:
        for record in results.with_rows(arm.name):
            if record.state == "finished":
                for row in drawn_rows(record, names):
                    lines.append(json.dumps({"run": record.directory.name} | json.loads(encode(row)), separators=(",", ":")))
    return "".join(f"{line}\n" for line in lines)


def curve_names(results: Results) -> list[tuple[str, str]]:
    """Split and name of what is drawn by step: the metric itself, and the training loss."""
    names = [(results.metric.split, results.metric.name), ("train", "loss")]
    names += [(metric.split, metric.name) for metric in results.also if metric.kind == "value"]
    return list(dict.fromkeys(names))


def drawn_rows(record: Record, names: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of a run that hold no more than figures draw: `names` and numbers over layers, thinned, and every evaluation."""
    found: dict[tuple[int, str], dict[str, Any]] = {}

    def put(step: int, split: str, name: str, value: Any) -> None:
        found.setdefault((step, split), {"step": step, "split": split})[name] = value

    for row in record.rows:
        if row["split"] == "val":
            numbers = flat({name: value for name, value in row.items() if name not in ("step", "split", "timing")})
            for name, value in numbers.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    put(row["step"], "val", name, value)
    for split, name in names:
        if split != "val":
            for step, value in _thinned(outcomes.series(record.rows, Metric(name, split))):
                put(step, split, name, _rounded(value))
    for (split, name), table in arrays(record).items():
        for step, vector in _thinned(table):
            put(step, split, name, [_rounded(value) for value in vector.tolist()])
    return [found[key] for key in sorted(found)]


def _thinned(points: Sequence[T]) -> list[T]:
    if len(points) <= MOST:
        return list(points)
    return [points[index] for index in np.linspace(0, len(points) - 1, MOST).round().astype(int)]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
