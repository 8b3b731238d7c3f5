"""From results to everything a report says, as plain data: the Markdown, the page and `report.json` show the same object."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections import Counter
from typing import Any

from trainer.report import statistics
from trainer.report.caveats import warnings
from trainer.report.records import Record
from trainer.report.results import Results
from trainer.report.statistics import Summary
from trainer.report.verdicts import Evidence, Verdict, decide
from trainer.sweep.experiment import Claim, Metric, Rule
from trainer.sweep.needs import needed
from trainer.sweep.outcome import OVER


@dataclasses.dataclass
class ArmRow:
    """One arm in the table: how its runs ended, and a summary of each metric over the finished ones."""

    name: str
    control: str
    planned: int
    states: dict[str, int]
    summaries: list[Summary]
    values: list[dict[int, float]]  # by seed, one a metric
    bounds: list[int]  # values that are only bounds
    not_finite: list[int]  # finished runs whose number is NaN or infinite, one a metric
    tokens: int
    versions: dict[str, int]
    machines: dict[str, int]
    chosen: str = ""  # the point that tuning took


@dataclasses.dataclass
class Report:
    """What is known, and how well."""

    results: Results
    metrics: list[Metric]
    arms: list[ArmRow]
    verdicts: list[Verdict]
    warnings: list[str]  # what a reader must know before any number
    made: str

    @property
    def finished(self) -> bool:
        """Whether every planned run has ended."""
        return not self.results.unfinished and not self.results.later


def analyse(results: Results) -> Report:
    """Summarise every arm and decide every claim."""
    metrics = [results.metric, *results.also]
    arms = [_arm(results, name.name, name.control, metrics) for name in results.arms]
    verdicts = decide([evidence(results, claim) for claim in results.claims])
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Report(results, metrics, arms, verdicts, warnings(results), made)


def _arm(results: Results, name: str, control: str, metrics: list[Metric]) -> ArmRow:
    records = results.of(name)
    summaries, values, bounds = [], [], []
    for metric in metrics:
        known = {seed: found for seed, found in results.values(name, metric).items() if found is not None}
        values.append({seed: number for seed, (number, _) in known.items()})
        bounds.append(sum(bound for _, bound in known.values()))
        summaries.append(statistics.summarise(list(values[-1].values())))
    chosen = next((choice.chosen for choice in results.choices if choice.arm == name), None)
    return ArmRow(
        name=name,
        control=control,
        planned=len(records) or (len(results.seeds) if results.later else 0),
        states=dict(Counter(record.state for record in records)),
        summaries=summaries,
        values=values,
        bounds=bounds,
        not_finite=[len(results.not_finite(name, metric)) for metric in metrics],
        tokens=max((record.tokens for record in records), default=0),
        versions=dict(Counter(version for record in records for version in record.versions)),
        machines=dict(Counter(record.machine for record in records if record.machine)),
        chosen=chosen or "",
    )


def evidence(results: Results, claim: Claim) -> Evidence:
    """The pairs of a claim; a pair is there where both runs of a seed finished with a number.

    A target that one arm alone did not reach gives that arm no credit: the improvement is at most 0 where it is the claim's own
    arm (at most the loss that the rule allows), at least 0 where it is the other. Where neither reached it, the pair has no
    number. A run that finished with a number that is not finite has diverged: leaving it out would favour its arm.
    """
    metric = claim.metric or results.metric
    one, two = results.of(claim.arm), results.of(claim.against)
    a, b = results.values(claim.arm, metric), results.values(claim.against, metric)
    shared = sorted(seed for seed in a.keys() & b.keys() if a[seed] is not None and b[seed] is not None)
    neither = [seed for seed in shared if a[seed][1] and b[seed][1]]
    shared = [seed for seed in shared if seed not in neither]
    planned = len(results.seeds)
    unfinished = sum(record.state not in OVER for record in [*one, *two])
    unfinished += planned * ((not one) + (not two))
    not_finite = tuple(len(results.not_finite(name, metric)) for name in (claim.arm, claim.against))
    diverged = (sum(record.state == "diverged" for record in side) for side in (one, two))
    return Evidence(
        claim=claim,
        seeds=tuple(shared),
        improvements=tuple(_improvement(claim.rule, metric.sign, a[seed], b[seed]) for seed in shared),
        planned=planned,
        unfinished=unfinished,
        failed=sum(record.state == "failed" for record in [*one, *two]),
        diverged=tuple(map(sum, zip(diverged, not_finite, strict=True))),
        not_finite=not_finite,
        no_number=sum(found is None for found in [*a.values(), *b.values()]) - sum(not_finite),
        missed=(sum(a[seed][1] for seed in shared), sum(b[seed][1] for seed in shared)),
        both_missed=len(neither),
        others=tuple(b[seed][0] for seed in shared),
        untuned=_untuned(results, (claim.arm, claim.against)),
    )


def _untuned(results: Results, names: tuple[str, str]) -> tuple[str, ...]:
    """Arms of a claim that are not tuned, in an experiment that tunes others or, at another scale, these."""
    if all(arm.tune is None for arm in results.arms):
        return ()
    tuned = {arm.name for arm in results.arms if arm.tune and arm.tune.at(results.scale)}
    # A measurement of a tuned arm has what was tuned.
    tuned |= {arm.name for arm in results.arms if arm.measure and (donors := needed(arm)) and tuned.issuperset(donors)}
    return tuple(arm.name for arm in results.arms if arm.name in names and arm.name not in tuned)


def _improvement(rule: Rule, sign: int, own: tuple[float, bool], other: tuple[float, bool]) -> float:
    difference = sign * (own[0] - other[0])
    if own[1]:
        return min(0.0 - rule.allowance(other[0]), difference)  # 0, not -0
    return max(0.0, difference) if other[1] else difference


def to_json(report: Report) -> dict[str, Any]:
    """All numbers, and what is needed to run it again; NaN and infinity as null."""
    results = report.results
    return _finite(
        {
            "title": results.title,
            "question": results.question,
            "scale": results.scale,
            "note": results.note,
            "made": report.made,
            "finished": report.finished,
            "warnings": report.warnings,
            "metrics": [dataclasses.asdict(metric) | {"label": metric.label} for metric in report.metrics],
            "arms": [dataclasses.asdict(arm) for arm in report.arms],
            "claims": [_claim(verdict, results) for verdict in report.verdicts],
            "tuning": [dataclasses.asdict(choice) for choice in results.choices],
            "runs": [_run(record, results) for record in results.records],
            "rules": results.rules,
            "changes": uncommitted(results),
            "source": {"file": results.source, "text": results.text, "command": results.command},
        }
    )


def _claim(verdict: Verdict, results: Results) -> dict[str, Any]:
    claim, found = verdict.evidence.claim, verdict
    metric = claim.metric or results.metric
    return {
        "statement": claim.statement,
        "source": claim.source,
        "arm": claim.arm,
        "against": claim.against,
        "metric": metric.label,
        "rule": str(claim.rule),
        "verdict": found.word,
        "why": found.why,
        "scale": results.scale,
        "tokens": results.tokens(claim.arm),
        "pairs": len(found.evidence.improvements),
        "planned": found.evidence.planned,
        "seeds": found.evidence.seeds,
        "improvements": found.evidence.improvements,
        "mean": found.summary.mean,
        "sd": found.summary.sd,
        "interval95": [found.summary.low, found.summary.high],
        "family_level": found.level,
        "family_interval": found.family,
        "p": found.p,
        "p_holm": found.adjusted,
        "p_sign_flip": found.sign_flip.two_sided if found.sign_flip else None,
        "hedges_g": found.standardised,
        "relative": relative_effect(verdict, results),
        "factor": factor(verdict, results),
        "paper_effect": claim.paper_effect,
        "paper_setting": claim.paper_setting,
        "effect_worth_seeing": found.effect,
        "smallest_effect": found.smallest,
        "pairs_needed": found.needed,
        "failed": found.evidence.failed,
        "diverged": found.evidence.diverged,
        "not_finite": found.evidence.not_finite,
        "no_number": found.evidence.no_number,
        "missed": found.evidence.missed,
        "both_missed": found.evidence.both_missed,
        "not_tuned": found.evidence.untuned,
    }


def uncommitted(results: Results) -> dict[str, dict[str, Any]]:
    """By code version, what was changed since its revision: a diff, the names of new files, and digests of Python ones."""
    found = {}
    for record in results.records:
        source = record.environment.get("source") or {}
        if record.versions and (source.get("diff") or source.get("untracked")):
            kept = ("diff", "untracked", "contents")
            found[record.versions[0]] = {key: source[key] for key in kept if key in source}
    return found


def relative_effect(verdict: Verdict, results: Results) -> float:
    """The mean improvement as a share of the other arm's mean over the same seeds; NaN without pairs, or of a logarithm."""
    claim, pairs = verdict.evidence.claim, verdict.evidence
    metric = claim.metric or results.metric
    if _log_base(metric) is not None:
        return math.nan
    values = results.values(claim.against, metric)
    base = [values[seed][0] for seed in pairs.seeds]
    mean = math.fsum(base) / len(base) if base else math.nan
    return verdict.summary.mean / abs(mean) if base and mean else math.nan


def factor(verdict: Verdict, results: Results) -> float:
    """What the mean improvement of a logarithm stands for: geometric mean of the ratios of the two arms, above 1 in the claim's
    direction. NaN without pairs, or where the metric is no logarithm.
    """
    base = _log_base(verdict.evidence.claim.metric or results.metric)
    return math.nan if base is None or not verdict.evidence.seeds else base**verdict.summary.mean


def _log_base(metric: Metric) -> float | None:
    """Steps and seconds to a logarithm are none."""
    return metric.log_base if metric.kind == "value" else None


def _run(record: Record, results: Results) -> dict[str, Any]:
    # What is reached when another arm's run is counted in is not the run's own.
    metrics = [metric for metric in results.metrics if not isinstance(metric.target, str)]
    numbers = {metric.label: results.number(record, metric) for metric in metrics}
    names = ("python", "packages", "platform", "devices", "cpus", "processor", "variables", "data")
    kept = {k: v for k, v in record.environment.items() if k in names}
    return {
        "arm": record.arm,
        "seed": record.seed,
        "stage": record.stage,
        "point": record.point,
        "directory": record.directory.name,
        "state": record.state,
        "step": record.found.step,
        "message": record.found.message,
        "tokens": record.tokens,
        "numbers": {label: found for label, found in numbers.items() if found} if record.state == "finished" else {},
        "command": record.command,
        "versions": record.versions,
        "modules": dict(record.modules),
        "machine": record.machine,
        "environment": kept,
        "config": record.config,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
