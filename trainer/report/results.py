"""What run directories hold, arranged by arm and seed, and the numbers in them. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from trainer.report.records import Record
from trainer.sweep import outcome as outcomes
from trainer.sweep.earlier import needs_training_rows
from trainer.sweep.experiment import Arm, Claim, Metric
from trainer.sweep.needs import with_needed
from trainer.sweep.plan import Choice


@dataclasses.dataclass
class Results:
    """The runs of an experiment at a scale, and what is asked of them."""

    title: str
    question: str
    scale: str
    note: str
    metric: Metric
    also: tuple[Metric, ...]
    claims: tuple[Claim, ...]
    arms: list[Arm]
    records: list[Record]
    seeds: tuple[int, ...]
    choices: tuple[Choice, ...] = ()
    later: int = 0  # runs that tuning has not decided yet
    notes: list[str] = dataclasses.field(default_factory=list)
    source: str = ""  # the file's path
    text: str = ""  # and content
    command: str = ""  # that runs what is missing, and makes the report
    rules: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def tokens(self, arm: str) -> int:
        """That a run of an arm was trained on; of a measurement, those of the runs that it looks at."""
        own = max((record.tokens for record in self.of(arm)), default=0)
        if own or not any(other.name == arm for other in self.arms):
            return own
        before = with_needed([arm], self.arms)
        return max((record.tokens for record in self.records if record.stage == "compare" and record.arm in before), default=0)

    def of(self, arm: str, stage: str = "compare") -> list[Record]:
        """The runs of an arm, by seed."""
        return sorted((r for r in self.records if r.arm == arm and r.stage == stage), key=lambda r: (r.point, r.seed))

    def with_rows(self, arm: str) -> list[Record]:
        """Runs of an arm that a curve can be drawn of; those that failed or diverged are in no mean."""
        return [record for record in self.of(arm) if record.rows and record.state not in ("failed", "diverged")]

    @property
    def unfinished(self) -> list[Record]:
        """Runs that are still to end."""
        return [record for record in self.records if record.state not in outcomes.OVER]

    @property
    def metrics(self) -> list[Metric]:
        """All that are asked for: the experiment's own, those of the table of arms, and those of claims."""
        return list(dict.fromkeys([self.metric, *self.also, *(claim.metric for claim in self.claims if claim.metric)]))

    # ---- numbers

    def values(self, arm: str, metric: Metric) -> dict[int, tuple[float, bool] | None]:
        """By seed, for every finished run: the number and whether it is only a bound (a target that was not reached).

        None where a finished run has no such number, or it is not finite.
        """
        found: dict[int, tuple[float, bool] | None] = {}
        for record in self.of(arm):
            if record.state == "finished":
                found[record.seed] = self.value(record, metric)
        return found

    def not_finite(self, arm: str, metric: Metric) -> list[int]:
        """Seeds of an arm whose run finished with a number that is NaN or infinite: it has diverged, whatever its state.

        So has one whose own loss, not finite, is what others are to reach.
        """
        metric = _goal(metric) if metric.target == arm else metric
        records = [record for record in self.of(arm) if record.state == "finished"]
        return [r.seed for r in records if (found := self.number(r, metric)) is not None and not math.isfinite(found[0])]

    def value(self, record: Record, metric: Metric) -> tuple[float, bool] | None:
        """As in `values`, of one finished run."""
        found = self.number(record, metric)
        return found if found is not None and math.isfinite(found[0]) else None

    def number(self, record: Record, metric: Metric) -> tuple[float, bool] | None:
        """As `value`, where a number that is not finite is one too."""
        kept = record.numbers and (metric.label in record.numbers or needs_training_rows(metric))
        # Of a run that was extended, reports of earlier versions took the last row before what was planned.
        if kept and not (record.extended_from is not None and metric.last_evaluation):
            return record.numbers.get(metric.label)  # a report keeps evaluations whole, training rows only to draw
        if metric.kind == "value":
            number = outcomes.value(record.rows, metric, record.extended_from)
            return None if number is None else (number, False)
        target = self._target(record.seed, metric)
        points: list[tuple[float, float]] = list(outcomes.series(record.rows, metric))
        if target is None or not points:
            return None
        step = outcomes.crossing(points, target, metric.lower_is_better)
        reached = step is not None
        step = points[-1][0] if step is None else step
        if metric.kind == "seconds_to":
            step = seconds_at(outcomes.training_seconds(record.rows), step)
        return None if step is None else (step, not reached)

    def _target(self, seed: int, metric: Metric) -> float | None:
        if not isinstance(metric.target, str):
            return metric.target
        goal = _goal(metric)
        for record in self.of(metric.target):
            if record.seed == seed and record.state == "finished":
                number = self.value(record, goal)
                return None if number is None else number[0]
        return None


def _goal(metric: Metric) -> Metric:
    """Of steps or seconds to another arm's value: that value."""
    return dataclasses.replace(metric, kind="value", target=None)


def seconds_at(points: Sequence[tuple[float, float]], step: float) -> float | None:
    """Training seconds up to a step, linear between rows."""
    before = (0.0, 0.0)
    for x, y in points:
        if x >= step:
            return before[1] + (y - before[1]) * (step - before[0]) / (x - before[0])
        before = (x, y)
    return None
