"""What a sweep will cost: counts exactly, time from runs that were made, work by the model's own formula."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata import StrataError
from trainer.metrics.jsonl import read_metrics
from trainer.sweep.display import minutes
from trainer.sweep.outcome import outcome
from trainer.sweep.place import Place
from trainer.sweep.plan import Plan, Run

if TYPE_CHECKING:
    from trainer.options import Config

UTILISATION = 0.4
"""Share of a GPU's peak at which FLOPs are turned into hours: what good trainers reach (levanter, nanochat: 35 to 54 %)."""
REFERENCE_GPU = "NVIDIA H100 80GB HBM3"


def describe_cost(plan: Plan, place: Place, slots: int) -> list[str]:
    """Lines of text; imports no JAX."""
    states = {run.directory: outcome(place.directory(run), run.steps) for run in plan.distinct}
    todo = [(run, states[run.directory]) for run in place.to_make(plan)]
    known = place.known_alone(plan)
    counts: dict[str, int] = {}
    for run in plan.distinct:
        state = "known from an earlier report" if run.directory in known else states[run.directory].state
        counts[state] = counts.get(state, 0) + 1
    arms, seeds = len(plan.arms), len({run.seed for run in plan.runs if run.stage == "compare"})
    later = f" and {plan.later} that tuning decides" if plan.later else ""
    shown = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    lines = [f"{plan.name}: {len(states)} runs{later}: {arms} arms, {seeds} seeds ({shown})"]
    updates = sum(run.steps - min(found.step, run.steps) for run, found in todo)
    tokens = sum(run.tokens * (1 - min(found.step, run.steps) / run.steps) for run, found in todo if run.steps)
    lines.append(f"to run: {len(todo)} runs, {updates:,} updates, {tokens:,.0f} tokens")
    left = [(run, 1 - min(found.step, run.steps) / run.steps if run.steps else 1.0) for run, found in todo]
    lines.append(_time(plan, place, left, slots))
    return lines


def describe_runs(plan: Plan, place: Place) -> list[str]:
    """A line for each arm, or point of its tuning, with runs to come: their directories and seeds."""
    seeds: dict[tuple[str, str], list[int]] = {}
    ahead = {run.directory for run in place.to_make(plan)}
    for run in plan.runs:
        if run.directory in ahead:
            title = f"{run.arm} [{run.point}]" if run.point else run.arm
            seeds.setdefault((title, f"{run.name}-{run.group}"), []).append(run.seed)
    return [f"  {title}: {group}-s{{{','.join(map(str, own))}}}" for (title, group), own in seeds.items()]


def _time(plan: Plan, place: Place, todo: Iterable[tuple[Run, float]], slots: int) -> str:
    """Wall-clock time from measured steps of runs with the same config, else from what the file expects; `todo` holds each run
    with the share of it that is left.
    """
    known: dict[str, float | None] = {}
    expected = {arm.name: arm.minutes.get(plan.scale_name, plan.scale.minutes) for arm in plan.arms}
    total, unknown, measured, stated = 0.0, 0, 0, 0
    for run, share in todo:
        if run.group not in known:
            known[run.group] = step_seconds(place.runs, run)
        each = known[run.group]
        if each is not None and run.steps:
            total, measured = total + share * each * run.steps, measured + 1
        elif (minutes_each := expected[run.arm]) is not None:
            total, stated = total + share * 60 * minutes_each, stated + 1
        else:
            unknown += 1
    undecided = [expected[choice.arm] for choice in plan.choices if choice.chosen is None]
    if undecided and None not in undecided:  # as many comparison runs of each arm that tuning decides
        count = plan.later - len(plan.waiting)
        total, stated = total + 60 * sum(undecided) * count / len(undecided), stated + count
    for minutes_each in (expected[run.arm] for run in plan.waiting):
        if minutes_each is None:
            unknown += 1
        else:
            total, stated = total + 60 * minutes_each, stated + 1
    words = []
    words += [f"{measured} by steps measured in {place.runs}"] if measured else []
    words += [f"{stated} by what the file expects of a run"] if stated else []
    words += [f"{unknown} of unknown time are not counted"] if unknown else []
    if not words:
        return "time: nothing to run"
    if not (measured or stated):
        return "time: unknown until a run has begun"
    where = f"{slots} slots" if slots > 1 else "1 slot"
    return f"time: about {minutes(total / slots)} in {where} ({', '.join(words)}), starts not counted"


def step_seconds(runs: Path, run: Run) -> float | None:
    """Median seconds of a step over the runs of the same config that are there; None without any."""
    values = []
    for directory in sorted(runs.glob(f"{run.name}-{run.group}-s*")):
        try:
            rows = read_metrics(directory / "metrics.jsonl")
        except StrataError:
            continue
        values += [row["timing"]["step_seconds"] for row in rows if row["split"] == "train" and row.get("timing")]
    return statistics.median(values) if values else None


def describe_work(plan: Plan) -> list[str]:
    """FLOPs of every arm by the model's formula, and what they are on a GPU. Imports JAX and reads tokenizers."""
    import optim
    from trainer import config as configuration
    from trainer.flops import training_flops
    from trainer.metrics.throughput import peak_flops

    found: dict[str, tuple[float, str]] = {}
    assumed = plan.scale.vocabulary
    for run in [*plan.runs, *plan.waiting]:
        if run.kind != "train" or run.group in found:
            continue
        try:
            config = configuration.resolve_config(json.loads(run.config))
            model = _model(config, assumed)
            cuts = optim.cuts(config.optimizer, model, steps=config.train.steps)
            flops = training_flops(model, config.data.sequence_length).expected(cuts)
            found[run.group] = (flops, config.train.precision)
        except StrataError as error:
            found[run.group] = (0.0, str(error).splitlines()[0])
    where = f" (a vocabulary of {assumed:,} where the data is not here)" if assumed else ""
    lines, total, hours = [f"work, forward and backward, by arm{where}:"], 0.0, 0.0
    seen: set[tuple[str, str]] = set()
    for run in [*plan.distinct, *plan.waiting]:
        if run.group not in found:
            continue
        flops, note = found[run.group]
        peak = peak_flops(REFERENCE_GPU, note) if flops else None
        total += flops * run.tokens
        hours += flops * run.tokens / (UTILISATION * peak) / 3600 if peak else 0.0
        if (run.arm, run.point) not in seen:
            seen.add((run.arm, run.point))
            what = f"{flops / 1e6:,.2f} MFLOP a token, {flops * run.tokens:.3g} FLOP a run" if flops else f"unknown: {note}"
            lines.append(f"  {run.arm}{f' [{run.point}]' if run.point else ''}: {what}")
    lines.append(f"  all runs: {total:.3g} FLOP; {hours:,.3g} hours of one {REFERENCE_GPU} at {UTILISATION:.0%} of its peak")
    return lines


def _model(config: Config, assumed: int | None) -> Any:
    """The abstract model of a config; its vocabulary is the assumed one if there is one and the data cannot be read."""
    from models import abstract
    from trainer.setup import assemble

    try:
        return assemble(config).model
    except StrataError:
        if assumed is None:
            raise
    return abstract(config.model, vocab_size=assumed, precision=config.train.precision, remat=config.train.remat)
