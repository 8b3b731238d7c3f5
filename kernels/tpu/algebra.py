"""The algebra of one chunk of one head, inside a kernel: matrices only, nothing wider than a chunk.

The same equations as `kernels.xla`, in what a TPU has: products on the matrix unit, masks and sums along an axis on
the vector unit; no cumulative sums, no gathers. States are kept transposed, [V,K], so that a decay by channel acts along
lanes. Columns are [C,1], rows [1,C].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SIDE = 16
"""Side of the diagonal blocks that are inverted by substitution."""


class Products(NamedTuple):
    """Matrix products with float32 sums of float32 operands that count as so many bfloat16 pieces.

    1: rounded, relative error about 2^-8. 2: three products of two pieces each, about 2^-16. 3: full precision.
    """

    pieces: int

    def _dot(self, a: jax.Array, b: jax.Array, left: int, right: int) -> jax.Array:
        def product(a: jax.Array, b: jax.Array, precision: lax.Precision) -> jax.Array:
            dimensions = (((left,), (right,)), ((), ()))
            return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

        if self.pieces == 3:
            return product(a, b, lax.Precision.HIGHEST)
        if self.pieces == 1:
            return product(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), lax.Precision.DEFAULT)
        (high, low), (other, rest) = halves(a), halves(b)
        small = product(high, rest, lax.Precision.DEFAULT) + product(low, other, lax.Precision.DEFAULT)
        return product(high, other, lax.Precision.DEFAULT) + small

    def nn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a b"""
        return self._dot(a, b, 1, 0)

    def nt(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a b^T"""
        return self._dot(a, b, 1, 1)

    def tn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a^T b"""
        return self._dot(a, b, 0, 0)


def pieces(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 as the sum of three bfloat16, exactly: eight bits of the mantissa each, cut off rather than rounded."""

    def cut(x: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        return lax.bitcast_convert_type(bits, jnp.float32)

    high = cut(x)
    middle = cut(x - high)
    return tuple(part.astype(jnp.bfloat16) for part in (high, middle, x - high - middle))


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two bfloat16, relative error about 2^-17; rounded, so that errors do not add up on one side."""
    # By bits: XLA, which interprets the kernels, may drop a conversion to bfloat16 and back.
    bits = (lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(1 << 15)) & jnp.int32(-65536)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def rounded(x: jax.Array) -> jax.Array:
    """float32 to the nearest bfloat16, in float32."""
    return halves(x)[0].astype(jnp.float32)


def sums(chosen: jax.Array, x: jax.Array) -> jax.Array:
    """Sums of the rows of x [C,D] that each row of `chosen`, bool [C,C], names. Exact up to the order of float32 additions."""
    ones = chosen.astype(jnp.float32).astype(jnp.bfloat16)
    dots = Products(1)
    return sum(dots.nn(ones, part) for part in pieces(x))


class Grid(NamedTuple):
    """Numbers of the rows (i) and columns (j) of a [C,C] matrix."""

    i: jax.Array
    j: jax.Array

    @classmethod
    def of(cls, size: int) -> Grid:
        return cls(*(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)))

    def column(self, row: jax.Array) -> jax.Array:
        """A row as a column."""
        return jnp.sum(jnp.where(self.i == self.j, row, 0.0), axis=1, keepdims=True)

    def row(self, column: jax.Array) -> jax.Array:
        """A column as a row."""
        return jnp.sum(jnp.where(self.i == self.j, column, 0.0), axis=0, keepdims=True)


class Masks(NamedTuple):
    """causal, strict [C,C]: pairs j <= i and j < i of one segment. entered, left [C,1]: rows that the entering state reaches,
    and that reach the leaving state; through [1,1]: the entering state reaches the leaving one. Floats; None: all do."""

    causal: jax.Array
    strict: jax.Array
    entered: jax.Array | None
    left: jax.Array | None
    through: jax.Array | None


def masks(grid: Grid, runs: jax.Array | None) -> Masks:
    """`runs` [1,C] numbers the segments of a chunk from that of the entering state, which is 0."""
    if runs is None:
        return Masks(grid.j <= grid.i, grid.j < grid.i, None, None, None)
    column, last = grid.column(runs), runs[:, -1:]
    same = column == runs
    reach = ((column == 0.0), (column == last), (last == 0.0))
    return Masks(same & (grid.j <= grid.i), same & (grid.j < grid.i), *(x.astype(jnp.float32) for x in reach))


def masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return x if mask is None else x * mask


class NoDecay:
    """Nothing decays; segments alone cut."""

    def __init__(self, mask: Masks, width: int):
        one = jnp.ones((1, 1), jnp.float32)
        self.entry, self.exit, self.through = (masked(one, x) for x in mask[2:])

    def scores(self, dots: Products, a: jax.Array, b: jax.Array) -> jax.Array:
        return dots.nt(a, b)

    def pull(self, dots: Products, d: jax.Array, a: jax.Array, b: jax.Array, scores: jax.Array) -> tuple:
        return dots.nn(d, b), dots.tn(d, a), None


class ScalarDecay:
    """One decay a row. g [2,C]: the log decays as multiples of 1/256 and the rest (see `kernels.xla.decay.cumulative`)."""

    def __init__(self, grid: Grid, mask: Masks, g: jax.Array):
        self.grid = grid
        gap = last = total = 0.0
        for part in (g[0:1], g[1:2]):
            upto = jnp.sum(jnp.where(grid.j <= grid.i, part, 0.0), axis=1, keepdims=True)
            gap, last, total = gap + (upto - grid.row(upto)), last + (upto[-1:] - upto), total + upto
        self.pairs = jnp.exp(jnp.where(grid.j <= grid.i, gap, 0.0))
        self.entry = masked(jnp.exp(total), mask.entered)
        self.exit = masked(jnp.exp(last), mask.left)
        self.through = masked(jnp.exp(total[-1:]), mask.through)

    def scores(self, dots: Products, a: jax.Array, b: jax.Array) -> jax.Array:
        return dots.nt(a, b) * self.pairs

    def pull(self, dots: Products, d: jax.Array, a: jax.Array, b: jax.Array, scores: jax.Array) -> tuple:
        """Cotangents of a, b and G (a column) for that of the scores; the diagonal does not depend on G."""
        weight = jnp.where(self.grid.j < self.grid.i, d * scores, 0.0)
        gate = jnp.sum(weight, axis=1, keepdims=True) - self.grid.column(jnp.sum(weight, axis=0, keepdims=True))
        decayed = d * self.pairs
        return dots.nn(decayed, b), dots.tn(decayed, a), gate

    def gate(self, pairs: jax.Array, entered: jax.Array, left: jax.Array, through: jax.Array) -> jax.Array:
        """dg as a row [1,C]; see `kernels.xla.decay.gate_gradient`."""
        grid = self.grid
        entered, left, through = (jnp.sum(x, axis=1, keepdims=True) for x in (entered, left, through))
        after = jnp.sum(jnp.where(grid.i >= grid.j, pairs + entered, 0.0), axis=0, keepdims=True)
        before = jnp.sum(jnp.where(grid.i < grid.j, left, 0.0), axis=0, keepdims=True)
        return after + before + through


class VectorDecay:
    """One decay a channel, by halves (see `kernels.xla.decay.VectorDecay`). g [C,K].

    Every exponent is a sum of g over a stretch of rows, so it is a matrix of zeros and ones times g: all terms have one
    sign, and nothing cancels. A level is one product over the whole chunk, of which a mask keeps the pairs of the level.
    """

    def __init__(self, grid: Grid, mask: Masks, g: jax.Array):
        self.grid = grid
        self.entry = jnp.exp(sums(grid.j <= grid.i, g))
        self.through = self.entry[-1:]
        self.exit = masked(jnp.exp(sums(grid.j > grid.i, g)), mask.left)
        self.entry, self.through = masked(self.entry, mask.entered), masked(self.through, mask.through)
        self.levels = []
        size = g.shape[0]
        for level in range(size.bit_length() - 1):
            half = 1 << level
            between = ((grid.i >> (level + 1)) << (level + 1)) + half  # first row of the lower half of i's block
            below = (grid.j > between) & (grid.j <= grid.i)
            above = (grid.j > grid.i) & (grid.j <= between)
            weight = jnp.exp(sums(below | above, g))
            same_block = (grid.i >> (level + 1)) == (grid.j >> (level + 1))
            pairs = same_block & ((grid.i & half) != 0) & ((grid.j & half) == 0)
            self.levels.append((pairs, weight))

    def scores(self, dots: Products, a: jax.Array, b: jax.Array) -> jax.Array:
        found = jnp.where(self.grid.i == self.grid.j, dots.nt(a, b), 0.0)
        for pairs, weight in self.levels:
            found += jnp.where(pairs, dots.nt(a * weight, b * weight), 0.0)
        return found

    def pull(self, dots: Products, d: jax.Array, a: jax.Array, b: jax.Array, scores: jax.Array) -> tuple:
        """Cotangents of a, b and G [C,K] for that of the scores; the diagonal does not depend on G.

        A pair of rows counts in G with either sign, and cancels wherever both rows are summed. Where operands are
        rounded it must be of the rounded ones, or what is left of the pairs adds up over the chunk.
        """
        da, db, gate = jnp.zeros_like(a), jnp.zeros_like(b), jnp.zeros_like(a)
        for pairs, weight in self.levels:
            corner, lower, upper = jnp.where(pairs, d, 0.0), a * weight, b * weight
            if dots.pieces == 1:
                lower, upper = rounded(lower), rounded(upper)
            down, up = dots.nn(corner, upper), dots.tn(corner, lower)
            da += weight * down
            db += weight * up
            if dots.pieces == 1:
                gate += lower * down - upper * up
        if dots.pieces > 1:
            gate = a * da - b * db
        diagonal = jnp.sum(jnp.where(self.grid.i == self.grid.j, d, 0.0), axis=1, keepdims=True)
        return da + diagonal * b, db + diagonal * a, gate

    def gate(self, pairs: jax.Array, entered: jax.Array, left: jax.Array, through: jax.Array) -> jax.Array:
        """dg [C,K]; see `kernels.xla.decay.gate_gradient`."""
        after = sums(self.grid.j >= self.grid.i, pairs + entered)
        return after + sums(self.grid.j < self.grid.i, left) + through


def decay_of(kind: str, grid: Grid, mask: Masks, g: jax.Array | None, width: int) -> NoDecay | ScalarDecay | VectorDecay:
    """The decay of one chunk; `kind` is "none", "scalar" or "vector"."""
    if kind == "none":
        return NoDecay(mask, width)
    return (ScalarDecay if kind == "scalar" else VectorDecay)(grid, mask, g)


def inverse(grid: Grid, lower: jax.Array) -> jax.Array:
    """(I + L)^-1 of the strictly lower [C,C] L in float32: substitution on 16 x 16 blocks, all at once, then merges.

    Substitution by columns: once row j of a block is final, its multiples are taken from the rows below it. The merges are at
    full precision whatever the inputs are: with beta = 2 and equal keys two pieces leave errors of 5e-3 in the state.
    """
    size, product = lower.shape[0], Products(3).nn
    # [C,16]: column m holds the entries of column m of each row's own block.
    blocks = [lower[at : at + SIDE, at : at + SIDE] for at in range(0, size, SIDE)]
    columns = jnp.concatenate(blocks, axis=0)
    x = jnp.where(grid.i == grid.j, 1.0, 0.0)
    for j in range(SIDE - 1):
        row = x.reshape(size // SIDE, SIDE, size)[:, j : j + 1]
        row = jnp.broadcast_to(row, (size // SIDE, SIDE, size)).reshape(size, size)
        x -= columns[:, j : j + 1] * row
    level = 4
    while (1 << level) < size:
        corner = ((grid.i >> (level + 1)) == (grid.j >> (level + 1))) & ((grid.i >> level) != (grid.j >> level))
        x -= product(x, product(jnp.where(corner, lower, 0.0), x))
        level += 1
    return x
