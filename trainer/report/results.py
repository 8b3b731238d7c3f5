"""What run directories hold, arranged by arm and seed. Reads them and nothing else; imports no JAX."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from strata import ConfigError, to_tree
from trainer import config as configuration
from trainer.report.promises import changed_rules
from trainer.report.records import Record, make_record, read_json
from trainer.sweep import outcome as outcomes
from trainer.sweep.changes import flat
from trainer.sweep.earlier import SAID, Earlier, needs_training_rows
from trainer.sweep.experiment import Arm, Claim, Metric
from trainer.sweep.ledger import last_ends
from trainer.sweep.needs import with_needed
from trainer.sweep.outcome import outcome
from trainer.sweep.place import Place, read_plan, rules_of
from trainer.sweep.plan import Choice, Plan, Run, make_plan
from trainer.sweep.reading import read
from trainer.sweep.space import label, read_seeds


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


def read_results(target: str, *, scale: str | None = None, runs: str = "runs", earlier: str | Path | None = None) -> Results:
    """Of an experiment file, a sweep's directory, or a directory of run directories.

    Args:
      target: path of one of these.
      scale: of an experiment file; None: laptop, or its first.
      runs: where run directories are.
      earlier: a `report.json` for runs of an experiment file that are not there (`trainer.sweep.earlier`); None: the one that
        the sweep was started with, if it was.

    Raises:
      ConfigError: it is none of these, or holds no runs; or as `Earlier`.
    """
    path = Path(target)
    if path.is_dir():
        if earlier is not None:
            raise ConfigError(f"--earlier needs the experiment's file, and {target} is a directory")
        if (path / "plan.json").is_file():
            return _of_sweep(path)
        return _of_directory(path)
    source = read(target)
    name = source.experiment.choose_scale(scale)
    before = None if earlier is None else Earlier(earlier)
    if before is not None:
        before.check(source.experiment.name, name, source.experiment.metric)
    place = Place(runs, f"{source.experiment.name}-{name}", before)
    return of_plan(make_plan(source, name, score=place.score(source.experiment.metric), runs_at=place.runs), place)


def _of_sweep(path: Path) -> Results:
    """As the last start of the launcher left it: with the file as it was then, and the runs that it planned."""
    plan = read_plan(path)
    results = of_plan(plan, Place(path.resolve().parent.parent, path.resolve().name))
    file = plan.source.path
    if file.is_file() and file.read_text(encoding="utf-8", errors="replace") != plan.source.text:
        results.notes.append(f"{file} has changed since the sweep was last started; this report goes by what it was then")
    return results


def of_plan(plan: Plan, place: Place) -> Results:
    """The runs of a plan, in whatever state they are."""
    rows = place.ledger.rows()
    ends = last_ends(rows)
    records = [
        make_record(
            place.directory(run),
            place.outcome(run, ends),
            arm=run.arm,
            seed=run.seed,
            stage=run.stage,
            point=run.point,
            config=json.loads(run.config),
            command=run.command,
            steps=run.steps,
            tokens=run.tokens,
        )
        for run in plan.runs
    ]
    notes = [*plan.notes, *_foreign_configs(records), *changed_rules(plan, rows)]
    for run, record in zip(plan.runs, records, strict=True):
        record.config, record.command = json.loads(_anywhere(run.config, run, place)), _anywhere(run.command, run, place)
    here = {arm.name for arm in plan.arms}
    untested = [claim.statement for claim in plan.claims if not {claim.arm, claim.against} <= here]
    if plan.changes:
        changed = ", ".join(f"{path} = {text}" for path, text in plan.changes)
        which = "every run that trains" if any(arm.measure is not None for arm in plan.arms) else "every run"
        notes.append(f"{which} was changed on the command line: {changed}")
    if plan.source.axes:
        given = ", ".join(f"--sweep.{path}={text}" for path, text in plan.source.axes)
        notes.append(f"seeds or axes were given on the command line, not by the file: {given}")
    notes += _shared_machine(plan, rows) + _remembered(plan, place, records)
    notes += [f"not tested here, since an arm of it is not run: {statement}" for statement in untested]
    flags = [f"--sweep.{path}={text}" for path, text in plan.source.axes]
    flags += [f"--config.{path}={text}" for path, text in plan.changes]
    asked = f"{plan.source.path} --scale {plan.scale_name}"
    known = f"runs/sweeps/{plan.name}" if flags else asked  # of the changes on a command line only the sweep's directory knows
    return Results(
        title=plan.experiment.name,
        question=plan.experiment.question,
        scale=plan.scale_name,
        note=plan.scale.note,
        metric=plan.experiment.metric,
        also=tuple(plan.experiment.also),
        claims=tuple(claim for claim in plan.claims if {claim.arm, claim.against} <= here),
        arms=plan.arms,
        records=records,
        seeds=read_seeds(plan.scale.seeds),
        choices=plan.choices,
        later=plan.later,
        notes=notes,
        source=str(plan.source.path),
        text=plan.source.text,
        command=f"{' '.join([f'python -m trainer.sweep {asked}', *flags])}\npython -m trainer.report {known}",
        rules=rules_of(plan),
    )


def _remembered(plan: Plan, place: Place, records: Sequence[Record]) -> list[str]:
    """Give what an earlier report says of them to the runs that are gone; which these are, and what is not known, in words."""
    earlier = place.earlier
    if earlier is None:
        return []
    taken: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    metrics = {
        metric.label: metric for metric in (*plan.experiment.also, *(c.metric for c in plan.claims if c.metric is not None))
    }
    differences = []
    curveless = 0
    for run, record in zip(plan.runs, records, strict=True):
        known = earlier.find(run)
        if known is None or place.remembered(run) is None or record.state == "running":
            continue
        taken[run.arm] += 1
        if record.state == "finished" and run.stage == "compare":
            lacking.update(label for label, metric in metrics.items() if not known.has(metric))
            curveless += not known.rows
        differences.append((record.config, known.config))
        record.rows = known.rows  # whatever is here: of one that is being made again, a part of a curve
        record.numbers, record.machine = known.numbers, known.machine
        record.versions, record.modules = known.versions, known.modules
        changes = earlier.changes.get(known.versions[0]) if known.versions else None
        record.environment = {**known.environment, **({"source": changes} if changes else {})}
    if not taken:
        return []
    arms = ", ".join(f"{arm} {count}" for arm, count in taken.items())
    started = [{"event": "plan", "rules": earlier.rules}, {"event": "end"}]
    return [
        f"{taken.total()} runs are known from an earlier report alone, made {earlier.made[:10]}; their directories were not "
        f"read{f', and {curveless} are in no curve' if curveless else ''} ({arms})",
        *(f"of {count} of them {label} is not known" for label, count in sorted(lacking.items())),
        *_differences(differences),
        *(f"{note} for the earlier report" for note in changed_rules(plan, started)),
        *(f"{SAID}{text}" for text in earlier.caveats),
    ]


def _anywhere(text: str, run: Run, place: Place) -> str:
    """What names other runs, with their directories where sweeps keep them by default: a report is read on other machines."""
    for name in run.needs:
        text = text.replace(f"{place.runs}/{name}", f"runs/{name}")
    return text


def _foreign_configs(records: Sequence[Record]) -> list[str]:
    """Of run directories whose config differs from the planned one in keys that are not part of the identity."""
    found = ((record.config, read_json(record.directory / "config.json")) for record in records)
    return _differences((planned, there) for planned, there in found if there is not None)


def _differences(configs: Iterable[tuple[Any, Any]]) -> list[str]:
    """Of pairs of configs, as planned and as run: in which keys that matter they differ, and how many."""
    notes: Counter[str] = Counter()
    for planned, there in configs:
        keys = _flat_difference(planned, _of_today(there)) if planned != there else ()
        notes.update(key for key in keys if not key.startswith(("log.", "checkpoint.", "diagnostics.", "plugins")))
    return [f"{count} runs were made with another {key} than planned" for key, count in sorted(notes.items())]


def _of_today(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the options that were added since at their defaults, which is how it was run."""
    if "measurement" in config:
        return config
    try:
        return to_tree(configuration.resolve_config(config))
    except ConfigError:  # it has options that are gone
        return config


def _flat_difference(one: Any, two: Any, path: str = "") -> set[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        keys = one.keys() | two.keys()
        return set().union(*(_flat_difference(one.get(k), two.get(k), f"{path}.{k}" if path else k) for k in keys))
    return set() if one == two else {path}


def _shared_machine(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Seconds of runs that ran side by side are not those of a run alone."""
    metrics = [plan.experiment.metric, *plan.experiment.also, *(claim.metric for claim in plan.claims)]
    timed = any(m is not None and (m.kind == "seconds_to" or m.name.startswith("timing.")) for m in metrics)
    slots = [row["slot"] for row in rows if row["event"] == "start" and "slot" in row]
    several = {slot.get("index", 0) for slot in slots if slot.get("cluster", "local") == "local"} - {0}
    if timed and several:
        return ["runs shared the machine with others (more than one slot): their seconds are not those of a run alone"]
    return []


# ---- runs without a plan


def _of_directory(path: Path) -> Results:
    """Every run directory below `path`, grouped by config; no claims."""
    found: dict[tuple[str, str], list[tuple[int, Path, dict[str, Any]]]] = {}
    for file in sorted(path.glob("*/config.json")):
        config = read_json(file)
        if isinstance(config, dict) and "seed" in config:
            group = json.dumps({k: v for k, v in config.items() if k not in ("seed", "log", "checkpoint")}, sort_keys=True)
            name = file.parent.name.split("-")[0]
            found.setdefault((name, group), []).append((config["seed"], file.parent, config))
    if not found:
        raise ConfigError(f"{path} is neither a sweep (no plan.json) nor a directory of run directories")
    configs = {key: {p: v for p, v in flat(json.loads(key[1])).items()} for key in found}
    varying = {
        p for one in configs.values() for p in one if any(other.get(p, "absent") != one[p] for other in configs.values())
    }
    records, arms, taken = [], [], set()
    for key, members in found.items():
        shown = {p: configs[key][p] for p in sorted(varying) if p in configs[key]}
        name = f"{key[0]} {label(shown)}".strip() if len(found) > 1 else key[0]
        while name in taken:
            name += "'"
        taken.add(name)
        arms.append(Arm(name))
        by_seed: dict[int, Path] = {}
        for seed, directory, _ in members:
            if by_seed.setdefault(seed, directory) != directory:
                both = f"{by_seed[seed].name} and {directory.name}"
                raise ConfigError(
                    f"{both} in {path} are one run, of seed {seed}, which would count twice: move one of them away"
                )
        for seed, directory, config in sorted(members, key=lambda member: (member[0], str(member[1]))):
            steps = config.get("train", {}).get("steps", 0)
            data = config.get("data", {})
            records.append(
                make_record(
                    directory,
                    outcome(directory, steps),
                    arm=name,
                    seed=seed,
                    stage="compare",
                    point="",
                    config=config,
                    command=f"python -m trainer --config {directory / 'config.json'} --workdir ANOTHER",
                    steps=steps,
                    tokens=steps * data.get("batch_size", 0) * data.get("sequence_length", 0),
                )
            )
    seeds = tuple(sorted({record.seed for record in records}))
    return Results(
        title=path.resolve().name,
        question="",
        scale="as found",
        note="run directories without a plan: no arms were declared and no claim is decided",
        metric=Metric(unit="nats/token"),
        also=(),
        claims=(),
        arms=arms,
        records=records,
        seeds=seeds,
        source=str(path),
        command=f"python -m trainer.report {path}",
    )
