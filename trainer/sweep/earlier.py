"""Runs that only an earlier report knows, since their directories are gone: another machine's, or a disk's that was cleared."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import ConfigError, StrataError
from trainer.atomic_files import write_bytes_atomic
from trainer.metrics.jsonl import read_metrics
from trainer.sweep.experiment import Metric
from trainer.sweep.outcome import OVER, Outcome, series, value
from trainer.sweep.plan import Run

LASTING = (
    "were changed after",
    "is not what it was when",
    "were given on the command line",
    "were made with another",
    "runs shared the machine with others",
)
"""In warnings about how runs came about that stands in ledgers and run directories alone: they go on from report to report.
All others are found again in what a report keeps, or are of that report and no run.
"""

OF_ROWS = "different amounts of held-out data"
"""In warnings that are found again in evaluations, where the report has kept them."""

SAID = "the earlier report said: "


@dataclasses.dataclass(frozen=True)
class Known:
    """A run that is over, as the report has it.

    Attributes:
      numbers: by label of a metric: the value, NaN if it is not finite, and whether it is only a bound.
      rows: what the report kept to draw (`trainer.report.curves`): evaluations whole, the rest thinned.
      versions, modules, machine, environment: as of a `trainer.report.records.Record`.
    """

    found: Outcome
    numbers: Mapping[str, tuple[float, bool]]
    rows: list[dict[str, Any]]
    config: Mapping[str, Any]
    versions: tuple[str, ...]
    modules: tuple[tuple[str, str], ...]
    machine: str
    environment: Mapping[str, Any]

    def has(self, metric: Metric) -> bool:
        """Whether the number of a metric is here, or can be taken from the evaluations that are."""
        return metric.label in self.numbers or (not needs_training_rows(metric) and bool(series(self.rows, metric)))

    def number(self, metric: Metric) -> float | None:
        """Of a metric of kind `value`, for tuning to go by; None if there is none."""
        planned = self.found.extended_from(self.config.get("train", {"steps": 0})["steps"])
        if planned is not None and metric.last_evaluation:  # reports of earlier versions took an earlier row
            return value(self.rows, metric, planned)
        return self.numbers.get(metric.label, (None,))[0]


def needs_training_rows(metric: Metric) -> bool:
    """Of which a report keeps only so many as a figure needs."""
    return metric.split != "val" or metric.kind == "seconds_to"


class Earlier:
    """A `report.json` of the same experiment, to take from it what there is no run directory for.

    A run is the same if its directory has the same name, which is a hash of its config and its seed, and it was to make as many
    updates. It has its numbers and, where the report kept them beside it, its curves; no other run can start from it.

    Args:
      path: of the `report.json`; the curves are in the file of the same name that ends with `.curves.jsonl`, if it is there.

    Raises:
      ConfigError: a file is none of these, or the runs have no numbers, as in reports of versions before 0.2.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._text = self.path.read_text()
            content = json.loads(self._text)
            self.title, self.scale, self.made, self.rules = (content[key] for key in ("title", "scale", "made", "rules"))
            self.changes: Mapping[str, Any] = dict(content["changes"])
            rows = _read_curves(curves_beside(self.path))
            lasting = LASTING if rows else (*LASTING, OF_ROWS)
            said = (text.removeprefix(SAID) for text in content["warnings"] if any(words in text for words in lasting))
            self.caveats = tuple(dict.fromkeys(said))
            self._runs = {
                run["directory"]: _known(run, rows.get(run["directory"], [])) for run in content["runs"] if run["state"] in OVER
            }
        except OSError as error:
            raise ConfigError(f"earlier report {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"earlier report {path}: not a report.json whose runs have numbers ({type(error).__name__}: {error})"
            ) from None

    def check(self, title: str, scale: str, metric: Metric) -> None:
        """Raises `ConfigError` if the report is of something else, or its runs are compared by something else."""
        if (self.title, self.scale) != (title, scale):
            raise ConfigError(
                f"earlier report {self.path} is of {self.title} at scale {self.scale}, this one of {title} at {scale}"
            )
        labels = {label for known in self._runs.values() for label in known.numbers}
        if labels and metric.label not in labels:
            raise ConfigError(
                f"earlier report {self.path}: no run in it has the number that runs are compared by here, {metric.label}; "
                f"they have {', '.join(sorted(labels))}"
            )

    def find(self, run: Run) -> Known | None:
        """What the report has of a run that is over there; None if nothing, or of a run of another length."""
        known = self._runs.get(run.directory)
        if known is None or (run.kind == "train" and known.config["train"]["steps"] != run.steps):
            return None
        return known

    def unknown_to(self, other: Earlier) -> list[str]:
        """Directories of runs that another report has nothing of."""
        return [name for name in self._runs if name not in other._runs]

    def keep(self, path: Path) -> None:
        """Copy the report and its curves, so that a sweep does not depend on where they were."""
        there, here = curves_beside(self.path), curves_beside(path)
        if there.is_file():
            write_bytes_atomic(here, there.read_bytes())
        else:
            here.unlink(missing_ok=True)
        write_bytes_atomic(path, self._text.encode())


def curves_beside(report: Path) -> Path:
    """Where the curves of a report are: `report.curves.jsonl` for `report.json`."""
    return report.with_suffix(".curves.jsonl")


def _read_curves(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by run; none where a report has none beside it."""
    found: dict[str, list[dict[str, Any]]] = {}
    if path.is_file():
        try:
            for row in read_metrics(path):
                found.setdefault(row.pop("run"), []).append(row)
        except KeyError:
            raise ConfigError(f"earlier report: a row in {path} does not say of which run it is") from None
        except StrataError as error:
            raise ConfigError(f"earlier report: {error}") from None
    return found


def _known(run: Mapping[str, Any], rows: list[dict[str, Any]]) -> Known:
    if not isinstance(run["config"].get("train", {"steps": 0})["steps"], int):
        raise ValueError("train.steps is no number")
    return Known(
        Outcome(str(run["state"]), int(run["step"]), str(run["message"])),
        {
            str(label): (math.nan if number is None else float(number), bool(bound))
            for label, (number, bound) in run["numbers"].items()
        },
        rows,
        run["config"],
        tuple(run["versions"]),
        tuple(run["modules"].items()),
        str(run["machine"]),
        dict(run["environment"]),
    )
