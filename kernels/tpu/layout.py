"""What the kernels are given: static choices, operands by name, the blocks of each that a grid step sees; their launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Form(NamedTuple):
    """Static choices of one call; hashable."""

    decay: str  # "none", "scalar" or "vector"
    delta: bool
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
    """sequence int32 [N], in scalar memory; q, k [B,HV,T,K]; v [B,HV,T,V]; g [B,HV,N,2,C] or [B,HV,T,K]; beta [B,HV,N,1,C];
    runs [B,N,1,C]; initial [B,HV,V,K], packed [sequences,HV,V,K].

    None is what a kernel of the form does not read, which must not be passed either (jax#39744).
    """

    sequence: jax.Array | None
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


def first_and_last(sequence: Any | None, chunk: Any, count: Any) -> tuple[Any, Any]:
    """Whether a chunk is the first, and the last, of its sequence; `sequence` [N] is the sequence of every chunk, in order."""
    first, last = chunk == 0, chunk == count - 1
    if sequence is None:
        return first, last
    own = sequence[chunk]
    return first | (sequence[jnp.maximum(chunk - 1, 0)] != own), last | (sequence[jnp.minimum(chunk + 1, count - 1)] != own)


def specs(form: Form, key_size: int, value_size: int, order: Callable[[Any], Any] = lambda n: n) -> dict[str, pl.BlockSpec]:
    """The block of every array in grid step (batch b, heads h, n); `order` maps n to the number of a chunk.

    Of packed sequences the index maps are given `sequence` as well.
    """
    chunk, heads = form.chunk, form.heads

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, heads, chunk, width), lambda b, h, n, *_: (b, h, order(n), 0))

    def lanes(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, heads, 1, count, chunk), lambda b, h, n, *_: (b, h, order(n), 0, 0))

    def of_sequence(b: Any, h: Any, n: Any, *sequence: Any) -> tuple[Any, ...]:
        return (sequence[0][order(n)] if sequence else b, h, 0, 0)

    state = pl.BlockSpec((1, heads, value_size, key_size), of_sequence)
    return {
        "q": rows(key_size),
        "k": rows(key_size),
        "v": rows(value_size),
        "g": rows(key_size) if form.decay == "vector" else lanes(2),
        "dg": rows(key_size) if form.decay == "vector" else lanes(1),
        "beta": lanes(1),
        "runs": pl.BlockSpec((1, 1, 1, chunk), lambda b, h, n, *_: (b, order(n), 0, 0)),
        "initial": state,
        "states": pl.BlockSpec((1, heads, 1, value_size, key_size), lambda b, h, n, *_: (b, h, order(n), 0, 0)),
        "inverses": rows(chunk),
    }


def launch(
    form: Form,
    way: str,
    body: Callable[..., None],
    *,
    grid: tuple[int, int, int],
    inputs: dict[str, jax.Array],
    blocks: dict[str, pl.BlockSpec],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    state: tuple[int, int],
    cost: pl.CostEstimate,
) -> dict[str, jax.Array]:
    """Run `body(given, found, state)` at every point of (batch, heads, chunks), the chunks in order.

    given, found: the refs of inputs and of outputs, by name. state: float32 [heads,*state] in VMEM, kept from chunk to chunk.
    """

    def entry(*refs: Any) -> None:
        given, found = refs[: len(inputs)], refs[len(inputs) : -1]
        body(dict(zip(inputs, given, strict=True)), dict(zip(outputs, found, strict=True)), refs[-1])

    found = pl.pallas_call(
        entry,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=int("sequence" in inputs),
            grid=grid,
            in_specs=[blocks[name] for name in inputs if name != "sequence"],
            out_specs=tuple(spec for _, spec in outputs.values()),
            scratch_shapes=[pltpu.VMEM((form.heads, *state), jnp.float32)],
        ),
        out_shape=tuple(shape for shape, _ in outputs.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost,
        interpret=form.interpret or False,
        name=f"{form.name}_{way}",
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))
