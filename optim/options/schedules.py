"""Options of schedules: the fraction of the full rate over a run. See `optim.schedules` for the equations.

What a schedule's options may define beside their fields; what they do not is as in `Schedule`:

| attribute or method | says |
|---|---|
| `depends_on_steps` | False: no rate depends on the length of the run, which may be extended; True where it is not said |
| `problems_over(steps)` | what cannot work in a run of `steps` updates, as `(field, sentence)` |
| `milestones(steps)` | updates after which the state is worth keeping under a name: ends of budgets and stable phases |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from optim.options.roles import Problems
from strata import base, option, options, register


@base("optimizer.schedule")
class Schedule:
    """What is asked of every schedule."""

    depends_on_steps = True

    def problems_over(self, steps: int) -> Problems:
        """What cannot work in a run of `steps` updates."""
        del steps
        yield from ()

    def milestones(self, steps: int) -> dict[int, str]:
        """Updates after which the state is worth keeping, with a name for each."""
        del steps
        return {}


@options
class Warmup(Schedule):
    """Fields that the schedules here share. Update k of a run, the first being 1, uses the rate of step k."""

    warmup: int = option(0, "steps of linear warm-up: update k has k / warmup of the full rate", least=0)

    def problems_over(self, steps: int) -> Problems:
        """What cannot work in a run of `steps` updates."""
        if self.warmup > steps:
            yield "warmup", f"the warm-up of {self.warmup} steps is longer than the run of {steps}"


@register("optimizer.schedule", "constant", implementation="optim.schedules:constant")
@options
class Constant(Warmup):
    """The full rate after warm-up."""

    depends_on_steps = False

    def problems_over(self, steps: int) -> Problems:
        """None: a run may end within its warm-up, and be extended."""
        yield from ()


@register("optimizer.schedule", "linear", implementation="optim.schedules:linear")
@options
class Linear(Warmup):
    """From the full rate to `final` times it in a straight line, over the whole run."""

    final: float = option(0.0, "rate of the last update, as a fraction of the full rate (at 0 it is idle)", least=0, most=1)
    depends_on_steps = True


@register("optimizer.schedule", "cosine", implementation="optim.schedules:cosine")
@options
class Cosine(Warmup):
    """Half a cosine from the full rate to `final` times it, over the whole run (arXiv:1608.03983)."""

    final: float = option(0.1, "rate of the last update, as a fraction of the full rate", least=0, most=1)
    depends_on_steps = True


@register("optimizer.schedule", "inverse_sqrt", implementation="optim.schedules:inverse_sqrt")
@options
class InverseSqrt(Warmup):
    """`sqrt(t0 / step)` after t0 = max(warmup, `plateau`) steps (Vaswani et al. 2017, arXiv:1706.03762)."""

    plateau: int = option(1, "the rate is full up to this step", least=1)
    depends_on_steps = False

    def problems_over(self, steps: int) -> Problems:
        """None: a run may end anywhere, and be extended."""
        yield from ()


def shape_problems(shape: str, final: float) -> Problems:
    """Two of the forms of a decay cannot reach zero."""
    if shape in ("exponential", "inverse") and final == 0:
        yield "final", f"an {shape} decay needs a final fraction above 0"


@register("optimizer.schedule", "wsd", implementation="optim.schedules:wsd")
@options
class WSD(Warmup):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): full until the last `decay` of the run."""

    decay: float = option(0.2, "length of the decay as a fraction of the run, rounded to whole steps", least=0, most=1)
    shape: str = option("linear", "form of the decay", among=("linear", "sqrt", "cosine", "exponential", "square", "inverse"))
    final: float = option(0.0, "rate of the last update, as a fraction of the full rate (at 0 it is idle)", least=0, most=1)
    depends_on_steps = True

    def problems(self) -> Problems:
        """An exponential cannot reach zero."""
        yield from shape_problems(self.shape, self.final)

    def decay_steps(self, steps: int) -> int:
        """Updates of the decay in a run of `steps`; the last of them has the final rate."""
        return round(self.decay * steps)

    def problems_over(self, steps: int) -> Problems:
        """The warm-up must end before the decay begins."""
        decay = self.decay_steps(steps)
        if self.warmup + decay > steps:
            yield "warmup", f"a warm-up of {self.warmup} and a decay of {decay} steps do not fit in a run of {steps}"

    def milestones(self, steps: int) -> dict[int, str]:
        """The end of the stable phase, from which runs with decays of other lengths branch off (`init_from.take`)."""
        stable = steps - self.decay_steps(steps)
        return {stable: "stable"} if self.warmup < stable < steps else {}


@options
class Budgets(Warmup):
    """A run that ends several times: at each budget the rate has fallen, and it goes on from there at the full rate.

    The rate of an update does not depend on how far the run goes, so a run of one budget is extended to the next by raising
    `train.steps`.
    """

    budgets: tuple[int, ...] = option((), "steps at which the rate has fallen to its final fraction, ascending", least=1)
    rewarmup: int = option(
        0, "steps of linear warm-up after a budget, from the final fraction; 0: straight to the full", least=0
    )
    depends_on_steps = False

    def problems(self) -> Problems:
        """Budgets ascend, and each cycle has room for its warm-up."""
        if not self.budgets:
            yield "budgets", "give at least one, such as [1000, 2000, 4000]"
        elif any(one >= other for one, other in itertools.pairwise(self.budgets)):
            yield "budgets", "out of order: each must be larger than the one before"
        else:
            yield from self.problems_of_cycles()

    def problems_of_cycles(self) -> Problems:
        """What does not fit within a cycle."""
        for start, end in self.cycles():
            warmup = self.rewarmup if start else self.warmup
            if warmup > end - start:
                name = "rewarmup" if start else "warmup"
                yield name, f"{warmup} steps do not fit in the cycle of {end - start} steps that ends at {end}"

    def cycles(self) -> list[tuple[int, int]]:
        """First step before and last step of every cycle."""
        return list(itertools.pairwise((0, *self.budgets)))

    def problems_over(self, steps: int) -> Problems:
        """A run ends at a budget, since elsewhere its rate has not fallen."""
        if steps not in self.budgets:
            yield "budgets", f"the run of {steps} steps ends at none of them; its last step must be one"

    def milestones(self, steps: int) -> dict[int, str]:
        """Every budget within the run."""
        return {budget: f"budget{budget}" for budget in self.budgets if budget <= steps}


@register("optimizer.schedule", "wsd_s", implementation="optim.schedules:wsd_s")
@options
class WSDS(Budgets):
    """WSD simplified (Wen et al. 2024, arXiv:2410.05192): decay to each budget, then on from there at the full rate."""

    decay: float = option(0.1, "length of a decay as a fraction, rounded to whole steps", above=0, most=1)
    decay_of: str = option(
        "budget",
        "what it is a fraction of: the budget (all steps so far, as the paper's decays lengthen) or the cycle (since the last "
        "budget, as in Levanter)",
        among=("budget", "cycle"),
    )
    shape: str = option(
        "inverse",
        "form of a decay; inverse: straight in 1 / rate, as the paper",
        among=("inverse", "linear", "sqrt", "cosine", "exponential", "square"),
    )
    final: float = option(0.1, "rate at a budget, as a fraction of the full rate", least=0, most=1)

    def problems(self) -> Problems:
        """As of all budgets, and of the form of the decay."""
        yield from Budgets.problems(self)
        yield from shape_problems(self.shape, self.final)

    def problems_of_cycles(self) -> Problems:
        """A decay is no longer than its cycle leaves."""
        yield from Budgets.problems_of_cycles(self)
        for start, end in self.cycles():
            warmup, decay = self.rewarmup if start else self.warmup, self.decay_steps(start, end)
            if warmup + decay > end - start:
                yield (
                    "decay",
                    f"a warm-up of {warmup} and a decay of {decay} steps do not fit in the cycle of {end - start} steps that "
                    f"ends at {end}",
                )

    def decay_steps(self, start: int, end: int) -> int:
        """Updates of the decay of the cycle from budget `start` to budget `end`; at least one."""
        return max(1, round(self.decay * (end if self.decay_of == "budget" else end - start)))

    def milestones(self, steps: int) -> dict[int, str]:
        """Every budget, and the end of the stable phase before it."""
        stable = {end - self.decay_steps(start, end): f"stable{end}" for start, end in self.cycles() if end <= steps}
        return {step: name for step, name in stable.items() if step > 0} | Budgets.milestones(self, steps)


@register("optimizer.schedule", "cyclic_cosine", implementation="optim.schedules:cyclic_cosine")
@options
class CyclicCosine(Budgets):
    """A cosine to each budget, then again from the full rate (arXiv:1608.03983, with given cycles)."""

    final: float = option(0.1, "rate at a budget, as a fraction of the full rate", least=0, most=1)


@register("optimizer.schedule", "infinite", implementation="optim.schedules:infinite")
@options
class Infinite(Warmup):
    """Cool down to a constant rate that can go on for ever, then anneal (arXiv:2403.08763, as in the code of 2503.02844)."""

    cooldown: int = option(0, "steps from the full rate to a lower constant one, after the warm-up", least=0)
    shape: str = option("cosine", "form of the cooldown; inverse_sqrt with tau = 10", among=("cosine", "inverse_sqrt"))
    constant: float = option(0.1, "the constant rate, as a fraction of the full rate", above=0, most=1)
    anneal: int = option(0, "steps of exponential anneal at the end of the run; 0: none, and the run may be extended", least=0)
    final: float = option(0.01, "rate of the last update of the anneal, as a fraction of the full rate", above=0, most=1)
    tasks: tuple[int, ...] = option((), "steps after which new data begins: warm up and cool down again", least=1)
    rewarmup: int = option(0, "steps from the constant rate to the full one after each of `tasks`", least=0)

    @property
    def depends_on_steps(self) -> bool:
        """Only the anneal looks at the end of the run."""
        return self.anneal > 0

    def problems(self) -> Iterator[Problems]:
        """Phases follow each other, and the constant rate is reached by a cooldown."""
        yield self._rate_problems()
        yield self._task_problems()

    def _rate_problems(self) -> Problems:
        if self.constant < 1 and not self.cooldown:
            yield (
                "cooldown",
                f"without one the run is at {self.constant:g} of the full rate from the start; the code of arXiv:2503.02844 "
                "takes a tenth of the run",
            )
        if self.final > self.constant:
            yield "final", f"above the constant fraction of {self.constant:g}"

    def _task_problems(self) -> Problems:
        starts = (0, *self.tasks)
        if any(one >= other for one, other in itertools.pairwise(starts)):
            yield "tasks", "out of order: each must be larger than the one before"
            return
        for one, other in itertools.pairwise(starts):
            length = (self.rewarmup if one else self.warmup) + self.cooldown
            if length > other - one:
                yield "tasks", f"warm-up and cooldown of {length} steps after step {one} do not end before {other}"

    def problems_over(self, steps: int) -> Problems:
        """The anneal begins after the last cooldown; without one a run may end anywhere."""
        last = self.tasks[-1] if self.tasks else 0
        ready = last + (self.rewarmup if last else self.warmup) + self.cooldown
        if self.anneal and ready + self.anneal > steps:
            yield "anneal", f"{self.anneal} steps do not fit in a run of {steps} whose constant phase begins at {ready}"

    def milestones(self, steps: int) -> dict[int, str]:
        """The state before the anneal, from which a new task branches off (`init_from.take`)."""
        return {steps - self.anneal: "stable"} if self.anneal else {}
