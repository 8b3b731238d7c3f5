"""How small a singular value each Newton-Schulz configuration still brings near 1, computed from its polynomials.

    python -m optim.directions.thresholds

prints the table. A configuration is named by a scheme and its number of steps: jordan5, you6, polar_express5, deepseek10, and
quintic8 for the convergent (2, -1.5, 0.5).
"""

from __future__ import annotations

import functools

import numpy as np

from optim.directions.newton_schulz import Polynomial, polynomials, scalar_map

QUINTIC = (2.0, -1.5, 0.5)
ROUNDING = 1.66e-3
"""Frobenius norm of what rounding to bfloat16 changes, over that of a matrix of normal entries."""

TABLE = tuple(f"jordan{k}" for k in range(2, 11)) + ("you5", "you6", "polar_express5", "quintic5", "deepseek10")


def configuration(name: str) -> tuple[Polynomial, ...]:
    """The polynomials of a configuration by name.

    Raises:
      ValueError: no scheme and number of steps, or a number that the scheme does not come with.
    """
    scheme = name.rstrip("0123456789")
    if scheme == name:
        raise ValueError(f"a configuration is a scheme and a number of steps, such as jordan5, not {name!r}")
    steps = int(name[len(scheme) :])
    if scheme == "quintic":
        return polynomials([QUINTIC], steps)
    return polynomials(name if scheme == "you" else scheme, steps)


@functools.cache
def threshold(name: str, accept: float) -> float:
    """The smallest normalised singular value that a configuration maps to at least `accept`.

    For `accept` up to 0.68, the bottom of the band of Jordan's polynomials, every larger value stays at or above it too, so
    that a value passes a configuration exactly if it is at least the threshold.

    Raises:
      ValueError: no value does, or `accept` is above 0.68.
    """
    if not 0 < accept <= 0.68:
        raise ValueError(f"accept lies in (0, 0.68], where the choice is monotone, not {accept}")
    chosen = configuration(name)
    grid = np.geomspace(1e-9, 1, 20_001)
    passing = np.flatnonzero(scalar_map(grid, chosen) >= accept)
    if not len(passing):
        raise ValueError(f"{name} maps nothing to {accept}")
    low, high = grid[max(passing[0] - 1, 0)], grid[passing[0]]
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if scalar_map(middle, chosen) >= accept else (middle, high)
    return float(high)


def cheapest(value: float, candidates: tuple[str, ...], accept: float) -> int:
    """The first candidate whose threshold a singular value passes; the last if it passes none."""
    passing = [i for i, name in enumerate(candidates) if value >= threshold(name, accept)]
    return passing[0] if passing else len(candidates) - 1


def rounding_floor(m: int, n: int) -> float:
    """The largest singular value, about, of what rounding to bfloat16 adds to an m x n matrix of Frobenius norm 1.

        1.66e-3 (1 / sqrt(m) + 1 / sqrt(n))

    A rounded entry is off by 2^-8 / sqrt(3) of the power of two below it in root mean square, 1.66e-3 of the norm of normal
    entries (measured; a test holds it). Such errors are as good as independent, and the singular values of a matrix of
    independent entries of Frobenius norm d reach d (1 / sqrt(m) + 1 / sqrt(n)), the edge of Marchenko and Pastur's law (1967).
    Singular values below it are lost with the first cast, whatever the steps after it: measured with bfloat16 products,
    directions planted at the threshold of a configuration reach 0.55 of the 0.6 where that is the floor, 0.45 at half of it.
    """
    return ROUNDING * (m**-0.5 + n**-0.5)


def needs_float32(name: str, accept: float, m: int, n: int) -> bool:
    """Whether a configuration's threshold for an m x n matrix lies below the rounding floor of bfloat16.

    In bfloat16 the values that it is chosen for would be rounding noise, and the noise would be orthogonalised.
    """
    return threshold(name, accept) < rounding_floor(m, n)


def main() -> None:
    """Print slope at 0 and thresholds of the usual configurations."""
    levels = (0.1, 0.5, 0.6, 0.68)
    print("| configuration | slope at 0 | " + " | ".join(f"f >= {level}" for level in levels) + " |")
    print("|---" * (len(levels) + 2) + "|")
    for name in TABLE:
        slope = np.prod([a for a, _, _ in configuration(name)])
        print(f"| {name} | {slope:.4g} | " + " | ".join(f"{threshold(name, level):.3g}" for level in levels) + " |")


if __name__ == "__main__":
    main()
