"""Options of layer-aware Newton-Schulz: as many steps for each layer's matrix as its spectrum needs."""

from __future__ import annotations

import math

from optim.options.roles import KINDS, Problems, kind_problems
from strata import option, options, register

CANDIDATES = ("jordan3", "jordan4", "jordan5", "jordan6", "jordan7", "jordan8", "deepseek10")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@options
class Choice:
    """From a singular value to a configuration: the cheapest whose threshold the value passes."""

    candidates: tuple[str, ...] = option(
        CANDIDATES, "configurations from cheap to dear, a scheme and its number of steps; the last serves what passes none"
    )
    accept: float = option(
        0.6,
        "a configuration's threshold is the smallest value that it maps to at least this; above 0.68 Jordan's polynomials "
        "would "
        "make the choice not monotone",
        above=0,
        most=0.68,
    )

    def problems(self) -> Problems:
        """Names, and their order."""
        steps = []
        for name in self.candidates:
            scheme = name.rstrip("0123456789")
            if scheme not in ("jordan", "you", "polar_express", "deepseek", "quintic") or scheme == name:
                yield "candidates", f"{name!r} is not a scheme and a number of steps, such as jordan5, you6, deepseek10"
                return
            steps.append(int(name[len(scheme) :]))
            lengths = {"you": (5, 6), "deepseek": (10,), "polar_express": tuple(range(5, 21)), "jordan": tuple(range(1, 21))}
            if steps[-1] not in lengths.get(scheme, tuple(range(1, 21))):
                yield "candidates", f"{scheme} does not come with {steps[-1]} steps"
                return
        if not steps or steps != sorted(steps):
            yield "candidates", "expected configurations in the order of their steps"


@register("optimizer.newton_schulz", "predicted", implementation="optim.directions.layer_aware:predicted")
@options
class Predicted(Choice):
    """From the power laws `s = c M^-alpha` of model size, type of matrix and depth (arXiv:2606.04058)."""

    model_size: int | None = option(None, "M; None: the number of parameters of the model", least=1)
    laws: tuple[str, ...] = option(
        (),
        "laws of your own, `kind@bucket=c,alpha` with bucket mid_early, mid, mid_late, final or *, as trainer.spectra prints",
    )
    kinds: tuple[str, ...] = option((), "more patterns path=kind, before the built-in ones; fnmatch over dotted paths")

    def problems(self) -> Problems:
        """As of the choice, and laws and patterns in their form."""
        yield from Choice.problems(self)
        yield from kind_problems("kinds", self.kinds)
        for law in self.laws:
            where, _, numbers = law.partition("=")
            kind, _, bucket = where.partition("@")
            try:
                c, alpha = (float(word) for word in numbers.split(","))
                fine = 0 < c < math.inf and 0 <= alpha < math.inf
                fine &= kind in KINDS and bucket in ("mid_early", "mid", "mid_late", "final", "*")
            except ValueError:
                fine = False
            if not fine:
                yield "laws", f"{law!r} is not of the form kind@bucket=c,alpha, with one of {', '.join(KINDS)}"


@register("optimizer.newton_schulz", "measured", implementation="optim.directions.layer_aware:measured")
@options
class Measured(Choice):
    """From the momentum's own spectrum: follow a quantile of its singular values, choose, re-check with hysteresis."""

    quantile: float = option(0.5, "descending rank of the singular value that must pass", among=QUANTILES)
    every: int = option(25, "steps between measurements; under layer sampling each bucket of layers counts its own", least=1)
    decay: float = option(0.9, "of the running mean of the logarithm of the quantiles, a measurement", least=0, below=1)
    choose_at: int = option(500, "step of the first choice; until then the last candidate is used", least=1)
    recheck: int = option(0, "steps between later checks; 0: the choice is frozen", least=0)
    hysteresis: float = option(
        1.5, "a later check changes a choice only if the value clears the threshold by this factor", least=1
    )

    def problems(self) -> Problems:
        """As of the choice, and something must be measured before it."""
        yield from Choice.problems(self)
        if self.every > self.choose_at:
            yield "every", f"nothing would be measured before the choice at step {self.choose_at}"

    def problems_over(self, steps: int) -> Problems:
        """A run must reach its choice."""
        if self.choose_at > steps:
            yield "choose_at", f"a run of {steps} updates ends before the choice, and the last candidate would serve all of it"
