"""The statistics of a comparison, written out. Distributions come from SciPy; `tests/report` holds every result to SciPy's.

Everything is about differences paired by seed, d_1 ... d_n, so that what a seed does to both arms falls out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from strata import ConfigError

EXACT = 20
"""Pairs up to which all 2^n sign flips are counted; beyond, `DRAWS` random ones with a fixed seed."""
DRAWS = 2**17


def scipy(module: str) -> Any:
    """A module of SciPy. Raises `ConfigError` with what to install."""
    import importlib

    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError:
        raise ConfigError("a report needs SciPy and Matplotlib: pip install 'strata-lm[report]'") from None


@dataclasses.dataclass(frozen=True)
class Summary:
    """A sample: mean, standard deviation (n - 1), and the t interval of the mean; NaN where n is too small."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    level: float = 0.95


def summarise(values: Sequence[float], level: float = 0.95) -> Summary:
    """mean +- t_{n-1} sd / sqrt(n), where t is the (1 + level) / 2 quantile."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return Summary(n, mean, math.nan, math.nan, math.nan, level)
    sd = math.hypot(*(x - mean for x in values)) / math.sqrt(n - 1)
    half = t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half, level)


def t_quantile(probability: float, df: float) -> float:
    """Of Student's t."""
    return float(scipy("special").stdtrit(df, probability))


@dataclasses.dataclass(frozen=True)
class Test:
    """P values of a test that the mean difference is 0.

    Attributes:
      greater: of the hypothesis that it is at most the margin, against more.
      less: of the hypothesis that it is at least 0, against less.
      least: the smallest two-sided value that n pairs can give.
    """

    name: str
    statistic: float
    greater: float
    less: float
    least: float = 0.0
    exact: bool = True

    @property
    def two_sided(self) -> float:
        """Twice the smaller one; the usual two-sided value where the margin is 0."""
        return min(1.0, 2 * min(self.greater, self.less))


def paired_t(differences: Sequence[float], margin: float = 0.0) -> Test:
    """t = mean / (sd / sqrt(n)) with n - 1 degrees of freedom (Student 1908); exact for normal differences.

    Equal differences have no spread: then t is infinite, or 0 where the difference is 0 too, as in SciPy.

    Raises:
      ValueError: there are fewer than two differences.
    """
    n = len(differences)
    if n < 2:
        raise ValueError("a t-test needs at least two differences")
    sample = summarise(differences)
    return Test("paired t-test", _t(sample, 0.0), _t_cdf(-_t(sample, margin), n - 1), _t_cdf(_t(sample, 0.0), n - 1))


def _t(sample: Summary, against: float) -> float:
    distance = sample.mean - against
    error = sample.sd / math.sqrt(sample.n)
    if error == 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / error


def _t_cdf(t: float, df: float) -> float:
    if math.isinf(t):
        return float(t > 0)
    return float(scipy("special").stdtr(df, t))


def sign_flip(differences: Sequence[float], margin: float = 0.0) -> Test:
    """The share of sign patterns with a mean as extreme as the one seen (Fisher 1935); exact for symmetric differences.

    With n pairs no two-sided value is below 2 / 2^n: 0.0625 for five pairs.

    Raises:
      ValueError: there are no differences.
    """
    d = np.asarray(differences, np.float64)
    if not d.size:
        raise ValueError("a sign-flip test needs differences")
    greater, exact = _flipped_share(d - margin)
    less, _ = _flipped_share(-d)
    return Test("sign-flip test", float(d.mean()), greater, less, min(1.0, 2 / 2**d.size), exact)


def _flipped_share(d: np.ndarray) -> tuple[float, bool]:
    """P(sum of s_i d_i >= sum of d_i) over signs s, and whether all of them were counted."""
    observed = float(d.sum())
    slack = 1e-12 * float(np.abs(d).sum())  # equal sums that were added in another order
    if d.size <= EXACT:
        sums = np.zeros(1)
        for x in d:
            sums = np.concatenate([sums + x, sums - x])
        return float(np.count_nonzero(sums >= observed - slack) / sums.size), True
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(DRAWS, d.size))
    found = np.count_nonzero(signs @ d >= observed - slack)
    return float((found + 1) / (DRAWS + 1)), False


def sign_flip_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The shifts that the sign-flip test does not reject: between order statistics of the means of all subsets.

    Hartigan 1969: each of the 2^n - 1 subset means is as likely as any other to be the next above the centre of symmetry.
    Infinite where n pairs cannot reject anything at this level.
    """
    d = np.asarray(differences, np.float64)
    if d.size <= EXACT:
        sums, counts = np.zeros(1), np.zeros(1, np.int64)
        for x in d:
            sums, counts = np.concatenate([sums, sums + x]), np.concatenate([counts, counts + 1])
        means = np.sort(sums[1:] / counts[1:])
    else:
        chosen = np.random.default_rng(0).integers(0, 2, (DRAWS - 1, d.size)).astype(np.float64)
        chosen = chosen[chosen.sum(1) > 0]
        means = np.sort(chosen @ d / chosen.sum(1))
    # A shift is rejected on one side while (1 + means at most the shift) / (1 + means) is at most the level of that side.
    rejected = math.floor((1 - level) / 2 * (means.size + 1) + 1e-9)
    if rejected < 1:
        return -math.inf, math.inf
    return float(means[rejected - 1]), float(means[means.size - rejected])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for testing all of them (Holm 1979): the family-wise error rate is kept whatever their dependence."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """The level at which each is decided: alpha / (m - k) after k rejections; where it stops, the rest share one level.

    An interval at one minus this level holds zero exactly where the hypothesis is not rejected.
    """
    m = len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    levels, rejected = [alpha] * m, 0
    for rank, index in enumerate(order):
        levels[index] = alpha / (m - rejected)
        if rank == rejected and p_values[index] <= levels[index]:
            rejected += 1
    return levels


def power(n: int, effect: float, sd: float, alpha: float = 0.05) -> float:
    """Of the two-sided paired t-test to find a true mean difference `effect` (> 0) in its own direction.

    P(T > t_{1 - alpha/2}) for T noncentral t with n - 1 degrees of freedom and noncentrality effect / (sd / sqrt(n)).
    """
    if n < 2:
        return 0.0
    if sd == 0:
        return 1.0 if effect > 0 else 0.0
    critical = t_quantile(1 - alpha / 2, n - 1)
    return float(scipy("stats").nct.sf(critical, n - 1, effect / sd * math.sqrt(n)))


def smallest_effect(n: int, sd: float, alpha: float = 0.05, wanted: float = 0.8) -> float:
    """The true difference that n pairs find with the power wanted; infinite for fewer than two pairs."""
    if n < 2:
        return math.inf
    if sd == 0:
        return 0.0
    high = 1.0
    while power(n, high, 1.0, alpha) < wanted:
        high *= 2
    return sd * float(scipy("optimize").brentq(lambda effect: power(n, effect, 1.0, alpha) - wanted, 0.0, high, xtol=1e-10))


def pairs_needed(effect: float, sd: float, alpha: float = 0.05, wanted: float = 0.8, most: int = 10_000) -> int | None:
    """The fewest pairs with the power wanted; None beyond `most`."""
    low, high = 1, 2
    while power(high, effect, sd, alpha) < wanted:
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, effect, sd, alpha) >= wanted else (middle, high)
    return high


def standardised(differences: Sequence[float]) -> float:
    """Hedges' g of paired differences: mean / sd, times the correction Gamma(f/2) / (sqrt(f/2) Gamma((f-1)/2)), f = n - 1.

    NaN for fewer than three pairs or without spread.
    """
    sample = summarise(differences)
    f = sample.n - 1
    if f < 2 or not sample.sd > 0:
        return math.nan
    correction = math.exp(math.lgamma(f / 2) - math.lgamma((f - 1) / 2)) / math.sqrt(f / 2)
    return sample.mean / sample.sd * correction


def welch(one: Sequence[float], two: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """Difference of means of two independent samples: `(difference, low, high, two-sided p)` (Welch 1947)."""
    a, b = summarise(one), summarise(two)
    difference = a.mean - b.mean
    if a.n < 2 or b.n < 2:
        return difference, math.nan, math.nan, math.nan
    of_a, of_b = a.sd / math.sqrt(a.n), b.sd / math.sqrt(b.n)
    error = math.hypot(of_a, of_b)
    if error == 0:
        return difference, difference, difference, 1.0 if difference == 0 else 0.0
    df = 1 / ((of_a / error) ** 4 / (a.n - 1) + (of_b / error) ** 4 / (b.n - 1))
    half = t_quantile((1 + level) / 2, df) * error
    return difference, difference - half, difference + half, 2 * _t_cdf(-abs(difference / error), df)
