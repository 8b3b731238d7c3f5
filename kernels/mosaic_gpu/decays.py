"""What a decay does inside a chunk, in a kernel: factors of pairs of rows, and of every row and channel.

The equations are those of `kernels.xla.decay`. Sums of gates over stretches of rows are products with a matrix of zeros and
ones: the terms of a sum have one sign, so nothing cancels, and every exponent is at most 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.layout import Form
from kernels.mosaic_gpu.limits import TILE
from kernels.mosaic_gpu.tiles import REGISTERS, Operand, by_column, by_row, dot, index, nn, put


class Rows(NamedTuple):
    """The numbers of a chunk's rows, in shared memory."""

    form: Form
    rows: Any  # [len(form.rows),64]

    def at(self, name: str) -> Any:
        """One of `Form.rows`, [64]."""
        return self.rows.at[self.form.rows.index(name)]

    def factor(self, name: str) -> jax.Array:
        """One of `Form.rows` as a factor of every row."""
        return by_row(self.at(name))


class Masks(NamedTuple):
    """Pairs of rows of a chunk.

    numbers: 0, 1, ... 63 in shared memory, where masks are to be made from; or None. Numbers that it can work out by itself the
    compiler keeps in registers from the first mask to the last, which is faster where there are registers for them.
    """

    rows: Rows
    numbers: Any = None

    @classmethod
    def in_shared_memory(cls, rows: Rows, numbers: Any) -> Masks:
        """Fills `numbers`, int32 [64] of shared memory."""
        numbers[...] = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=REGISTERS.reduce(1))
        plgpu.commit_smem()
        return cls(rows, numbers)

    @property
    def i(self) -> jax.Array:
        """Numbers of the rows of a tile, int32 [64,64]."""
        return index(0) if self.numbers is None else by_row(self.numbers)

    @property
    def j(self) -> jax.Array:
        """Numbers of its columns."""
        return index(1) if self.numbers is None else by_column(self.numbers)

    def _same(self, mask: jax.Array) -> jax.Array:
        """Those of one segment."""
        if not self.rows.form.segmented:
            return mask
        return mask & (by_row(self.rows.at("run")) == by_column(self.rows.at("run")))

    def causal(self) -> jax.Array:
        """j <= i of one segment."""
        return self._same(self.j <= self.i)

    def strict(self) -> jax.Array:
        """j < i of one segment."""
        return self._same(self.j < self.i)


def where(mask: jax.Array, x: jax.Array | float) -> jax.Array:
    """x where the mask holds, 0 elsewhere."""
    return jnp.where(mask, x, 0.0)


def pairs(rows: Rows, masks: Masks) -> jax.Array | None:
    """e^{G_i - G_j} for j <= i of a decay by row; None when nothing decays."""
    if rows.form.decay == "none":
        return None
    coarse, fine = ((by_row(rows.at(name)) - by_column(rows.at(name))) for name in ("coarse", "fine"))
    return jnp.exp(where(masks.j <= masks.i, coarse + fine))


def times(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    return x if factor is None else x * factor


def summed(chosen: Operand, mask: jax.Array, gates: list[Operand]) -> Callable[[int], jax.Array]:
    """e to the sums of the gates of those rows that each row of `mask` names; `chosen` is an operand of one piece for the mask.

    Returns a function that gives the tile of one of `gates`, operands that have been committed.
    """
    put(chosen, where(mask, 1.0))
    plgpu.commit_smem()
    return lambda tile: jnp.exp(dot(nn(chosen, gates[tile])))


class Level(NamedTuple):
    """One halving of blocks of 2 `half` rows: rows of the lower half see those of the upper half through the first row
    between.
    """

    half: jax.Array

    def corner(self, masks: Masks) -> jax.Array:
        """Pairs of a row of a lower half and a row of the upper half of the same block."""
        # As a comparison of one number of the row with one of the column: a loop over levels then keeps nothing for every pair.
        i, j, block = masks.i, masks.j, -2 * self.half
        lower = jnp.where((i & self.half) != 0, i & block, -1)
        upper = jnp.where((j & self.half) == 0, j & block, -2)
        return lower == upper

    def stretches(self, masks: Masks) -> jax.Array:
        """For every row the rows whose gates lie between it and the first row of its block's lower half."""
        i, j = masks.i, masks.j
        between = (i & (-2 * self.half)) + self.half
        return (j > jnp.minimum(i, between)) & (j <= jnp.maximum(i, between))


def levels(body: Callable[[Level, Any], Any], carry: Any, first: int = 1) -> Any:
    """`carry` through `body` for half = `first`, 2 `first`, ... 32."""

    def step(_: Any, carry: Any) -> Any:
        half, carry = carry
        return half * 2, body(Level(half), carry)

    count = (TILE // first).bit_length() - 1
    return lax.fori_loop(0, count, step, (jnp.int32(first), carry))[1]
