"""Schedules: the fraction of the full rate that update k of a run uses. The first update is 1, the last is `steps`.

Each form is written once and evaluated either on the host in float64 (`xp=numpy`, for the table of rates) or inside
jit in float32 (`xp=jax.numpy`). Beyond the last step a schedule stays where it ended.

With a warm-up of w steps, update k <= w uses k / w of the full rate, so that update 1 uses 1 / w and update w all of it.
A decay over D steps that starts after update s uses x = (k - s) / D in update k: update s is still full, and update s + D
has exactly the `final` fraction. With `final` 0 that last update changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

import strata
from optim import options
from strata import ConfigError, Problem

Multiplier = Callable[..., Any]
"""`multiplier(step, xp)`, xp NumPy or jax.numpy -> fraction of the full rate; `step` a whole number or an array of them."""


def constant(chosen: options.Constant, steps: int | None) -> Multiplier:
    """1 after warm-up."""
    return lambda step, xp=np: _warmup(step, chosen.warmup, xp)


def linear(chosen: options.Linear, steps: int) -> Multiplier:
    """`1 - (1 - final) x` with x from 0 at the end of the warm-up to 1 at the last step."""
    return _decay_after_warmup(chosen, steps, "linear")


def cosine(chosen: options.Cosine, steps: int) -> Multiplier:
    """`final + (1 - final) (1 + cos(pi x)) / 2` (Loshchilov and Hutter 2016, arXiv:1608.03983), x as in `linear`."""
    return _decay_after_warmup(chosen, steps, "cosine")


def inverse_sqrt(chosen: options.InverseSqrt, steps: int | None) -> Multiplier:
    """`sqrt(t0 / step)` from t0 = max(warmup, plateau) on (Vaswani et al. 2017, arXiv:1706.03762)."""
    start = max(chosen.warmup, chosen.plateau)

    def multiplier(step: Any, xp: ModuleType = np) -> Any:
        return _warmup(step, chosen.warmup, xp) * xp.sqrt(start / xp.maximum(_real(step, xp), start))

    return multiplier


def wsd(chosen: options.WSD, steps: int) -> Multiplier:
    """Full after warm-up, then a decay to `final` (Hu et al. 2024, arXiv:2404.06395; shapes in `decay_shape`)."""
    length = chosen.decay_steps(steps)

    def multiplier(step: Any, xp: ModuleType = np) -> Any:
        x = _progress(step, steps - length, length, xp)
        return _warmup(step, chosen.warmup, xp) * decay_shape(x, chosen.shape, chosen.final, xp)

    return multiplier


def wsd_s(chosen: options.WSDS, steps: int | None) -> Multiplier:
    """WSD-S (Wen et al. 2024, arXiv:2410.05192): before each budget T a decay over D updates, after it the full rate again.

    D is `decay` times T, or times the cycle's length. The decay is `decay_shape` of x = (k - (T - D)) / D, so that update T has
    exactly the final fraction and update T + 1 the full rate (or the first of the re-warm-up). Beyond the last budget the rate
    stays at the final fraction.
    """

    def cycle(step: Any, start: int, end: int, xp: ModuleType) -> Any:
        length = chosen.decay_steps(start, end)
        return decay_shape(_progress(step, end - length, length, xp), chosen.shape, chosen.final, xp)

    return _by_cycle(chosen, cycle)


def cyclic_cosine(chosen: options.CyclicCosine, steps: int | None) -> Multiplier:
    """To each budget a cosine as in `cosine`, then again from the full rate."""

    def cycle(step: Any, start: int, end: int, xp: ModuleType) -> Any:
        ready = start + (chosen.rewarmup if start else chosen.warmup)
        return decay_shape(_progress(step, ready, end - ready, xp), "cosine", chosen.final, xp)

    return _by_cycle(chosen, cycle)


def infinite(chosen: options.Infinite, steps: int | None) -> Multiplier:
    """Warm-up, cooldown to a constant rate, an optional exponential anneal at the end (arXiv:2403.08763).

        cooldown, u from 0 to 1       cosine: c + (1 - c)(1 + cos(pi u)) / 2
                                      inverse_sqrt: 1 + (c - 1) h(u) / h(1),  h(u) = 1 / sqrt(1 + 10 u) - 1
        anneal, u from 0 to 1         c (final / c)^u

    The forms are those of the code of arXiv:2503.02844. There a new task starts from the state before the anneal, without
    warming up; `tasks` and `rewarmup` do warm up, from the constant rate, and cool down again.
    """
    constant, tau = chosen.constant, 10.0

    def cooled(step: Any, ready: int, xp: ModuleType) -> Any:
        u = _progress(step, ready, chosen.cooldown, xp) if chosen.cooldown else xp.where(_real(step, xp) > ready, 1.0, 0.0)
        if chosen.shape == "cosine":
            return decay_shape(u, "cosine", constant, xp)
        return 1 + (constant - 1) * ((1 / xp.sqrt(1 + tau * u) - 1) / float(1 / np.sqrt(1 + tau) - 1))

    def multiplier(step: Any, xp: ModuleType = np) -> Any:
        value = _warmup(step, chosen.warmup, xp) * cooled(step, chosen.warmup, xp)
        for start in chosen.tasks:
            ready = start + chosen.rewarmup
            warm = constant + (1 - constant) * _progress(step, start, chosen.rewarmup, xp) if chosen.rewarmup else 1.0
            again = xp.where(_real(step, xp) > ready, cooled(step, ready, xp), warm)
            value = xp.where(_real(step, xp) > start, again, value)
        if chosen.anneal:
            value = value * xp.exp(
                _progress(step, steps - chosen.anneal, chosen.anneal, xp) * float(np.log(chosen.final / constant))
            )
        return value

    return multiplier


def _by_cycle(chosen: options.Budgets, cycle: Callable[[Any, int, int, ModuleType], Any]) -> Multiplier:
    def multiplier(step: Any, xp: ModuleType = np) -> Any:
        value = None
        for start, end in chosen.cycles():
            own = cycle(step, start, end, xp)
            if start == 0:
                value = _warmup(step, chosen.warmup, xp) * own
                continue
            if chosen.rewarmup:
                warm = chosen.final + (1 - chosen.final) * _progress(step, start, chosen.rewarmup, xp)
                own = xp.where(_real(step, xp) <= start + chosen.rewarmup, warm, own)
            value = xp.where(_real(step, xp) > start, own, value)
        return value

    return multiplier


def decay_shape(x: Any, shape: str, final: float, xp: ModuleType = np) -> Any:
    """From 1 at x = 0 to `final` at x = 1.

    linear: 1 - x; sqrt: 1 - sqrt(x) (Hägele et al. 2024, arXiv:2405.18392); cosine: (1 + cos(pi x)) / 2; square: (1 - x)^2;
    each mapped onto [final, 1]. exponential: final^x, a straight line in the logarithm; inverse: final / (final + (1 - final)
    x), a straight line in 1 / rate (arXiv:2410.05192).
    """
    if shape == "inverse":
        return final / (final + (1 - final) * x)
    if shape == "exponential":
        return xp.exp(x * float(np.log(final)))
    fallen = {
        "linear": lambda: x,
        "sqrt": lambda: xp.sqrt(x),
        "cosine": lambda: 0.5 * (1 - xp.cos(np.pi * x)),
        "square": lambda: x * (2 - x),
    }[shape]()
    return (1 - fallen) + final * fallen  # exact at both ends


def multiplier_of(schedule: Any, steps: int | None, path: str = "optimizer.schedule") -> Multiplier:
    """The multiplier of a schedule's options over a run of `steps` updates. `path` is where the config holds it, for messages.

    Raises:
      ConfigError: the schedule depends on the length of the run and `steps` is None, or it does not fit in it.
    """
    if steps is None and schedule.depends_on_steps:
        message = "it depends on the length of the run, which was not given: pass steps= (constant and inverse_sqrt need none)"
        raise ConfigError([Problem(f"{path}.name", message, schedule.name)], source="the optimizer's schedule")
    if steps is not None:
        problems = [
            Problem(f"{path}.{name}", message, getattr(schedule, name)) for name, message in schedule.problems_over(steps)
        ]
        if problems:
            raise ConfigError(problems, source="the optimizer's schedule")
    return strata.implementation(schedule)(schedule, steps)


class RateTable:
    """The rate of every group at every step, computed on the host in float64 and rounded once to float32.

    `table(k)` is what update k, the first being 1, passes to `tx.update(..., rates=table(k))`.
    """

    def __init__(self, peaks: Mapping[str, float], multipliers: Mapping[str, Multiplier]):
        self.peaks = dict(peaks)  # full rate of each group, the group of matrices first
        self._multipliers = dict(multipliers)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(self.peaks)

    def __call__(self, step: int) -> dict[str, np.float32]:
        """Rates of update `step` by group."""
        return {name: np.float32(peak * self._multipliers[name](step, np)) for name, peak in self.peaks.items()}


def _real(step: Any, xp: ModuleType) -> Any:
    return xp.asarray(step, dtype=np.float64 if xp is np else np.float32)


def _warmup(step: Any, warmup: int, xp: ModuleType) -> Any:
    return xp.minimum(_real(step, xp) / max(warmup, 1), 1.0) if warmup else xp.ones_like(_real(step, xp))


def _progress(step: Any, start: int, length: int, xp: ModuleType) -> Any:
    if length == 0:
        return xp.zeros_like(_real(step, xp))
    return xp.clip((_real(step, xp) - start) / length, 0.0, 1.0)


def _decay_after_warmup(chosen: options.Linear | options.Cosine, steps: int, shape: str) -> Multiplier:
    def multiplier(step: Any, xp: ModuleType = np) -> Any:
        x = _progress(step, chosen.warmup, steps - chosen.warmup, xp)
        return _warmup(step, chosen.warmup, xp) * decay_shape(x, shape, chosen.final, xp)

    return multiplier
