"""From results to everything a report says, as plain data: the Markdown, the page and `report.json` show the same object."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections import Counter
from statistics import fmean, stdev
from typing import Any

from trainer.report import statistics
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
    return Report(results, metrics, arms, verdicts, _warnings(results), made)


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
        tokens=max((record.tokens for record in records), default=0),
        versions=dict(Counter(version for record in records for version in record.versions)),
        machines=dict(Counter(record.machine for record in records if record.machine)),
        chosen=chosen or "",
    )


def evidence(results: Results, claim: Claim) -> Evidence:
    """The pairs of a claim; a pair is there where both runs of a seed finished with a number.

    A target that one arm alone did not reach gives that arm no credit: the improvement is at most 0 where it is the claim's own
    arm (at most the loss that the rule allows), at least 0 where it is the other. Where neither reached it, the pair has no
    number.
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
    no_number = sum(found is None for found in [*a.values(), *b.values()])
    return Evidence(
        claim=claim,
        seeds=tuple(shared),
        improvements=tuple(_improvement(claim.rule, metric.sign, a[seed], b[seed]) for seed in shared),
        planned=planned,
        unfinished=unfinished,
        failed=sum(record.state == "failed" for record in [*one, *two]) + no_number,
        diverged=tuple(sum(record.state == "diverged" for record in side) for side in (one, two)),
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


def _warnings(results: Results) -> list[str]:
    found = []
    states = Counter(record.state for record in results.records)
    if results.unfinished or results.later:
        left = len(results.unfinished) + results.later
        total = len(results.records) + results.later
        found.append(
            f"this sweep is not finished: {left} of {total} runs are still to end{_parts_left(results)}, "
            "and no claim is decided before its own have"
        )
    if states["failed"]:
        shown = "; ".join(f"{r.arm} seed {r.seed}: {r.found.message}" for r in results.records if r.state == "failed")
        found.append(f"{states['failed']} runs failed and are in no mean ({shown})")
    if states["diverged"]:
        shown = ", ".join(f"{r.arm} seed {r.seed} at step {r.found.step}" for r in results.records if r.state == "diverged")
        found.append(
            f"{states['diverged']} runs diverged and are in no mean; a claim whose arm diverged more often fails ({shown})"
        )
    versions = Counter(version for record in results.records for version in record.versions)
    if len(versions) > 1:
        found.append(f"runs of {len(versions)} code versions are mixed: {_by_arm(results.records, versions)}")
    for name, digests in _module_versions(results.records).items():
        if len(digests) > 1:
            shown = "; ".join(f"{', '.join(arms)} with {digest[:6]}" for digest, arms in digests.items())
            found.append(f"runs of {len(digests)} versions of the module {name} are mixed: {shown}")
    machines = Counter(record.machine for record in results.records if record.machine)
    if len(machines) > 1:
        found.append(f"runs of {len(machines)} machines are mixed: " + "; ".join(f"{n} on {m}" for m, n in machines.items()))
    for choice in results.choices:
        if lost := [point for point, mean in choice.means.items() if mean is None and choice.chosen is not None]:
            found.append(
                f"the tuning of {choice.arm} chose without {', '.join(lost)}: a run there failed, diverged or has no number"
            )
        if choice.at_edge:
            found.append(
                f"the tuning of {choice.arm} chose {choice.chosen}, at the edge of what was tried: a better one may lie outside"
            )
    if close := _close_tuning(results):
        found.append(f"tuning preferred its point by less than seeds differ, so that another may be as good or better: {close}")
    for metric in [results.metric, *results.also]:
        if results.records and all(record.state == "finished" for record in results.records):
            known = [found for arm in results.arms for found in results.values(arm.name, metric).values()]
            if known and all(number is None for number in known):
                found.append(f"no run has a {metric.label}")
    found += _uneven_evaluations(results)
    if len(results.seeds) == 1 and results.claims:
        found.append("one seed: no verdict is given at n = 1")
    return found + results.notes


def _close_tuning(results: Results) -> str:
    """Arms whose chosen point leads the next one by less than the standard error of that lead: by seed where tuning had
    several; of one seed it is not known, and how runs of the comparison differ stands for it.
    """
    shown = []
    for choice in results.choices:
        points: dict[str, dict[int, float]] = {}
        for record in results.of(choice.arm, "tune"):
            if record.state == "finished" and (found := results.value(record, results.metric)):
                points.setdefault(record.point, {})[record.seed] = found[0]
        best = points.pop(choice.chosen or "", None)
        leads = [[other[seed] - best[seed] for seed in other if seed in best] for other in points.values() if best]
        values = [value[0] for value in results.values(choice.arm, results.metric).values() if value is not None]
        if not (leads := [lead for lead in leads if lead]) or len(values) < 2:
            continue
        lead = min(leads, key=lambda lead: abs(fmean(lead)))
        error = stdev(lead) / math.sqrt(len(lead)) if len(lead) > 1 else stdev(values)
        if abs(fmean(lead)) < error:
            shown.append(f"{choice.arm} by {abs(fmean(lead)):.2g}, standard error {error:.2g}")
    return "; ".join(shown)


def _uneven_evaluations(results: Results) -> list[str]:
    """Steps and seconds to a loss compare rows of one run with those of another, which must score the same held-out data."""
    metrics = [results.metric, *results.also, *(claim.metric for claim in results.claims if claim.metric)]
    if not any(metric.kind != "value" and metric.split == "val" for metric in metrics):
        return []
    sizes = {row["tokens"] for r in results.records for row in r.rows if row["split"] == "val" and "tokens" in row}
    if len(sizes) < 2:
        return []
    shown = ", ".join(f"{size:,}" for size in sorted(sizes))
    return [
        f"evaluations score different amounts of held-out data ({shown} tokens), so steps and seconds to a loss compare unlike "
        "numbers: give evaluate.final_batches = evaluate.batches"
    ]


def _parts_left(results: Results) -> str:
    """Which parts the missing runs are of, where another part has been run whole."""
    parts = {arm.name: arm.part for arm in results.arms}
    waiting = {record.arm for record in results.unfinished}
    waiting |= {arm.name for arm in results.arms if results.later and not results.of(arm.name)}
    left = sorted({parts[arm] for arm in waiting if arm in parts})
    return f", all of part {' and '.join(map(str, left))}" if left and set(left) < set(parts.values()) else ""


def _by_arm(records: list[Record], versions: Counter[str]) -> str:
    words = []
    for version, count in versions.items():
        arms = Counter(record.arm for record in records if version in record.versions)
        words.append(f"{count} of {version} ({', '.join(f'{arm} {n}' for arm, n in arms.items())})")
    return "; ".join(words)


def _module_versions(records: list[Record]) -> dict[str, dict[str, list[str]]]:
    """Of each module by name: the digests that runs had of it, and the arms of those."""
    found: dict[str, dict[str, list[str]]] = {}
    for record in records:
        for name, digest in record.modules:
            arms = found.setdefault(name, {}).setdefault(digest, [])
            if record.arm not in arms:
                arms.append(record.arm)
    return found


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
    metrics = [results.metric, *results.also, *(claim.metric for claim in results.claims if claim.metric)]
    numbers = {metric.label: results.value(record, metric) for metric in metrics if not isinstance(metric.target, str)}
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
