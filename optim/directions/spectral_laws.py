"""Power laws of the momentum's spectrum: `s_q = c M^-alpha` by kind of matrix and depth (arXiv:2606.04058).

s_q is the singular value of descending rank ceil(q r) over the Frobenius norm, M the number of parameters. Exponents are
second hand; 0.25 before the last layer is that of query, key, value and output, and for gate, up and down, where none was
found, it is assumed. Of the constants two are known (value at 300 B); they put the median of both matrices at 1.2e-2 to 1.3e-2
for the smallest model of 77 M, and every other law here is set to 1.25e-2 there: a choice of this project. Of the two final MLP
matrices one has 0.96 and the other 0.52, and sources disagree which; both are treated as the steeper one. The output gate of
a mixer, which the paper's models have none of, has the laws of the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from optim.options.roles import KINDS

BUCKETS = ("mid_early", "mid", "mid_late", "final")
SMALLEST, THERE = 77e6, 1.25e-2


class Law(NamedTuple):
    """`s = c M^-alpha`."""

    c: float
    alpha: float

    def at(self, size: float) -> float:
        """The singular value of a model of `size` parameters."""
        return self.c * size**-self.alpha


def _through_smallest(alpha: float) -> Law:
    return Law(THERE * SMALLEST**alpha, alpha)


_final = {
    "query": 0.46,
    "key": 0.38,
    "value": 0.58,
    "output": 0.66,
    "output_gate": 0.58,
    "gate": 0.96,
    "up": 0.96,
    "down": 0.96,
}

MEDIAN_LAWS: dict[tuple[str, str], Law] = (
    {(kind, bucket): _through_smallest(0.25) for kind in KINDS for bucket in ("mid_early", "mid", "mid_late")}
    | {(kind, "final"): _through_smallest(alpha) for kind, alpha in _final.items()}
    | {("query", "mid_late"): Law(1.4e-3 * 3e11**0.27, 0.27), ("output", "final"): Law(5e-5 * 3e11**0.66, 0.66)}
)
"""Laws of the median singular value, by kind and bucket."""


def bucket(place: int, depth: int) -> str:
    """Where a layer stands: the nearest of N/4, N/2 and 3N/4, the earlier of two; "final" is the last layer alone."""
    if place == depth - 1:
        return "final"
    return BUCKETS[min(2, max(0, math.ceil(4 * (place + 1) / depth - 0.5) - 1))]


def laws(own: Sequence[str]) -> Mapping[tuple[str, str], Law]:
    """The laws with a user's in their place, written `kind@bucket=c,alpha`; a bucket of * stands for all four."""
    found = dict(MEDIAN_LAWS)
    for text in own:
        where, _, numbers = text.partition("=")
        kind, _, place = where.partition("@")
        c, alpha = (float(word) for word in numbers.split(","))
        for name in BUCKETS if place == "*" else (place,):
            found[kind, name] = Law(c, alpha)
    return found


class Fit(NamedTuple):
    """A law fitted to measured values, with 95 % intervals (NaN where there are too few sizes for one)."""

    law: Law
    alpha_interval: tuple[float, float]
    c_interval: tuple[float, float]
    r_squared: float
    slopes: tuple[float, ...]  # -d ln s / d ln M between successive sizes: a power law has equal ones


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """Least squares of `ln s = ln c - alpha ln M`, intervals by Student's t with as many degrees of freedom as runs less two.

    Args:
      sizes: numbers of parameters, at least two different ones.
      values: singular values above 0, one a run.

    Raises:
      ValueError: fewer than two sizes, or values that are not positive.
    """
    from scipy import stats  # two thirds of a second, at every start if it stood above

    x, y = np.log(np.asarray(sizes, np.float64)), np.asarray(values, np.float64)
    if len(np.unique(x)) < 2:
        raise ValueError("a law needs runs of at least two sizes")
    if np.any(~(y > 0)):
        raise ValueError("singular values of a law are above 0")
    y = np.log(y)
    middle = x - x.mean()
    slope = float(middle @ y / (middle @ middle))
    rest = y - y.mean() - slope * middle
    free = len(x) - 2
    spread = float(np.sqrt(rest @ rest / free)) * stats.t.ppf(0.975, free) if free > 0 else np.nan
    reach = spread / np.sqrt(middle @ middle)
    at_one = float(y.mean() - slope * x.mean())
    reach_at_one = spread * np.sqrt(1 / len(x) + x.mean() ** 2 / (middle @ middle))
    total = (y - y.mean()) @ (y - y.mean())
    order = np.unique(x)
    means = np.array([y[x == size].mean() for size in order])
    return Fit(
        Law(float(np.exp(at_one)), -slope),
        (-slope - reach, -slope + reach),
        (float(np.exp(at_one - reach_at_one)), float(np.exp(at_one + reach_at_one))),
        float(1 - (rest @ rest) / total) if total > 0 else 1.0,
        tuple(float(value) for value in -np.diff(means) / np.diff(order)),
    )
