"""The passage of states through the chunks, forward, and of their cotangents, backward: chunks in order, one [K,64] slice a
block.

With read, kept, entered = q, k, k (times the factors of a decay by channel) and the factors of a row, the entering state E
gives

    W = T (beta (v - entry (entered E)))  or v        F = through E + kept^T (exit W)

and the cotangent dF of the leaving state, with do that of the output,

    dW = A^T do + exit (kept dF)        dE = through dF + read^T (scale entry do) - entered^T (entry beta T^T dW)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.decays import Rows
from kernels.mosaic_gpu.layout import Form, Size, columns, launch, tokens
from kernels.mosaic_gpu.limits import TILE
from kernels.mosaic_gpu.tiles import (
    Operand,
    Pool,
    arrived,
    by_row,
    copy,
    done,
    dot,
    fetched,
    keep,
    keep_both,
    loop,
    nn,
    put,
    read,
    tn,
)


class _Chunks:
    """The tiles of one chunk, twice where shared memory allows: the next one's are copied while one's are used.

    keys: names of inputs with K columns; values: with the block's 64 columns of V; squares: 64 x 64. `row` of the batch has
    the block's sequence, which takes `length` chunks of it from `begin` on.
    """

    def __init__(
        self, form: Form, refs: SimpleNamespace, keys: tuple[str, ...], values: tuple[str, ...], squares: tuple[str, ...]
    ):
        self.form, self.refs, self.values, self.squares = form, refs, values, squares
        self.count = refs.kept.shape[-1] // TILE
        if form.packed:
            self.row, self.begin = 0, refs.bounds[refs.s]
            self.length = refs.bounds[refs.s + 1] - self.begin
        else:
            self.row, self.begin, self.length = refs.s, 0, refs.rows.shape[1]
        # Of equal operands, as are kept and entered without a decay by channel, one is there.
        self.keys = tuple(name for name in keys if hasattr(refs, name))
        self.starts, self.stride = {}, 0
        for name in (*self.keys, *values, *squares):
            self.starts[name] = self.stride
            self.stride += self.pieces(name) * (self.count if name in self.keys else 1)

    def pool(self) -> Pool:
        """What is left of the tiles."""
        pool = Pool(self.form, self.refs.pool)
        pool.next = slots(self.form) * self.stride
        return pool

    def pieces(self, name: str) -> int:
        """Of an input's tiles."""
        return self.form.made if name in self.squares else self.form.pieces

    def at(self, name: str, slot: Any) -> Operand:
        """A tile of one slot."""
        return Operand(self.refs.pool, self.starts[name] + slot * self.stride, self.pieces(name))

    def across(self, name: str, slot: Any) -> list[Operand]:
        """The tiles of one slot across K."""
        start = self.starts[name] + slot * self.stride
        return [Operand(self.refs.pool, start + tile * self.form.pieces, self.form.pieces) for tile in range(self.count)]

    def issue(self, n: Any, slot: Any) -> None:
        """Begin the copies of chunk n."""
        form, refs = self.form, self.refs
        barrier = refs.barriers[0].at[slot]
        chunk, own = (self.row, n, refs.h), (self.row, tokens(n), refs.h)
        shared = own if form.decay == "vector" else (self.row, tokens(n), lax.div(refs.h, jnp.int32(form.group)))
        plgpu.copy_gmem_to_smem(refs.rows.at[chunk], refs.rows_smem.at[slot], barrier)
        if form.decay == "vector":
            for tile in range(self.count):
                vector = refs.vectors.at[slot * self.count + tile]
                plgpu.copy_gmem_to_smem(refs.through.at[(*chunk, columns(tile))], vector, barrier)
        for name in self.keys:
            for tile, operand in enumerate(self.across(name, slot)):
                copy(form, getattr(refs, name), shared, tile, operand, barrier)
        for name in self.values:
            copy(form, getattr(refs, name), own, refs.v_tile, self.at(name, slot), barrier)
        for name in self.squares:
            copy(form, getattr(refs, name), (*chunk, slice(None)), 0, self.at(name, slot), barrier)

    def arrived(self, slot: Any) -> Rows:
        """Wait for the copies of a slot."""
        arrived(self.form, self.refs.barriers[0].at[slot])
        return Rows(self.form, self.refs.rows_smem.at[slot])

    def through(self, rows: Rows, slot: Any, tile: int) -> jax.Array:
        """The factor of a tile of the state."""
        factor = rows.factor("through")
        if self.form.decay == "vector":
            factor = factor * by_row(self.refs.vectors.at[slot * self.count + tile])
        return factor


def slots(form: Form) -> int:
    """float32 takes three times the shared memory, and its tiles come through registers; a delta rule with a decay by channel
    fills it with one chunk.
    """
    return 1 if form.exact or (form.delta and form.decay == "vector") else 2


def _launch(
    form: Form,
    size: Size,
    name: str,
    body: Any,
    inputs: dict,
    outputs: dict,
    *,
    sequences: int,
    keys: int,
    values: int,
    squares: int,
    working: int,
) -> dict[str, jax.Array]:
    """`sequences`: rows of the states; `keys`, `values`, `squares`: inputs of each kind; `working`: operands beside them."""
    vector = form.decay == "vector"
    tiles = form.pieces * (keys * size.key_tiles + values) + form.made * squares
    copies = 1 + vector * size.key_tiles + (0 if form.exact else tiles)
    return launch(
        form,
        name,
        body,
        grid={"v_tile": size.value_tiles, "h": size.heads, "s": sequences},
        inputs=inputs,
        outputs=outputs,
        pool=slots(form) * tiles + form.made * working,
        slots=slots(form),
        copies=(copies,),
        row_slots=slots(form),
        vectors=slots(form) * size.key_tiles if vector else 0,
    )


def _forward(form: Form, refs: SimpleNamespace) -> None:
    chunks = _Chunks(form, refs, ("kept", "entered"), ("v",), ("solved",) if form.delta else ())
    pool, row = chunks.pool(), chunks.row
    entering, written = pool.many(chunks.count, form.made), pool.take(form.made)
    block = columns(refs.v_tile)

    def issue(step: Any, slot: Any) -> None:
        chunks.issue(chunks.begin + step, slot)

    def chunk(step: Any, slot: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        n = chunks.begin + step
        rows = chunks.arrived(slot)
        for tile, x in enumerate(state):
            keep_both(form, refs.states, (row, n, refs.h, columns(tile)), refs.v_tile, entering[tile], x)
        w = read(chunks.at("v", slot))
        if form.delta:
            entered = chunks.across("entered" if "entered" in chunks.keys else "kept", slot)
            w = rows.factor("beta") * (w - rows.factor("entry") * dot(*map(nn, entered, entering)))
            put(written, w)
            plgpu.commit_smem()
            w = dot(nn(chunks.at("solved", slot), written))
            keep(form, refs.written, (row, tokens(n), refs.h), refs.v_tile, written, w)
            done()
        put(written, w * rows.factor("exit"))
        plgpu.commit_smem()
        kept = chunks.across("kept", slot)
        return tuple(x * chunks.through(rows, slot, c) + dot(tn(kept[c], written)) for c, x in enumerate(state))

    initial = tuple(fetched(refs.initial.at[(refs.s, refs.h, columns(c), block)]) for c in range(chunks.count))
    for tile, x in enumerate(loop(chunks.length, slots(form), issue, chunk, initial)):
        refs.final[refs.s, refs.h, columns(tile), block] = x
    done()


def forward(form: Form, size: Size, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """From kept [B,T,H or HV,K], v [B,T,HV,V], rows, initial [B,HV,K,V] float32, for delta rules solved; for a decay by channel
    through [B,N,HV,K] and for both entered. Of packed sequences the states are [sequences,HV,K,V], and bounds int32
    [sequences + 1] has the first chunk of each, and where the last one ends.

    Returns:
      states [B,N,HV,K,V], what enters every chunk, and for delta rules written [B,T,HV,V], as `Form.kept`; final, float32.
    """
    names = ["kept", "v", "rows", "initial"] + ["solved"] * form.delta + ["bounds"] * form.packed
    if form.decay == "vector":
        names += ["through"] + ["entered"] * form.delta
    keys, values = size.key_tiles * TILE, size.value_tiles * TILE
    outputs = {
        "states": form.kept(size.batch, size.chunks, size.heads, keys, values),
        "final": jax.ShapeDtypeStruct(arrays["initial"].shape, jnp.float32),
    }
    if form.delta:
        outputs["written"] = form.kept(*arrays["v"].shape)
    inputs = {name: arrays[name] for name in names}
    return _launch(
        form,
        size,
        "states",
        _forward,
        inputs,
        outputs,
        sequences=arrays["initial"].shape[0],
        keys=1 + ("entered" in names),
        values=1,
        squares=int(form.delta),
        working=size.key_tiles + 1,
    )


def _backward(form: Form, refs: SimpleNamespace) -> None:
    squares = ("scores", "solved") if form.delta else ("scores",)
    chunks = _Chunks(form, refs, ("read", "kept", "entered"), ("do",), squares)
    pool, row = chunks.pool(), chunks.row
    leaving, pulled = pool.many(chunks.count, form.made), pool.take(form.made)
    weighed = pool.take(form.made) if form.made > form.pieces else None
    block = columns(refs.v_tile)

    def chunk(step: Any, slot: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        n = chunks.begin + (chunks.length - 1 - step)
        rows = chunks.arrived(slot)
        for tile, x in enumerate(state):
            keep_both(form, refs.dstates, (row, n, refs.h, columns(tile)), refs.v_tile, leaving[tile], x)
        do = chunks.at("do", slot)
        w = dot(tn(chunks.at("scores", slot), do))
        w = w + rows.factor("exit") * dot(*map(nn, chunks.across("kept", slot), leaving))
        if form.delta:
            put(pulled, w)
            plgpu.commit_smem()
            w = dot(tn(chunks.at("solved", slot), pulled))
        keep(form, refs.dwritten, (row, tokens(n), refs.h), refs.v_tile, pulled, w)
        done()
        reading = weighed or do
        put(reading, read(do) * (rows.factor("entry") * form.scale))
        terms = [[tn(x, reading)] for x in chunks.across("read", slot)]
        if form.delta:
            put(pulled, w * (rows.factor("entry") * (0.0 - rows.factor("beta"))))
            entered = chunks.across("entered" if "entered" in chunks.keys else "kept", slot)
            terms = [[*term, tn(x, pulled)] for term, x in zip(terms, entered, strict=True)]
        plgpu.commit_smem()
        return tuple(x * chunks.through(rows, slot, c) + dot(*terms[c]) for c, x in enumerate(state))

    def issue(step: Any, slot: Any) -> None:
        chunks.issue(chunks.begin + (chunks.length - 1 - step), slot)

    last = tuple(fetched(refs.dfinal.at[(refs.s, refs.h, columns(c), block)]) for c in range(chunks.count))
    for tile, x in enumerate(loop(chunks.length, slots(form), issue, chunk, last)):
        refs.dinitial[refs.s, refs.h, columns(tile), block] = x
    done()


def backward(form: Form, size: Size, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """From read, kept [B,T,H or HV,K], do [B,T,HV,V], rows, scores, dfinal [B,HV,K,V] float32, for delta rules solved; for a
    decay by channel through, and for both entered. Packed sequences are as in `forward`.

    Returns:
      dstates [B,N,HV,K,V], the cotangent of what leaves every chunk, and dwritten [B,T,HV,V], as `Form.kept`: the
      cotangent of v, for delta rules that of beta (v - entry (entered E)). dinitial [B,HV,K,V] float32.
    """
    names = ["read", "kept", "do", "rows", "scores", "dfinal"] + ["solved"] * form.delta + ["bounds"] * form.packed
    if form.decay == "vector":
        names += ["through"] + ["entered"] * form.delta
    keys, values = size.key_tiles * TILE, size.value_tiles * TILE
    outputs = {
        "dstates": form.kept(size.batch, size.chunks, size.heads, keys, values),
        "dwritten": form.kept(*arrays["do"].shape),
        "dinitial": jax.ShapeDtypeStruct(arrays["dfinal"].shape, jnp.float32),
    }
    inputs = {name: arrays[name] for name in names}
    return _launch(
        form,
        size,
        "dstates",
        _backward,
        inputs,
        outputs,
        sequences=arrays["dfinal"].shape[0],
        keys=2 + ("entered" in names),
        values=1,
        squares=1 + form.delta,
        working=size.key_tiles + 1 + (form.made > form.pieces),
    )
