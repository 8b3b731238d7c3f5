"""What the kernels are given: static choices, operands by name, and the blocks of each that a grid step sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Form(NamedTuple):
    """Static choices of one call; hashable."""

    decay: str  # "none", "scalar" or "vector"
    delta: bool
    segmented: bool
    scale: float
    chunk: int
    heads: int  # a grid step
    exact: bool  # float32 products throughout
    interpret: Any

    @property
    def pieces(self) -> int:
        """bfloat16 pieces of the operands of products; see `kernels.tpu.algebra.Products`.

        Two for delta rules even where the inputs are one: a reflection (beta = 2) damps no rounding, and with equal keys it
        cancels what it wrote before, so that of rounded operands nothing would be left.
        """
        return 3 if self.exact else 2 if self.delta else 1

    @property
    def stored(self) -> jnp.dtype:
        """Of what the forward pass keeps for the backward pass; two bfloat16 pieces would take as much as float32."""
        return jnp.dtype("bfloat16" if self.pieces == 1 else "float32")

    @property
    def name(self) -> str:
        """Of the kernels, for the profiler."""
        return f"{self.decay}_decay_{'delta_rule' if self.delta else 'additive'}"

    def names(self) -> tuple[str, ...]:
        """The operands that a kernel of this form reads. One that is not read must not be passed either (jax#39744)."""
        optional = {"g": self.decay != "none", "beta": self.delta, "runs": self.segmented}
        return tuple(name for name in Operands._fields if optional.get(name, True))

    def cost(self, operands: Operands, *, backward: bool) -> pl.CostEstimate:
        """Floating-point operations, exponentials and bytes of one call, for XLA's scheduler."""
        batch, heads, length, keys = operands.k.shape
        values, chunk = operands.v.shape[-1], self.chunk
        token = 2 * (chunk * (keys + values) + 2 * keys * values)
        if self.delta:
            token += 2 * (chunk * (keys + values) + keys * values + 2 * chunk * chunk)
        levels = chunk.bit_length() - 1
        if self.decay == "vector":
            token += 2 * levels * chunk * keys * (3 if self.delta else 2)
        exponentials = {"none": 0, "scalar": chunk, "vector": (levels + 2) * keys}[self.decay]
        count = batch * heads * length
        read = sum(x.size * x.dtype.itemsize for x in operands.present().values())
        factor = 3 if backward else 1
        return pl.CostEstimate(
            flops=factor * count * token, transcendentals=count * exponentials, bytes_accessed=2 * factor * read
        )


class Operands(NamedTuple):
    """q, k [B,HV,T,K]; v [B,HV,T,V]; g [B,HV,N,2,C] or [B,HV,T,K]; beta [B,HV,N,1,C]; runs [B,N,1,C]; initial [B,HV,V,K]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array | None
    beta: jax.Array | None
    runs: jax.Array | None
    initial: jax.Array

    def present(self) -> dict[str, jax.Array]:
        """By name, in the order of the fields."""
        return {name: x for name, x in self._asdict().items() if x is not None}


def specs(form: Form, key_size: int, value_size: int, order: Callable[[Any], Any] = lambda n: n) -> dict[str, pl.BlockSpec]:
    """The block of every array in grid step (batch b, heads h, n); `order` maps n to the number of a chunk."""
    chunk, heads = form.chunk, form.heads

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, heads, chunk, width), lambda b, h, n: (b, h, order(n), 0))

    def lanes(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, heads, 1, count, chunk), lambda b, h, n: (b, h, order(n), 0, 0))

    state = pl.BlockSpec((1, heads, value_size, key_size), lambda b, h, n: (b, h, 0, 0))
    return {
        "q": rows(key_size),
        "k": rows(key_size),
        "v": rows(value_size),
        "g": rows(key_size) if form.decay == "vector" else lanes(2),
        "dg": rows(key_size) if form.decay == "vector" else lanes(1),
        "beta": lanes(1),
        "runs": pl.BlockSpec((1, 1, 1, chunk), lambda b, h, n: (b, order(n), 0, 0)),
        "initial": state,
        "states": pl.BlockSpec((1, heads, 1, value_size, key_size), lambda b, h, n: (b, h, order(n), 0, 0)),
        "inverses": rows(chunk),
    }
