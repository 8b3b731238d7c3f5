"""Sentences that every form of a report shares."""

from __future__ import annotations

from collections import Counter

from trainer.report.analysis import Report

METHOD = (
    "An improvement is the difference of two arms at one seed, positive in the claim's direction. Pairs share the seed of the "
    "initial parameters and of the order of the data.",
    "Intervals of a mean are Student's t. The paired t-test is exact for normal differences; the sign-flip test beside it "
    "assumes only that they are symmetric.",
    "Several claims of one experiment are decided together: p values are Holm-adjusted, so that the chance of any false "
    "`reproduced` or `contradicted` stays below the family-wise alpha.",
    "`reproduced`: an adjusted p of at most alpha, in the claim's direction and beyond the margin. `contradicted`: the same in "
    "the other direction. A claim of costing at most so much asks for a loss below that, and is contradicted by one above it. "
    "`underpowered`: neither, and this number of pairs would have missed the effect worth seeing too "
    "often. `same direction, interval includes zero` and `not reproduced`: neither, by the sign of the mean.",
    "The smallest effect is the true improvement that this number of pairs finds with the stated power, given the spread that "
    "was seen; with few pairs the spread is itself uncertain.",
    "No verdict is given for one pair, for pairs that differ by rounding alone (then the seed changes nothing), or before "
    "every planned run has ended: the number of pairs was fixed beforehand, and looking early would raise the error rate.",
    "A run that crashed is in no mean, and its pair is missing. A run that diverged is an outcome: it is in no mean either, "
    "but an arm that diverges more often than the other cannot be `reproduced`. One that finished with a number that is NaN or "
    "infinite has diverged for every claim by that number.",
    "Of a target (steps or seconds to a value) that one arm of a pair misses, that arm gets no credit: the improvement counts "
    "as 0 at best. A pair in which both miss it has no number.",
    "Arms that are tuned take the best point on seeds of their own, which the comparison does not use.",
)


def sentence(text: str) -> str:
    """With a full stop, and a capital unless it begins with the name of a file; nothing stays nothing."""
    if not text:
        return ""
    first = text[0] if "/" in text.split()[0] else text[0].upper()
    return first + text[1:].rstrip(".") + "."


def headline(report: Report) -> str:
    """One sentence."""
    results = report.results
    total = len(results.records) + results.later
    states = Counter(record.state for record in results.records)
    words = [f"{states['finished']} of {total} runs finished"]
    words += [f"{states[name]} {name}" for name in ("diverged", "failed") if states[name]]
    start = "" if report.finished else "UNFINISHED: "
    verdicts = Counter(verdict.word for verdict in report.verdicts)
    decided = "; ".join(f"{count} {word}" for word, count in verdicts.items())
    claims = f" {len(report.verdicts)} claim{'s' if len(report.verdicts) != 1 else ''}: {decided}." if decided else ""
    return f"{start}{', '.join(words)}.{claims}"
