"""What a reader must know before any number of a report: runs that did not end well, mixtures, doubtful comparisons."""

from __future__ import annotations

import math
from collections import Counter
from statistics import fmean, stdev

from trainer.report.records import Record
from trainer.report.results import Results
from trainer.sweep import outcome as outcomes
from trainer.sweep.experiment import Metric


def warnings(results: Results) -> list[str]:
    """Every caveat, the most important first."""
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
    found += _not_finite(results) + _extended(results)
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
            known = [results.number(record, metric) for arm in results.arms for record in results.of(arm.name)]
            if known and all(number is None for number in known):
                found.append(f"no run has a {metric.label}")
    found += _uneven_evaluations(results) + _uneven_ends(results)
    if len(results.seeds) == 1 and results.claims:
        found.append("one seed: no verdict is given at n = 1")
    return found + results.notes


def _not_finite(results: Results) -> list[str]:
    """Runs that finished with a number that is NaN or infinite."""
    found: dict[str, list[str]] = {}
    for metric in results.metrics:
        for arm in results.arms:
            for seed in results.not_finite(arm.name, metric):
                found.setdefault(f"{arm.name} seed {seed}", []).append(metric.label)
    if not found:
        return []
    shown = "; ".join(f"{run}: {', '.join(labels)}" for run, labels in found.items())
    return [
        f"{len(found)} run{'s' if len(found) > 1 else ''} finished with a number that is not finite: in no mean of it, and "
        f"diverged for every claim by it ({shown})"
    ]


def _extended(results: Results) -> list[str]:
    """Runs that were extended beyond what is planned here, whose evaluation at that step is not there any more."""
    if not any((metric.split, metric.at) == ("val", "last") for metric in results.metrics):
        return []
    counts: Counter[int] = Counter()
    for record in results.records:
        planned = record.extended_from
        if planned is not None and record.state == "finished":
            counts[planned] += not any(row["split"] == "val" and row["step"] == planned for row in record.rows)
    return [
        f"{count} run{'s' if count > 1 else ''} went on beyond the {planned:,} updates planned here and kept no evaluation at "
        f"that step: {'they have' if count > 1 else 'it has'} no number"
        for planned, count in sorted(counts.items())
        if count
    ]


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
    if not any(metric.kind != "value" and metric.split == "val" for metric in results.metrics):
        return []
    sizes = {row["tokens"] for r in results.records for row in r.rows if row["split"] == "val" and "tokens" in row}
    if len(sizes) < 2:
        return []
    shown = ", ".join(f"{size:,}" for size in sorted(sizes))
    return [
        f"evaluations score different amounts of held-out data ({shown} tokens), so steps and seconds to a loss compare unlike "
        "numbers: give evaluate.final_batches = evaluate.batches"
    ]


def _uneven_ends(results: Results) -> list[str]:
    """Claims about last evaluations whose two arms, on the same data, scored different amounts of it."""
    found = []
    for claim in results.claims:
        metric = claim.metric or results.metric
        if not metric.last_evaluation:
            continue
        other = {record.seed: record for record in results.of(claim.against)}
        pairs = [(record, other[record.seed]) for record in results.of(claim.arm) if record.seed in other]
        pairs = [(one, two) for one, two in pairs if one.config.get("data") == two.config.get("data")]
        sizes = [(_scored(one, metric), _scored(two, metric)) for one, two in pairs]
        uneven = [(a, b) for a, b in sizes if a is not None and b is not None and a != b]
        if uneven:
            of = "; ".join(f"{a:,} and {b:,} tokens" for a, b in dict.fromkeys(uneven))
            found.append(
                f"the last evaluations of {claim.arm} and {claim.against} score different amounts of held-out data ({of}), so "
                "their numbers are of unlike data: give both the same evaluate.final_batches"
            )
    return list(dict.fromkeys(found))


def _scored(record: Record, metric: Metric) -> int | None:
    """Tokens of the evaluation that a finished run's number is of; None if it does not say, or there is no number."""
    if outcomes.value(record.rows, metric, record.extended_from) is None:
        return None
    rows = [row for row in record.rows if row["split"] == "val" and outcomes.series([row], metric)]
    return rows[-1].get("tokens") if rows and record.state == "finished" else None


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
