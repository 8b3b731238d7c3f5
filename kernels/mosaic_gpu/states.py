"""The passage of states through the chunks, forward, and of their cotangents, backward: chunks in order, one [K,64] slice a
warpgroup.

With read, kept, entered = q, k, k (times the factors of a decay by channel) and the factors of a row, the entering state E
gives

    W = T (beta (v - entry (entered E)))  or v        F = through E + kept^T (exit W)

and the cotangent dF of the leaving state, with do that of the output,

    dW = A^T do + exit (kept dF)        dE = through dF + read^T (scale entry do) - entered^T (entry beta T^T dW)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.decays import Rows
from kernels.mosaic_gpu.layout import AVAILABLE, Form, Size, columns, launch, occupied, tokens
from kernels.mosaic_gpu.limits import TILE, WORKERS
from kernels.mosaic_gpu.pipeline import alone, bring, compute, specialised
from kernels.mosaic_gpu.tiles import (
    Operand,
    Pool,
    arrived,
    by_row,
    copy,
    done,
    dot,
    fetched,
    hidden,
    keep,
    keep_both,
    nn,
    put,
    read,
    tn,
)


def _working(form: Form, key_tiles: int) -> int:
    """Tiles that a worker has to itself: for a state, and for what is written."""
    return form.made * (key_tiles + 1)


class _Chunks:
    """The tiles of one chunk, twice where shared memory allows: the next one's are copied while one's are used.

    keys: names of inputs with K columns; value: of the one with 64 columns of V, for each worker its own; squares: 64 x 64.
    `row` of the batch has the block's sequence; `v_tile` is this warpgroup's.
    """

    def __init__(self, form: Form, refs: SimpleNamespace, keys: tuple[str, ...], value: str, squares: tuple[str, ...]):
        self.form, self.refs, self.value, self.squares = form, refs, value, squares
        self.count, self.slots = refs.kept.shape[-1] // TILE, refs.rows_smem.shape[0]
        self.workers, self.worker = refs.workers, refs.warpgroup
        self.v_tile = refs.v_tile * self.workers + self.worker
        self.row = 0 if form.packed else refs.s
        # Of equal operands, as are kept and entered without a decay by channel, one is there.
        self.keys = tuple(name for name in keys if hasattr(refs, name))
        sizes = {name: form.pieces * self.count for name in self.keys} | {value: form.pieces * self.workers}
        sizes |= dict.fromkeys(squares, form.made)
        *starts, self.stride = itertools.accumulate(sizes.values(), initial=0)
        self.starts = dict(zip(sizes, starts, strict=True))
        begin, working = self.slots * self.stride, _working(form, self.count)
        self.pool = Pool(form, refs.pool, begin=begin, end=begin + working, shift=self.worker * working)

    def square(self, name: str, slot: Any) -> Operand:
        """A square of one slot."""
        return Operand(self.refs.pool, self.starts[name] + slot * self.stride, self.form.made)

    def values(self, slot: Any, worker: Any = None) -> Operand:
        """The columns of V of one slot, this warpgroup's or another's."""
        start = (self.worker if worker is None else worker) * self.form.pieces
        return Operand(self.refs.pool, self.starts[self.value] + slot * self.stride + start, self.form.pieces)

    def across(self, name: str, slot: Any) -> list[Operand]:
        """The tiles of one slot across K."""
        start = self.starts[name] + slot * self.stride
        return [Operand(self.refs.pool, start + tile * self.form.pieces, self.form.pieces) for tile in range(self.count)]

    def entered(self, slot: Any) -> list[Operand]:
        """The rows that read the entering state."""
        return self.across("entered" if "entered" in self.keys else "kept", slot)

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
        for worker in range(self.workers):
            v_tile = refs.v_tile * self.workers + worker
            copy(form, getattr(refs, self.value), own, v_tile, self.values(slot, worker), barrier)
        for name in self.squares:
            copy(form, getattr(refs, name), (*chunk, slice(None)), 0, self.square(name, slot), barrier)

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

    def span(self) -> tuple[Any, Any]:
        """The first chunk of the block's sequence, and how many it has."""
        if not self.form.packed:
            return 0, self.refs.rows.shape[1]
        s = hidden(self.refs.s)  # or what is read here would be kept from before the branches of a specialised block, and spill
        begin = self.refs.bounds[s]
        return begin, self.refs.bounds[s + 1] - begin

    def passage(self, chunk: Callable[..., Any], enters: Any, leaves: Any, *, reverse: bool) -> None:
        """The state through all chunks, from device memory to device memory, by `chunk(n, slot, state)`."""
        refs = self.refs
        places = [(refs.s, refs.h, columns(tile), columns(self.v_tile)) for tile in range(self.count)]

        def steps() -> tuple[Any, Callable[[Any], Any]]:
            """How many, and the chunk of each."""
            begin, length = self.span()
            return length, lambda step: begin + ((length - 1 - step) if reverse else step)

        def bringing() -> None:
            length, number = steps()
            bring(length, self.slots, lambda step, slot: self.issue(number(step), slot), refs.freed)

        def computing() -> None:
            length, number = steps()
            state = tuple(fetched(enters.at[place]) for place in places)

            def body(step: Any, slot: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                return chunk(number(step), slot, state)

            if self.workers > 1:
                state = compute(length, self.slots, body, refs.freed, state)
            else:
                state = alone(length, self.slots, lambda step, slot: self.issue(number(step), slot), body, state)
            for place, x in zip(places, state, strict=True):
                leaves[place] = x
            done()

        if self.workers > 1:
            specialised(self.worker, computing, bringing)
        else:
            computing()


class Arrangement(NamedTuple):
    """How a block computes."""

    workers: int
    slots: int
    tiles: int  # of shared memory
    copies: int  # a slot takes
    vectors: int  # [64], of a slot


def arrangement(form: Form, size: Size, keys: int, squares: int) -> Arrangement:
    """For so many inputs of each kind.

    bfloat16 tiles of V are computed in pairs, each on a warpgroup of its own, with one copy of the keys and squares; an odd
    number of them one by one. float32 tiles come through the registers of who computes, so a second slot would gain nothing.
    """
    workers = WORKERS if size.value_tiles % WORKERS == 0 and not form.exact else 1
    tiles = form.pieces * (keys * size.key_tiles + workers) + form.made * squares
    vectors = size.key_tiles if form.decay == "vector" else 0
    working = workers * _working(form, size.key_tiles)
    slots = 1 if form.exact or occupied(form, 2 * tiles + working, 2, 2 * vectors) > AVAILABLE else 2
    return Arrangement(workers, slots, slots * tiles + working, 1 + vectors + (0 if form.exact else tiles), vectors)


def _launch(
    form: Form, size: Size, name: str, body: Any, inputs: dict, outputs: dict, *, sequences: int, keys: int, squares: int
) -> dict[str, jax.Array]:
    """`sequences`: rows of the states; `keys`, `squares`: inputs of each kind."""
    block = arrangement(form, size, keys, squares)
    return launch(
        form,
        name,
        body,
        grid={"v_tile": size.value_tiles // block.workers, "h": size.heads, "s": sequences},
        inputs=inputs,
        outputs=outputs,
        pool=block.tiles,
        slots=block.slots,
        copies=(block.copies,),
        row_slots=block.slots,
        vectors=block.slots * block.vectors,
        workers=block.workers,
    )


def _forward(form: Form, refs: SimpleNamespace) -> None:
    squares = ("solved",) if form.delta else ()
    chunks = _Chunks(form, refs, ("kept", "entered"), "v", squares)
    row, v_tile = chunks.row, chunks.v_tile
    entering, written = chunks.pool.many(chunks.count, form.made), chunks.pool.take(form.made)

    def chunk(n: Any, slot: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows = chunks.arrived(slot)
        for tile, x in enumerate(state):
            keep_both(form, refs.states, (row, n, refs.h, columns(tile)), v_tile, entering[tile], x)
        w = read(chunks.values(slot))
        if form.delta:
            w = rows.factor("beta") * (w - rows.factor("entry") * dot(*map(nn, chunks.entered(slot), entering)))
            put(written, w)
            plgpu.commit_smem()
            w = dot(nn(chunks.square("solved", slot), written))
            keep(form, refs.written, (row, tokens(n), refs.h), v_tile, written, w)
            done()
        put(written, w * rows.factor("exit"))
        plgpu.commit_smem()
        kept = chunks.across("kept", slot)
        return tuple(x * chunks.through(rows, slot, c) + dot(tn(kept[c], written)) for c, x in enumerate(state))

    chunks.passage(chunk, refs.initial, refs.final, reverse=False)


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
        squares=int(form.delta),
    )


def _backward(form: Form, refs: SimpleNamespace) -> None:
    squares = ("scores", "solved") if form.delta else ("scores",)
    chunks = _Chunks(form, refs, ("read", "kept", "entered"), "do", squares)
    row, v_tile = chunks.row, chunks.v_tile
    leaving, pulled = chunks.pool.many(chunks.count, form.made), chunks.pool.take(form.made)

    def chunk(n: Any, slot: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows = chunks.arrived(slot)
        for tile, x in enumerate(state):
            keep_both(form, refs.dstates, (row, n, refs.h, columns(tile)), v_tile, leaving[tile], x)
        do = chunks.values(slot)
        w = dot(tn(chunks.square("scores", slot), do))
        w = w + rows.factor("exit") * dot(*map(nn, chunks.across("kept", slot), leaving))
        if form.delta:
            put(pulled, w)
            plgpu.commit_smem()
            w = dot(tn(chunks.square("solved", slot), pulled))
        keep(form, refs.dwritten, (row, tokens(n), refs.h), v_tile, pulled, w)
        done()
        reading = leaving[0]
        put(reading, read(do) * (rows.factor("entry") * form.scale))
        terms = [[tn(x, reading)] for x in chunks.across("read", slot)]
        if form.delta:
            put(pulled, w * (rows.factor("entry") * (0.0 - rows.factor("beta"))))
            terms = [[*term, tn(x, pulled)] for term, x in zip(terms, chunks.entered(slot), strict=True)]
        plgpu.commit_smem()
        return tuple(x * chunks.through(rows, slot, c) + dot(*terms[c]) for c, x in enumerate(state))

    chunks.passage(chunk, refs.dfinal, refs.dinitial, reverse=True)


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
        squares=1 + form.delta,
    )
