"""Runs that only an earlier report knows, since their directories are gone: another machine's, or a disk's that was cleared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata import ConfigError
from trainer.report.promises import changed_rules
from trainer.sweep.experiment import Metric
from trainer.sweep.outcome import OVER, Outcome
from trainer.sweep.plan import Plan, Run, Score

if TYPE_CHECKING:
    from trainer.report.results import Results


class Earlier:
    """A `report.json` of the same experiment, to take from it what there is no run directory for.

    A run is the same if its directory has the same name, which is a hash of its config and its seed. Curves are not in a
    report: a run known from one has its numbers and is in no figure of curves.

    Args:
      path: of the `report.json`.

    Raises:
      ConfigError: the file is none, or its runs have no numbers, as in reports of versions before 0.2.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            content = json.loads(self.path.read_text())
            self.title, self.scale, self.made, self.rules = (content[key] for key in ("title", "scale", "made", "rules"))
            over = [run for run in content["runs"] if run["state"] in OVER]
            self._runs = {run["directory"]: run | {"numbers": dict(run["numbers"])} for run in over}
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

    def score(self, metric: Metric, here: Score) -> Score:
        """For `trainer.sweep.plan.make_plan`: tuning runs by what is here, else by the report."""

        def score(run: Run) -> tuple[bool, float | None]:
            ended, value = here(run)
            known = self._runs.get(run.directory)
            if ended or known is None:
                return ended, value
            found = known["numbers"].get(metric.label)
            return True, None if found is None or known["state"] != "finished" else found[0]

        return score

    def fill(self, results: Results, plan: Plan) -> None:
        """Give what the report says of them to the runs that are missing, and say which these are."""
        taken: Counter[str] = Counter()
        for record in results.records:
            known: Mapping[str, Any] | None = self._runs.get(record.directory.name)
            if record.state != "missing" or known is None:
                continue
            taken[record.arm] += 1
            record.found = Outcome(known["state"], known["step"], known["message"])
            record.numbers = {label: (value, bound) for label, (value, bound) in known["numbers"].items()}
            record.versions, record.machine = tuple(known["versions"]), known["machine"]
            record.modules, record.environment = tuple(known["modules"].items()), known["environment"]
        if not taken:
            return
        arms = ", ".join(f"{arm} {count}" for arm, count in taken.items())
        results.notes.append(
            f"{taken.total()} runs are known from an earlier report alone, made {self.made[:10]}; their directories were not "
            f"read, and they are in no curve ({arms})"
        )
        started = [{"event": "plan", "rules": self.rules}, {"event": "end"}]
        results.notes += [f"{note} for the earlier report" for note in changed_rules(plan, started)]
