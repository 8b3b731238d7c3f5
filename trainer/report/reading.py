"""The results of an experiment: its plan, and what the run directories hold. Reads them and nothing else; imports no JAX."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from strata import ConfigError, to_tree
from trainer import config as configuration
from trainer.report.promises import changed_rules
from trainer.report.records import Record, make_record, read_json
from trainer.report.results import Results
from trainer.report.unplanned import of_directory
from trainer.sweep.earlier import SAID, Earlier
from trainer.sweep.ledger import last_ends
from trainer.sweep.place import Place, read_plan, rules_of
from trainer.sweep.plan import Plan, Run, make_plan
from trainer.sweep.reading import read
from trainer.sweep.space import read_seeds


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
        return of_directory(path)
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
