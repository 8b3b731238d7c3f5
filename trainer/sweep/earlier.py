"""Runs that only an earlier report knows, since their directories are gone: another machine's, or a disk's that was cleared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import ConfigError
from trainer.atomic_files import write_bytes_atomic
from trainer.sweep.experiment import Metric
from trainer.sweep.outcome import OVER, Outcome
from trainer.sweep.plan import Run


class Earlier:
    """A `report.json` of the same experiment, to take from it what there is no run directory for.

    A run is the same if its directory has the same name, which is a hash of its config and its seed. Curves are not in a
    report: a run known from one has its numbers and is in no figure of curves, and no other run can start from it.

    Args:
      path: of the `report.json`.

    Raises:
      ConfigError: the file is none, or its runs have no numbers, as in reports of versions before 0.2.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._text = self.path.read_text()
            content = json.loads(self._text)
            self.title, self.scale, self.made, self.rules = (content[key] for key in ("title", "scale", "made", "rules"))
            over = [run | {"numbers": dict(run["numbers"])} for run in content["runs"] if run["state"] in OVER]
            self.runs: dict[str, Mapping[str, Any]] = {run["directory"]: run for run in over}
        except OSError as error:
            raise ConfigError(f"--earlier {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--earlier {path}: not a report.json whose runs have numbers ({type(error).__name__}: {error})"
            ) from None

    def check(self, title: str, scale: str) -> None:
        """Raises `ConfigError` if the report is of something else."""
        if (self.title, self.scale) != (title, scale):
            raise ConfigError(f"--earlier {self.path} is of {self.title} at scale {self.scale}, this one of {title} at {scale}")

    def outcome(self, run: Run) -> Outcome | None:
        """What the report says of a run; None if it has none that is over."""
        known = self.runs.get(run.directory)
        return None if known is None else Outcome(known["state"], known["step"], known["message"])

    def score(self, run: Run, metric: Metric) -> float | None:
        """The number of a run that the report has as finished."""
        known = self.runs.get(run.directory)
        found = None if known is None or known["state"] != "finished" else known["numbers"].get(metric.label)
        return None if found is None else found[0]

    def keep(self, path: Path) -> None:
        """Copy the report, so that a sweep does not depend on where it was."""
        write_bytes_atomic(path, self._text.encode())
