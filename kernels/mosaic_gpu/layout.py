"""What the kernels are given: static choices, arrays by name, and how a kernel is launched."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.limits import SHARED_MEMORY, TILE

SWIZZLED = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))
"""How a bfloat16 tile lies in shared memory: what the tensor cores read."""

AVAILABLE = SHARED_MEMORY - 4096
"""Bytes for tiles and vectors: the rest is for barriers and for sums across warps."""


class Form(NamedTuple):
    """Static choices of one call; hashable."""

    decay: str  # "none", "scalar" or "vector"
    delta: bool
    segmented: bool
    packed: bool  # one row of the batch holds several sequences, each in chunks of its own
    scale: float
    group: int  # value heads a query head serves
    exact: bool  # float32 operands, as three bfloat16 pieces each; else bfloat16
    interpret: Any

    @property
    def name(self) -> str:
        """Of the kernels, for the profiler."""
        return f"{self.decay}_decay_{'delta_rule' if self.delta else 'additive'}"

    @property
    def stored(self) -> Any:
        """dtype of what one kernel keeps for another."""
        return jnp.float32 if self.exact else jnp.bfloat16

    @property
    def made(self) -> int:
        """Pieces of what the kernels of delta rules make for each other: scores, inverses, states, what is written.

        A reflection (beta = 2) damps no rounding, and with equal keys it cancels what it wrote before: of one bfloat16 piece
        nothing would be left, whatever the inputs are.
        """
        return max(2, self.pieces) if self.delta else self.pieces

    def kept(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An array of what is `made`: in bfloat16 with the pieces of every tile side by side along the last axis."""
        beside = 1 if self.exact else self.made
        return jax.ShapeDtypeStruct((*shape[:-1], beside * shape[-1]), self.stored)

    def whole(self, x: jax.Array) -> jax.Array:
        """The sums of the pieces of such an array, float32."""
        if self.exact or self.made == 1:
            return x.astype(jnp.float32)
        pieces = x.reshape(*x.shape[:-1], -1, self.made, TILE)
        return jnp.sum(pieces, axis=-2, dtype=jnp.float32).reshape(*x.shape[:-1], -1)

    @property
    def pieces(self) -> int:
        """bfloat16 tiles an operand takes."""
        return 3 if self.exact else 1

    @property
    def fine(self) -> int:
        """Pieces where one bfloat16 is not enough even for bfloat16 inputs: sums of gates, and the triangular inverse."""
        return 3 if self.exact else 2

    @property
    def rows(self) -> tuple[str, ...]:
        """Numbers a row of a chunk has: names of the rows of `Arrays.rows`, in order.

        entry, exit: factors on reading the entering state and on writing to the leaving one; through: on the state itself. For
        a decay by channel these are the segments' masks alone. coarse, fine: the log decay summed up to a row, in two parts.
        run: number of the row's segment. beta.
        """
        optional = {"coarse": self.decay == "scalar", "fine": self.decay == "scalar"}
        optional |= {"run": self.segmented, "beta": self.delta}
        names = ("entry", "exit", "through", "coarse", "fine", "run", "beta")
        return tuple(name for name in names if optional.get(name, True))


class Size(NamedTuple):
    """Of the arrays of one call. N chunks; key_tiles, value_tiles: tiles across K and V."""

    batch: int
    heads: int  # value heads
    chunks: int
    key_tiles: int
    value_tiles: int

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array) -> Size:
        batch, length, heads, width = v.shape
        return cls(batch, heads, length // TILE, k.shape[-1] // TILE, width // TILE)


def tokens(chunk: Any) -> Any:
    """The rows of a chunk."""
    return pl.ds(chunk * TILE, TILE)


def columns(tile: Any) -> Any:
    """The columns of a tile."""
    return pl.ds(tile * TILE, TILE)


def occupied(form: Form, pool: int, row_slots: int, vectors: int) -> int:
    """Bytes of shared memory of so many tiles, numbers of rows, and vectors [64]."""
    return pool * TILE * TILE * 2 + (row_slots * len(form.rows) + vectors) * TILE * 4


def launch(
    form: Form,
    name: str,
    body: Callable[[Form, SimpleNamespace], None],
    *,
    grid: dict[str, int],
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    pool: int,
    slots: int = 1,
    copies: tuple[int, ...] = (1,),
    row_slots: int = 0,
    vectors: int = 0,
    numbers: bool = False,
    diagonal: bool = False,
    channel: bool = False,
    workers: int = 1,
) -> dict[str, jax.Array]:
    """Run `body(form, refs)` once for every point of `grid`, each on one warpgroup; with more `workers`, on each of them and on
    one more. `refs.warpgroup` tells them apart.

    `refs` has every input and output by name, in device memory, and in shared memory: pool [pool,64,64] bfloat16 tiles;
    barriers, for every number in `copies` [slots] that complete when so many copies have arrived; freed [slots], of several
    workers, that complete when each has arrived; rows_smem [row_slots,len(form.rows),64], vectors [vectors,64], diagonal [64]
    and channel [64], float32; numbers [64], int32.
    """
    scratch = {
        "pool": plgpu.SMEM((pool, TILE, TILE), jnp.bfloat16, transforms=SWIZZLED),
        "barriers": tuple(plgpu.Barrier(num_barriers=slots, num_arrivals=count) for count in copies),
        "freed": plgpu.Barrier(num_barriers=slots, num_arrivals=workers) if workers > 1 else None,
        "rows_smem": plgpu.SMEM((row_slots, len(form.rows), TILE), jnp.float32) if row_slots else None,
        "vectors": plgpu.SMEM((vectors, TILE), jnp.float32) if vectors else None,
        "numbers": plgpu.SMEM((TILE,), jnp.int32) if numbers else None,
        "diagonal": plgpu.SMEM((TILE,), jnp.float32) if diagonal else None,
        "channel": plgpu.SMEM((TILE,), jnp.float32) if channel else None,
    }
    scratch = {name: kind for name, kind in scratch.items() if kind is not None}
    used = occupied(form, pool, row_slots, vectors + numbers + diagonal + channel)
    if used > AVAILABLE:
        raise AssertionError(f"{form.name} {name}: {used} bytes of shared memory")
    names = (*inputs, *outputs)

    def entry(*refs: Any, **shared: Any) -> None:
        at = {name: lax.axis_index(name) for name in grid}
        at |= {"workers": workers, "warpgroup": lax.axis_index("warpgroup") if workers > 1 else 0}
        body(form, SimpleNamespace(**dict(zip(names, refs, strict=True)), **shared, **at))

    options = {"interpret": form.interpret} if form.interpret else {}
    if workers > 1:
        options |= {"num_threads": workers + 1, "thread_name": "warpgroup"}
    found = plgpu.kernel(
        entry,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            # Layouts are named where a value is made. The inference of the other semantics finds none for kernels of this size.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=not form.exact,
        ),
        kernel_name=f"{form.name}_{name}",
        **options,
    )(*inputs.values())
    return dict(zip(outputs, found, strict=True))
