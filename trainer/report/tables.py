"""The tables of a report as rows of text, which the Markdown and the page both show."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.report.analysis import ArmRow, Report, factor, relative_effect, uncommitted
from trainer.report.verdicts import Verdict


@dataclasses.dataclass(frozen=True)
class Table:
    """A header and rows of text, the first column the name of the row."""

    header: list[str]
    rows: list[list[str]]
    caption: str = ""


def number(value: float | None, digits: int = 5) -> str:
    """Five significant digits; a dash for what is not there."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}"
    return text.replace("-", "−") if text.startswith("-") else text


def interval(low: float, high: float, digits: int = 4) -> str:
    """`[low, high]`."""
    return "–" if math.isnan(low) else f"[{number(low, digits)}, {number(high, digits)}]"


def states(arm: ArmRow) -> str:
    """How the runs of an arm ended, the finished ones first."""
    order = ["finished", "diverged", "failed", "running", "preempted", "broken", "missing"]
    words = [f"{arm.states[state]} {state}" for state in order if arm.states.get(state)]
    if not arm.states and arm.planned:
        words = [f"{arm.planned} wait for tuning"]
    return ", ".join(words) or "none"


def tokens(count: float) -> str:
    """`4.1 M`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def arms(report: Report) -> list[Table]:
    """How the runs of each arm ended, then one table a metric: n, mean, interval, standard deviation."""
    rows = []
    for arm in report.arms:
        rows.append([arm.name, states(arm), tokens(arm.tokens) if arm.tokens else "–", arm.chosen, arm.control])
    header = ["arm", "runs", "tokens a run", "tuned to", "control for"]
    used = [0, 1, 2] + [column for column in (3, 4) if any(row[column] for row in rows)]
    found = [Table([header[i] for i in used], [[row[i] for i in used] for row in rows])]
    for index, metric in enumerate(report.metrics):
        rows = []
        # Measurements have numbers of their own.
        shown = [arm for arm in report.arms if arm.summaries[index].n or arm.not_finite[index]]
        for arm in shown:
            one, bounds = arm.summaries[index], arm.bounds[index]
            between = interval(one.low, one.high, 5)
            notes = [f"{bounds} not reached: counted at the last step"] if bounds else []
            notes += [f"{arm.not_finite[index]} not finite: in no mean"] if arm.not_finite[index] else []
            rows.append([arm.name, str(one.n), number(one.mean), between, number(one.sd, 3), "; ".join(notes)])
        header = ["arm", "n", metric.label, "95 % interval", "sd", ""]
        width = 6 if any(row[5] for row in rows) else 5
        left = len(report.arms) - len(shown)
        caption = f"{left} arm{' has' if left == 1 else 's have'} no such number." if left else ""
        found.append(Table(header[:width], [row[:width] for row in rows], caption))
    found = not_empty(found)
    last = "Means and 95 % intervals (Student's t) are over the finished runs of an arm; sd is of single runs."
    found[-1] = dataclasses.replace(found[-1], caption=f"{found[-1].caption} {last}".strip())
    return found


def verdict_facts(verdict: Verdict, report: Report) -> list[tuple[str, str]]:
    """Name and value of everything that a verdict rests on."""
    evidence, claim = verdict.evidence, verdict.evidence.claim
    metric = claim.metric or report.results.metric
    n = len(evidence.improvements)
    relative = relative_effect(verdict, report.results)
    share = f" ({number(100 * relative, 3)} % of {claim.against})" if not math.isnan(relative) else ""
    times = factor(verdict, report.results)
    share = f" (a factor of {number(times, 4)})" if not math.isnan(times) else share
    paper = "unknown" if claim.paper_effect is None else number(claim.paper_effect, 4)
    trained = report.results.tokens(claim.arm)
    between = f", 95 % interval {interval(verdict.summary.low, verdict.summary.high)}" if n > 1 else ""
    facts = [
        ("compared", f"{claim.arm} against {claim.against}: {metric.label}, improvements positive"),
        ("pairs", f"{n} of {evidence.planned} by seed"),
        ("improvement", f"{number(verdict.summary.mean, 4)}{share}{between}" if n else "none is known yet"),
        ("paper", paper + (f" ({claim.paper_setting})" if claim.paper_setting else "")),
    ]
    if n > 1:
        each = zip(evidence.seeds, evidence.improvements, strict=True)
        facts.append(("by seed", "; ".join(f"{seed}: {number(x, 4)}" for seed, x in each)))
        standardised = f"standardised effect (Hedges' g) {number(verdict.standardised, 3)}"
        facts.append(("sd of differences", f"{number(verdict.summary.sd, 3)}; {standardised}"))
    if verdict.p is not None:
        m = len(report.verdicts)
        facts.append(
            ("p", f"{number(verdict.p, 3)}; Holm-adjusted over {m} claim{'s' if m > 1 else ''} {number(verdict.adjusted, 3)}")
        )
        facts.append(("interval of the family", f"{interval(*verdict.family)} at {100 * (1 - verdict.level):.4g} %"))
    if verdict.sign_flip is not None:
        least = f" (no {n} pairs give less than {number(verdict.sign_flip.least, 3)})"
        facts.append(("sign-flip test", f"p = {number(verdict.sign_flip.two_sided, 3)}{least}"))
    if n > 1:
        power = f"{claim.rule.power:g}"
        worth = f"; worth seeing: {number(verdict.effect, 4)}" if verdict.effect is not None else ""
        worth += f"; the paper's: {paper}" if claim.paper_effect and 0 < claim.paper_effect < (verdict.effect or 0) else ""
        needed = f"; {verdict.needed} pairs would find that" if verdict.needed else ""
        facts.append(("smallest effect", f"{number(verdict.smallest, 4)} with power {power}{worth}{needed}"))
    missing = [f"{evidence.failed} failed"] if evidence.failed else []
    lost = sum(evidence.not_finite)
    how = f" ({lost} with a number that is not finite)" if lost else ""
    missing += [f"{evidence.diverged[0]} + {evidence.diverged[1]} diverged{how}"] if any(evidence.diverged) else []
    missing += [f"{evidence.no_number} without such a number"] if evidence.no_number else []
    missing += [f"{evidence.unfinished} still to end"] if evidence.unfinished else []
    if missing:
        facts.append(("runs missing", ", ".join(missing)))
    names = (claim.arm, claim.against)
    short = [f"{name} in {count} pairs" for name, count in zip(names, evidence.missed, strict=True) if count]
    short += [f"both in {evidence.both_missed} pairs, which have no number"] if evidence.both_missed else []
    if short:
        facts.append(("target not reached", f"{'; '.join(short)}; whoever misses it gets no credit"))
    if evidence.untuned:
        facts.append(("tuning", f"not tuned at this scale: {', '.join(evidence.untuned)}"))
    if versions := mixed_versions(verdict, report):
        facts.append(("code", versions))
    facts.append(
        (
            "seen at",
            f"scale {report.results.scale}, {tokens(trained)} tokens a run" if trained else f"scale {report.results.scale}",
        )
    )
    facts.append(("rule", str(claim.rule)))
    facts.append(("source", claim.source))
    return facts


def mixed_versions(verdict: Verdict, report: Report) -> str:
    """A sentence where the pairs of a claim were made by different code; empty otherwise."""
    one, two = (
        {record.seed: record for record in report.results.of(name)}
        for name in (verdict.evidence.claim.arm, verdict.evidence.claim.against)
    )

    def differ(seed: int) -> bool:
        own, other = dict(one[seed].modules), dict(two[seed].modules)
        return set(one[seed].versions) != set(two[seed].versions) or any(own[n] != other[n] for n in own.keys() & other.keys())

    mixed = [seed for seed in verdict.evidence.seeds if differ(seed)]
    if mixed:
        return f"the two runs of {len(mixed)} of {len(verdict.evidence.seeds)} pairs were made by different code versions"
    return ""


def verdicts(report: Report) -> Table:
    """One row a claim."""
    rows = []
    for verdict in report.verdicts:
        claim, found = verdict.evidence.claim, verdict.summary
        rows.append(
            [
                claim.statement,
                verdict.word + (" (not tuned at this scale)" if verdict.evidence.untuned else ""),
                f"{len(verdict.evidence.improvements)}/{verdict.evidence.planned}",
                f"{number(found.mean, 4)} {interval(found.low, found.high)}" if found.n > 1 else number(found.mean, 4),
                number(verdict.adjusted, 2),
                number(claim.paper_effect, 4),
                number(verdict.smallest, 3),
            ]
        )
    header = ["claim", "verdict", "pairs", "improvement [95 %]", "p (Holm)", "paper", "smallest effect"]
    return Table(header, rows, "Improvements are positive in the claim's direction, in units of its metric.")


def tuning(report: Report) -> Table:
    """One row a point that was tried."""
    rows = []
    for choice in report.results.choices:
        for point, mean in choice.means.items():
            mark = "chosen" if point == choice.chosen else ""
            runs = [record for record in report.results.of(choice.arm, "tune") if record.point == point]
            ended = ", ".join(sorted({record.state for record in runs}))
            rows.append([choice.arm, point, number(mean), ended, mark + (", at the edge" if mark and choice.at_edge else "")])
    return Table(
        ["arm", "point", f"{report.results.metric.label}: mean", "runs", ""],
        rows,
        "Points were compared on seeds that the comparison does not use.",
    )


def runs(report: Report) -> Table:
    """One row a run."""
    rows = []
    for record in report.results.records:
        name = record.arm + (f" [{record.point}]" if record.point else "")
        found = report.results.metric
        compared = record.stage == "compare" and record.state == "finished"
        known = report.results.number(record, found) if compared else None
        value = "–" if known is None else number(known[0], 6) if math.isfinite(known[0]) else "not finite"
        ended = record.state + (f": {record.found.message}" if record.found.message and record.state != "finished" else "")
        rows.append([name, str(record.seed), ended, f"{record.found.step:,}", value, record.directory.name])
    return Table(["arm", "seed", "state", "step", report.results.metric.label, "directory"], rows)


def machines(report: Report) -> Table:
    """Code and machine of the runs."""
    versions: dict[str, int] = {}
    places: dict[str, int] = {}
    for record in report.results.records:
        for version in record.versions:
            versions[version] = versions.get(version, 0) + 1
        if record.machine:
            places[record.machine] = places.get(record.machine, 0) + 1
    rows = [["code", name, str(count)] for name, count in versions.items()]
    modules = Counter(f"{name}, digest {digest[:6]}" for record in report.results.records for name, digest in record.modules)
    rows += [["module", name, str(count)] for name, count in modules.items()]
    rows += [["machine", name, str(count)] for name, count in places.items()]
    packages = next((r.environment.get("packages", {}) for r in report.results.records if r.environment), {})
    for version, changed in uncommitted(report.results).items():
        lines, new = len((changed["diff"] or "").splitlines()), len(changed["untracked"] or ())
        rows.append(["uncommitted changes", f"{version}: {lines} lines of diff, kept in report.json, and {new} new files", ""])
    data, variables = (
        _listed(report, "data", _data),
        _listed(report, "variables", lambda own: ", ".join(map("=".join, own.items()))),
    )
    rows += [["data", name, str(count)] for name, count in data.items()]
    rows += [["environment", name, str(count)] for name, count in variables.items()]
    rows += [["packages", ", ".join(f"{name} {version}" for name, version in packages.items()), ""]] if packages else []
    return Table(["", "", "runs"], rows)


def _data(described: Mapping[str, Any]) -> str:
    """What was trained on, with the fingerprint that says whether other data is the same."""
    return f"{described.get('kind', 'data')}, fingerprint {str(described.get('fingerprint'))[:12]}"


def _listed(report: Report, key: str, words: Callable[[Any], str]) -> dict[str, int]:
    """What environments say under a key, and how many runs do."""
    found = [record.environment.get(key) for record in report.results.records]
    return dict(Counter(words(one) for one in found if one))


def not_empty(tables: Sequence[Table]) -> list[Table]:
    """Those with rows."""
    return [table for table in tables if table.rows]
