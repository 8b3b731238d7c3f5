"""What an experiment is: arms, seeds, scales, claims, and the rule that decides them, written before the runs.

A file in `experiments/` defines `get_experiment()`, which returns an `Experiment`; one without claims is a plain sweep.
Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from strata import ConfigError, Problem
from trainer.metrics.jsonl import SPLITS
from trainer.sweep import needs
from trainer.sweep.space import Space, label, read_seeds

TESTS = ("paired_t", "sign_flip")
PLACES = ("last", "best", "median")
KINDS = ("value", "steps_to", "seconds_to")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number a run, read from its `metrics.jsonl`.

    Args:
      name: of a number in the rows, such as `loss`, `bpb`, `accuracy`; one within a dict by its path, such as
        `timing.step_seconds` or `gradient_norm.variation`.
      split: `val`, or another that rows have.
      at: `last` row, `best` row, `median` over the rows, or a step.
      lower_is_better: the direction of an improvement.
      kind: `value`; or `steps_to` and `seconds_to`, the updates or the training seconds (compilation and evaluation not
        counted) until the value first reaches `target`, linear between rows. Fewer are better.
      target: a number, or the name of an arm: its `last` or `best` value (by `at`) at the same seed.
      unit: for people.
      log_base: of the logarithm that the number is, such as 10 for digits: its zero is a choice of the unit, so that a share
        in per cent says nothing, and a report gives the factor that a difference stands for. None: no logarithm, or one that
        is an amount by itself, as a loss in nats.
    """

    name: str = "loss"
    split: str = "val"
    at: str | int = "last"
    lower_is_better: bool = True
    kind: str = "value"
    target: float | str | None = None
    unit: str = ""
    log_base: float | None = None

    @property
    def label(self) -> str:
        """In words, such as `val loss (last, nats/token)`."""
        place = f"step {self.at}" if isinstance(self.at, int) else self.at
        if self.kind != "value":
            goal = f"{self.target}'s {place}" if isinstance(self.target, str) else f"{self.target}"
            what = "steps" if self.kind == "steps_to" else "training seconds"
            return f"{what} to {self.split} {self.name} {goal}"
        return f"{self.split} {self.name} ({place}{f', {self.unit}' if self.unit else ''})"

    @property
    def last_evaluation(self) -> bool:
        """Whether it is the number of a run's last row of held-out data."""
        return self.kind == "value" and self.split == "val" and self.at == "last"

    @property
    def sign(self) -> int:
        """Times (arm - other) this is an improvement when positive."""
        return -1 if self.lower_is_better or self.kind != "value" else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How a claim is decided; read from the file, so it stands before the runs do.

    `test` compares improvements paired by seed. The claim holds when the test, two-sided, at level `alpha` and Holm-adjusted
    over the claims of the experiment, finds an improvement greater than `margin`; or, with `at_most_worse`, one greater than
    minus that: the claim is then that `arm` costs at most so much (a non-inferiority test), and no difference is enough.

    Args:
      alpha: family-wise error rate.
      margin: an improvement up to this much does not count, in units of the metric.
      test: `paired_t`, exact for normal differences; or `sign_flip`, exact for symmetric ones, which cannot reject at
        0.05 with fewer than six pairs.
      effect: the improvement worth seeing, in units of the metric; where the test could not have seen it, the verdict is
        `underpowered`. None: the paper's effect; where that is known and smaller, it is the one that must have been seen.
      at_most_worse: the loss that the claim allows, in units of the metric; takes the place of `margin` and `effect`, since
        what must have been seen is no difference, or the paper's own loss.
      relative: `at_most_worse` is a share of the other arm's number at the same seed, 0.04 for 4 %.
      power: with which it should have been seen.
      least_pairs: fewer than this give no verdict.
    """

    alpha: float = 0.05
    margin: float = 0.0
    test: str = "paired_t"
    effect: float | None = None
    power: float = 0.8
    least_pairs: int = 3
    at_most_worse: float | None = None
    relative: bool = False

    def __str__(self) -> str:
        names = {"paired_t": "paired t-test", "sign_flip": "exact sign-flip test"}
        words = [f"{names.get(self.test, self.test)} by seed, two-sided, family-wise alpha {self.alpha:g} (Holm)"]
        words += [f"an improvement of more than {self.margin:g}"] if self.margin else []
        words += [f"effect worth seeing {self.effect:g} at power {self.power:g}"] if self.effect is not None else []
        words += [f"at most {self.allowed} worse, which no difference shows at power {self.power:g}"] if self.allowed else []
        return "; ".join([*words, f"at least {self.least_pairs} pairs"])

    def allowance(self, other: float) -> float:
        """The loss that is allowed beside a number of the other arm; 0 without `at_most_worse`."""
        return (self.at_most_worse or 0.0) * (abs(other) if self.relative else 1.0)

    @property
    def allowed(self) -> str:
        """`at_most_worse` in words; empty without it."""
        if self.at_most_worse is None:
            return ""
        return f"{100 * self.at_most_worse:g} % of the other arm" if self.relative else f"{self.at_most_worse:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement under test: `arm` is better than `against`, or at most so much worse (`Rule.at_most_worse`).

    Args:
      statement: in words, as the paper says it.
      source: paper and place, with the tag that says how it is known.
      arm, against: names of arms.
      rule: required; None is refused.
      metric: None: that of the experiment.
      paper_effect: the paper's improvement in units of the metric, positive in the claim's direction; None if unknown.
      paper_setting: sizes and tokens that the paper saw it at.
      scales: where it is tested; None: at all that run both arms.
    """

    statement: str
    source: str
    arm: str
    against: str
    rule: Rule | None = None
    metric: Metric | None = None
    paper_effect: float | None = None
    paper_setting: str = ""
    scales: Sequence[str] | None = None

    def at(self, scale: str) -> bool:
        """Whether it is tested at a scale."""
        return self.scales is None or scale in self.scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """One point of `space` is chosen for an arm by its mean metric over `seeds`, which the comparison must not use.

    Args:
      space: what is tried.
      seeds: to try it on.
      scales: where it is done; None: at all. Elsewhere the arm is run as it stands.
    """

    space: Space
    seeds: int | Sequence[int] = (1000,)
    scales: Sequence[str] | None = None

    def at(self, scale: str) -> bool:
        """Whether a scale tunes."""
        return self.scales is None or scale in self.scales


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Args:
      name: of the arm. Arms that share what is before a colon, as "text: a" and "text: b", are drawn apart from all others.
      changes: values by config path, over the config and the scale; a dict replaces a component, `RunOf(arm)` is another arm's
        run directory. For a measurement: its arguments.
      config: another config file than the experiment's.
      measure: `module:function` for a run of kind `measurement` (`trainer.sweep.measurement`) in place of training.
      space: every point becomes an arm of its own, named after the values.
      tune: one point is chosen on other seeds before the comparison.
      by_scale: further changes at one scale.
      control: what it controls for; empty if it is no control.
      part: part 1 is run first and should be the headline.
      scales: where it is run; None: at all.
      minutes: of one run by scale, where it is not the scale's.
      seeds: of this arm alone; None: those of the scale, as every arm of a claim must have them.
      requires: modules that its runs import beyond the project's own, each with the command that installs it.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    config: str | None = None
    measure: str | None = None
    space: Space | None = None
    tune: Tuning | None = None
    by_scale: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    control: str = ""
    part: int = 1
    scales: Sequence[str] | None = None
    minutes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] | None = None
    requires: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How large an experiment is run.

    Args:
      seeds: a number of them or a list; the same for every arm, so that differences are paired.
      changes: over the config, before those of the arm; for training runs.
      arguments: of every measurement, before those of the arm.
      config: another base config at this scale.
      slots: runs at a time, unless `--slots` says otherwise.
      minutes: of one run, as its author expects; measured times replace it.
      vocabulary: token ids of the data, for the estimate of work where the data is not on this machine.
      note: one line for people.
    """

    seeds: int | Sequence[int] = 5
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: str | None = None
    slots: int = 1
    minutes: float | None = None
    vocabulary: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms, seeds, scales, claims. `arms` may be a `Space`: then every point is an arm.

    Args:
      name: of the sweep directory and the report.
      question: one sentence.
      config: file of the arms that name no other.
      arms: see `Arm`.
      scales: by name; `smoke`, `laptop`, `gpu`, `paper` by convention. Empty: one, with seed 0.
      claims: what is decided.
      metric: what arms are compared by.
      also: further numbers for the table of arms.
    """

    name: str
    question: str = ""
    config: str = ""
    arms: Sequence[Arm] | Space = ()
    scales: Mapping[str, Scale] = dataclasses.field(default_factory=lambda: {"default": Scale(seeds=1)})
    claims: Sequence[Claim] = ()
    metric: Metric = Metric(unit="nats/token")
    also: Sequence[Metric] = ()

    def choose_scale(self, name: str | None) -> str:
        """The scale asked for; without one `laptop`, or the first. Raises `ConfigError` with the names there are."""
        if name is None:
            return "laptop" if "laptop" in self.scales else next(iter(self.scales))
        if name not in self.scales:
            raise ConfigError(f"--scale {name}: {self.name} has the scales {', '.join(self.scales)}")
        return name


def expanded_arms(experiment: Experiment) -> list[Arm]:
    """The arms with every point of a `space` as an arm of its own; an axis `seed` gives an arm its seeds."""
    if isinstance(experiment.arms, Space):
        grouped: dict[str, tuple[Mapping[str, Any], list[int]]] = {}
        for point in experiment.arms:
            rest = {path: value for path, value in point.items() if path != "seed"}
            _, seeds = grouped.setdefault(label(rest) or experiment.name, (rest, []))
            seeds += [point["seed"]] if "seed" in point else []
        return [Arm(name, rest, seeds=tuple(seeds) or None) for name, (rest, seeds) in grouped.items()]
    found = []
    for arm in experiment.arms:
        if arm.space is None:
            found.append(arm)
            continue
        for point in arm.space:
            found.append(
                dataclasses.replace(arm, name=f"{arm.name} {label(point)}", changes={**arm.changes, **point}, space=None)
            )
    return found


def check(experiment: Experiment) -> list[Problem]:
    """Every mistake in an experiment that can be told without reading a config."""
    return list(_problems(experiment))


def _problems(experiment: Experiment) -> Iterator[Problem]:
    def problem(path: str, message: str) -> Problem:
        return Problem(path, message, has_value=False)

    if not experiment.name or not all(c.isalnum() or c in "-_." for c in experiment.name):
        yield problem("name", f"{experiment.name!r}: expected letters, digits, - and _, since it names a directory")
    arms = expanded_arms(experiment)
    names = [arm.name for arm in arms]
    if not arms:
        yield problem("arms", "there are none, so the sweep would be empty")
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield problem(f"arm {name!r}", "two arms have this name")
    yield from needs.problems(arms)
    if not experiment.scales:
        yield problem("scales", "there are none")
    seeds: dict[str, set[int]] = {}
    for name, scale in experiment.scales.items():
        try:
            seeds[name] = set(read_seeds(scale.seeds))
        except ConfigError as error:
            yield problem(f"scale {name!r}", str(error))
        if "seed" in scale.changes:
            yield problem(f"scale {name!r}", "seed is an axis of its own: Scale(seeds=...)")
    for arm in arms:
        where = f"arm {arm.name!r}"
        if "seed" in arm.changes:
            yield problem(where, "seed is an axis of its own: Scale(seeds=...)")
        for scale in [*(arm.scales or ()), *arm.by_scale, *arm.minutes, *(arm.tune.scales or () if arm.tune else ())]:
            if scale not in experiment.scales:
                yield problem(where, f"names the scale {scale!r}; there are {', '.join(experiment.scales)}")
        if arm.tune is not None:
            yield from _tuning_problems(experiment, arm, seeds)
    for metric in [experiment.metric, *experiment.also, *(claim.metric for claim in experiment.claims if claim.metric)]:
        yield from _metric_problems(metric, names)
    for claim in experiment.claims:
        where = f"claim {claim.statement!r}"
        if claim.rule is None:
            yield problem(where, "has no decision rule; it must be there before the runs: rule=Rule(...)")
        else:
            for message in [*_rule_problems(claim.rule), *_allowance_problems(claim, claim.metric or experiment.metric)]:
                yield problem(where, message)
        if not claim.source:
            yield problem(where, "has no source")
        for scale in [name for name in claim.scales or () if name not in experiment.scales]:
            yield problem(where, f"names the scale {scale!r}; there are {', '.join(experiment.scales)}")
        for name in (claim.arm, claim.against):
            if name not in names:
                yield problem(where, f"compares {name!r}, and the arms are {', '.join(names)}")
        if claim.arm == claim.against:
            yield problem(where, f"compares {claim.arm!r} with itself")


def _tuning_problems(experiment: Experiment, arm: Arm, seeds: Mapping[str, set[int]]) -> Iterator[Problem]:
    where = f"arm {arm.name!r}"
    try:
        tuning = set(read_seeds(arm.tune.seeds))
    except ConfigError as error:
        yield Problem(where, f"tuning: {error}", has_value=False)
        return
    for name, of_scale in seeds.items():
        if shared := tuning & of_scale:
            message = f"its tuning uses seeds {sorted(shared)} of scale {name!r}: what is chosen on a seed looks too good there"
            yield Problem(where, message, has_value=False)
    if experiment.metric.kind != "value":
        yield Problem(where, "is tuned, which needs a metric of kind value for the experiment", has_value=False)


def _metric_problems(metric: Metric, arms: Sequence[str]) -> Iterator[Problem]:
    where = f"metric {metric.name!r}"
    if metric.split not in SPLITS:
        yield Problem(where, f"split {metric.split!r} is none of {', '.join(SPLITS)}", has_value=False)
    if metric.kind not in KINDS:
        yield Problem(where, f"kind {metric.kind!r} is not one of {', '.join(KINDS)}", has_value=False)
    if not (metric.at in PLACES or (isinstance(metric.at, int) and not isinstance(metric.at, bool) and metric.at >= 0)):
        yield Problem(where, f"at {metric.at!r} is neither last, best, median nor a step", has_value=False)
    if metric.log_base is not None and not (1 < metric.log_base < math.inf):
        yield Problem(where, f"log_base {metric.log_base} is not above 1", has_value=False)
    if metric.kind != "value" and metric.target is None:
        yield Problem(where, f"{metric.kind} needs a target: a number or an arm", has_value=False)
    if isinstance(metric.target, str) and metric.target not in arms:
        yield Problem(where, f"its target {metric.target!r} is none of the arms {', '.join(arms)}", has_value=False)


def _rule_problems(rule: Rule) -> Iterator[str]:
    if not 0 < rule.alpha < 1:
        yield f"alpha {rule.alpha} is not between 0 and 1"
    if not 0 < rule.power < 1:
        yield f"power {rule.power} is not between 0 and 1"
    if rule.test not in TESTS:
        yield f"test {rule.test!r} is not one of {', '.join(TESTS)}"
    if rule.margin < 0 or not math.isfinite(rule.margin):
        yield f"margin {rule.margin} is not a number from 0 on"
    if rule.effect is not None and not rule.effect > 0:
        yield f"effect {rule.effect} is not above 0"
    if rule.least_pairs < 2:
        yield f"least_pairs {rule.least_pairs}: one run an arm says nothing about noise, so at least 2"


def _allowance_problems(claim: Claim, metric: Metric) -> Iterator[str]:
    rule, allowed = claim.rule, claim.rule.at_most_worse
    if allowed is None:
        if rule.relative:
            yield "relative says how at_most_worse is meant, and there is none"
        return
    if not 0 < allowed < math.inf:
        yield f"at_most_worse {allowed} is not a number above 0"
    if rule.margin or rule.effect is not None:
        yield "at_most_worse takes the place of margin and effect: give it alone"
    if rule.relative and metric.kind == "value" and metric.log_base is not None:
        yield "relative at_most_worse of a logarithm: a share of it says nothing"
    if not rule.relative and claim.paper_effect is not None and claim.paper_effect <= -allowed:
        yield f"the paper's own effect, {claim.paper_effect:g}, is no less of a loss than at_most_worse {allowed:g}"
