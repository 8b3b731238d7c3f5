"""From paired differences and a decision rule to a verdict, and the sentence that says why.

`reproduced`            the test, Holm-adjusted over the experiment's claims, finds an improvement beyond the margin; or, for a
                        claim of costing at most so much, no greater loss than that
`contradicted`          it finds the opposite
`underpowered`          neither, and this n would have missed the effect worth seeing more often than the rule allows
`same direction, interval includes zero`    neither, though the effect worth seeing would have been found
`not reproduced`        neither, and the mean is not in the claim's direction; or a real difference within the margin; or
                        the arm diverged more often than the other, or never reached its target
`no verdict`            one pair, fewer pairs than the rule asks for, pairs that the seed does not change, or a sweep that is
                        not finished: the rule fixed n before
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from trainer.report import statistics
from trainer.report.statistics import Summary, Test
from trainer.sweep.experiment import Claim, Rule

REPRODUCED = "reproduced"
SAME_DIRECTION = "same direction, interval includes zero"
NOT_REPRODUCED = "not reproduced"
CONTRADICTED = "contradicted"
UNDERPOWERED = "underpowered"
NO_VERDICT = "no verdict"
VERDICTS = (REPRODUCED, SAME_DIRECTION, NOT_REPRODUCED, CONTRADICTED, UNDERPOWERED, NO_VERDICT)

ROUNDING = 2.0**-20
"""Of the numbers that are compared, 8 units in the last place of float32: a spread up to this is rounding."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the runs of a claim gave.

    Args:
      claim: under test.
      seeds: of the pairs, in order.
      improvements: of each pair, positive in the claim's direction, in units of the metric.
      planned: pairs that the scale asks for.
      unfinished: runs of the two arms that are still to end.
      failed: runs of the two arms that crashed; their pairs are missing.
      diverged: runs of the claim's arm, and of the other one, that diverged; their pairs are missing.
      not_finite: those of them that finished, with a number that is NaN or infinite.
      no_number: finished runs of the two arms that have no number of this metric; their pairs are missing.
      missed: pairs in which the claim's arm alone did not reach a target, and in which the other one alone did not: the
        improvement is at most, or at least, 0.
      both_missed: pairs that are missing since neither did.
      others: the other arm's numbers, by pair; the improvements are differences to them.
      untuned: arms that are not tuned at this scale, in a file that tunes some.
    """

    claim: Claim
    seeds: tuple[int, ...]
    improvements: tuple[float, ...]
    planned: int
    unfinished: int = 0
    failed: int = 0
    diverged: tuple[int, int] = (0, 0)
    not_finite: tuple[int, int] = (0, 0)
    no_number: int = 0
    missed: tuple[int, int] = (0, 0)
    both_missed: int = 0
    others: tuple[float, ...] = ()
    untuned: tuple[str, ...] = ()

    @property
    def allowances(self) -> tuple[float, ...]:
        """By pair, the loss that the claim allows; 0 for a claim of being better."""
        others = self.others or (0.0,) * len(self.improvements)
        return tuple(self.claim.rule.allowance(other) for other in others)

    @property
    def tested(self) -> tuple[float, ...]:
        """What the test compares with 0 or the margin: improvements plus what the claim allows."""
        return tuple(d + allowed for d, allowed in zip(self.improvements, self.allowances, strict=True))

    @property
    def alike(self) -> bool:
        """Whether the improvements of several seeds are one number, up to rounding."""
        d = self.improvements
        largest = max(map(abs, (*d, *self.others)), default=0.0)
        return len(d) > 1 and max(d) - min(d) <= ROUNDING * largest


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One claim, decided. Intervals and effects are improvements: positive in the claim's direction.

    Attributes:
      interval: at 95 %.
      family: the interval at the level at which Holm's procedure decided this claim.
      level: that level.
      p, adjusted: two-sided; None where there is no verdict.
      smallest: the true improvement that this n finds with the rule's power at that level, given the spread seen.
      needed: pairs with which the effect worth seeing would be found; None if unknown.
      sign_flip: the distribution-free test beside it.
    """

    evidence: Evidence
    word: str
    why: str
    summary: Summary
    family: tuple[float, float]
    level: float
    p: float | None
    adjusted: float | None
    effect: float | None  # worth seeing
    smallest: float
    needed: int | None
    standardised: float
    sign_flip: Test | None


def decide(evidences: Sequence[Evidence]) -> list[Verdict]:
    """Decide all claims of an experiment together, which is the family that Holm's procedure is over.

    A claim without a verdict stays in the family: what is decided now must not depend on what is still to come.
    """
    tests = [_test(evidence) if _enough(evidence) else None for evidence in evidences]
    values = [test.two_sided if test else 1.0 for test in tests]
    adjusted = statistics.holm(values)
    verdicts = []
    for evidence, test, share in zip(evidences, tests, adjusted, strict=True):
        rule = evidence.claim.rule
        level = statistics.holm_levels(values, rule.alpha)[len(verdicts)]
        verdicts.append(_decide(evidence, rule, test, share, level))
    return verdicts


def _enough(evidence: Evidence) -> bool:
    enough = len(evidence.improvements) >= max(2, evidence.claim.rule.least_pairs)
    return enough and not evidence.unfinished and not evidence.alike


def _test(evidence: Evidence) -> Test:
    test = statistics.paired_t if evidence.claim.rule.test == "paired_t" else statistics.sign_flip
    return test(evidence.tested, evidence.claim.rule.margin)


def _decide(evidence: Evidence, rule: Rule, test: Test | None, adjusted: float, level: float) -> Verdict:
    d, tested = evidence.improvements, evidence.tested
    n, summary, paper = len(d), statistics.summarise(d), evidence.claim.paper_effect
    sd = statistics.summarise(tested).sd
    allowed = math.fsum(evidence.allowances) / n if n else 0.0
    bar = rule.margin if rule.at_most_worse is None else -allowed  # an improvement must lie beyond it
    if rule.at_most_worse is None:
        effects = [value for value in (rule.effect, paper) if value is not None and value > 0]
        effect, must = next(iter(effects), None), min(effects, default=None)
    else:
        effect = must = min(0.0, paper or 0.0)
    smallest = bar + statistics.smallest_effect(n, sd, level, rule.power) if n > 1 else math.inf
    if test is not None and test.least > level:
        smallest = math.inf  # no data whatever could make this test reject
    needed = None
    if must is not None and must > bar and n > 1 and sd > 0:
        needed = statistics.pairs_needed(must - bar, sd, level, rule.power)
    if rule.test == "sign_flip":
        family = statistics.sign_flip_interval(tested, 1 - level) if n > 1 else (math.nan, math.nan)
    else:
        wide = statistics.summarise(tested, 1 - level)
        family = (wide.low, wide.high)
    family = (family[0] - allowed, family[1] - allowed)
    word, why = _word(evidence, rule, summary, test, adjusted, (effect, must), smallest, family)
    if evidence.untuned:
        why += f"; not tuned at this scale: {', '.join(evidence.untuned)}"
    return Verdict(
        evidence=evidence,
        word=word,
        why=why,
        summary=summary,
        family=family,
        level=level,
        p=None if test is None else test.two_sided,
        adjusted=None if test is None else adjusted,
        effect=effect,
        smallest=smallest,
        needed=needed,
        standardised=statistics.standardised(d),
        sign_flip=statistics.sign_flip(tested, rule.margin) if n > 1 else None,
    )


def _word(
    evidence: Evidence,
    rule: Rule,
    summary: Summary,
    test: Test | None,
    adjusted: float,
    effects: tuple[float | None, float | None],
    smallest: float,
    family: tuple[float, float],
) -> tuple[str, str]:
    n, (own, other) = summary.n, evidence.diverged
    if test is None:
        return _undecided(evidence, rule, n)
    significant = adjusted <= rule.alpha
    shown = f"p = {test.two_sided:.2g}, Holm-adjusted {adjusted:.2g}"
    if significant and test.less < test.greater:
        return CONTRADICTED, f"{f'worse by more than {rule.allowed}' if rule.allowed else 'the opposite holds'}: {shown}"
    if own > other:
        return NOT_REPRODUCED, _diverged(evidence)
    effect, must = effects
    if significant:
        note = f"; {_missing(evidence)}" if _missing(evidence) else ""
        if rule.allowed:
            return REPRODUCED, f"at most {rule.allowed} worse: {shown}{note}"
        if effect is not None and summary.high < effect:
            note += f"; yet smaller than the effect worth seeing, {effect:.3g}: the whole interval lies below it"
        return REPRODUCED, f"{shown}{note}"
    if summary.low > 0 and family[0] > 0 and max(summary.high, family[1]) <= rule.margin:
        return NOT_REPRODUCED, f"the difference is real but within the margin of {rule.margin:g}: {shown}"
    if must is not None and smallest > must:
        found = "no effect at all" if math.isinf(smallest) else f"with power {rule.power:g} only {smallest:.3g} or more"
        worth = f"the effect worth seeing is {effect:.3g}" + (f", the paper's own {must:.3g}" if must != effect else "")
        if rule.allowed:
            worth = "no difference" if must == 0 else f"the paper's own {must:.3g}"
            worth = f"what had to be told from {rule.allowed} worse is {worth}"
        return UNDERPOWERED, f"{shown}; {n} pairs would have found {found}, and {worth}"
    seen = f"; {n} pairs find {smallest:.3g} with power {rule.power:g}" if math.isfinite(smallest) else ""
    if rule.margin and family[0] > 0:
        seen += f"; the interval lies above 0 and includes the margin of {rule.margin:g}"
    if rule.allowed:
        seen += f"; the interval includes a loss of {rule.allowed}"
    if math.fsum(evidence.tested) > 0:
        return SAME_DIRECTION, f"{shown}{seen}"
    mean = "a greater loss than that" if rule.allowed else "not in the claim's direction"
    return NOT_REPRODUCED, f"the mean is {mean}: {shown}{seen}"


def _undecided(evidence: Evidence, rule: Rule, n: int) -> tuple[str, str]:
    """Where there is no test."""
    claim, missing = evidence.claim, _missing(evidence)
    if evidence.unfinished:
        return NO_VERDICT, (
            f"not finished: {evidence.unfinished} runs are still to end, and {n} of {evidence.planned} pairs are there; "
            "deciding before the planned n would raise the error rate"
        )
    (own, other), least = evidence.diverged, max(2, rule.least_pairs)
    if own > other and n < least <= n + own:  # too few pairs are left because of that
        return NOT_REPRODUCED, f"{_diverged(evidence)}, and {n} pairs are left"
    if n == 1:
        return NO_VERDICT, "n = 1: one pair says nothing about noise"
    if n < least:
        return NO_VERDICT, f"{n} pairs, and the rule asks for at least {rule.least_pairs}{f' ({missing})' if missing else ''}"
    if evidence.missed[0] == n:
        return NOT_REPRODUCED, f"{claim.arm!r} reached the target in none of {n} pairs, {claim.against!r} in all"
    return (
        NO_VERDICT,
        f"the seed changes nothing: {n} equal differences are one run, not {n}{f' ({missing})' if missing else ''}",
    )


def _diverged(evidence: Evidence) -> str:
    (own, other), claim = evidence.diverged, evidence.claim
    return f"{own} runs of {claim.arm!r} {_how(evidence)}, {other} of {claim.against!r}"


def _how(evidence: Evidence) -> str:
    return "diverged or have no finite number" if any(evidence.not_finite) else "diverged"


def _missing(evidence: Evidence) -> str:
    words = [f"{evidence.failed} runs failed"] if evidence.failed else []
    if evidence.no_number:
        words.append(
            "1 run has no such number" if evidence.no_number == 1 else f"{evidence.no_number} runs have no such number"
        )
    words += [f"{evidence.diverged[0]} and {evidence.diverged[1]} runs {_how(evidence)}"] if any(evidence.diverged) else []
    own, other = evidence.missed
    words += [f"in {own} pairs {evidence.claim.arm!r} did not reach the target"] if own else []
    words += [f"in {other} pairs {evidence.claim.against!r} did not reach the target"] if other else []
    words += (
        [f"{evidence.both_missed} pairs have no number, since neither arm reached the target"] if evidence.both_missed else []
    )
    return ", ".join(words)
