"""The gradients of q, k and the gates, from what the other kernels kept: chunks on their own, 64 channels of K a block.

The equations are those of `kernels.xla.additive` and `kernels.xla.delta`. With W, dW of `kernels.mosaic_gpu.states`, the state
E that enters a chunk and the cotangent dF of the one that leaves it, and D = tril(scale do W^T), R = -stril(dW W^T),

    dread = scale entry (do E^T)        dkept = exit (W dF^T)        dentered = -entry (dW E^T)     (the last for delta rules)

go to q, k, k; and D, R to both rows of a pair, by the decay between them. The diagonal of D does not depend on any gate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.across import Across, streams
from kernels.mosaic_gpu.decays import Level, Masks, Rows, levels, pairs, summed, times, where
from kernels.mosaic_gpu.layout import Form, Size, columns, launch, tokens
from kernels.mosaic_gpu.limits import TILE
from kernels.mosaic_gpu.tiles import (
    Operand,
    Parked,
    Pool,
    arrived,
    by_column,
    by_row,
    copy,
    done,
    dot,
    each_row,
    fetched,
    hidden,
    keep,
    nn,
    no_rows,
    now,
    nt,
    put,
    read,
    rounded,
    tn,
    zeros,
)


def sums(form: Form) -> tuple[str, ...]:
    """Numbers a row that leave the kernel as sums over the channels of a block; the caller adds the blocks."""
    return ("after", "left", "through") * (form.decay == "scalar") + ("beta",) * form.delta


class _ByRow(NamedTuple):
    """Pairs of rows under a decay by row, which their cotangents d and r carry, or none. Each method gives one sum over pairs;
    to what rows read it adds `reached`, what they read through the entering state.
    """

    pool: Pool
    q: Operand
    k: Operand
    d: Operand
    r: Operand | None
    beta: Callable[[], jax.Array] | None

    def to_q(self, reached: jax.Array) -> jax.Array:
        """What q gets."""
        return now(reached + dot(nn(self.d, self.k)))[0]

    def to_column(self) -> jax.Array:
        """What k gets as the row that is read."""
        terms = [tn(self.d, self.q)]
        if self.r is not None:
            weighed = self.pool.take(self.r.pieces)
            put(weighed, read(self.r) * self.beta())
            plgpu.commit_smem()
            terms.append(tn(weighed, self.k))
        return dot(*terms)

    def to_row(self, reached: jax.Array) -> jax.Array:
        """What k gets as the row that reads, without beta."""
        return now(reached + dot(nn(self.r, self.k)))[0]


class _ByChannel(NamedTuple):
    """The same under a decay by channel: products for every level of halves, a loop for each sum, or they would not fit the
    registers.

    q, k: functions that bring the rows to registers. cancelling: where operands are rounded to one piece, the begun sum of what
    gates get. A pair counts there with either sign and cancels wherever both of its rows are summed; so it must be of the
    rounded rows on both sides, or what is left of the pairs adds up over the chunk.
    """

    masks: Masks
    chosen: Operand
    gates: Operand
    parked: Operand | None  # for the sum: float32 leaves no registers for it
    working: list[Operand]  # two
    q: Callable[[], jax.Array]
    k: Callable[[], jax.Array]
    d: Operand
    r: Operand | None
    beta: Callable[[], jax.Array] | None
    cancelling: Parked | None

    def _sum(
        self,
        start: jax.Array,
        *products: tuple[Callable[[], jax.Array], Callable[[], jax.Array], Callable[..., Any]],
        own: Callable[[], jax.Array] | None = None,
    ) -> jax.Array:
        """`start`, and over levels and products of the part of the first that belongs to the level and the decayed second.

        own: with the sign that a pair has there, the rows whose products go to `cancelling`.
        """
        corners, weighted = self.working

        def halve(level: Level, found: jax.Array) -> jax.Array:
            weight = summed(self.chosen, level.stretches(self.masks), [self.gates])(0)
            for pairs_of, rows_of, term in products:
                put(corners, where(level.corner(self.masks), pairs_of()))
                put(weighted, rows_of() * weight)
                plgpu.commit_smem()
                pulled = dot(term(corners, weighted))
                if self.cancelling is not None:
                    self.cancelling.add(rounded(own() * weight) * pulled)
                new = weight * pulled
                if self.parked is None:
                    (found,) = now(found + new)
                else:
                    put(self.parked, read(self.parked) + now(new)[0])
            return found

        if self.parked is None:
            return levels(halve, start)
        put(self.parked, start)
        levels(halve, jnp.int32(0))
        return read(self.parked)

    def to_q(self, reached: jax.Array) -> jax.Array:
        """What q gets."""
        return self._sum(reached, (lambda: read(self.d), self.k, nn), own=self.q)

    def to_column(self) -> jax.Array:
        """What k gets as the row that is read."""
        products = [(lambda: read(self.d), self.q, tn)]
        if self.r is not None:
            products.append((lambda: read(self.r) * self.beta(), self.k, tn))
        return self._sum(zeros(), *products, own=lambda: 0.0 - self.k())

    def to_row(self, reached: jax.Array) -> jax.Array:
        """What k gets as the row that reads, without beta."""
        return self._sum(reached, (lambda: read(self.r), self.k, nn))


def _cotangents(form: Form, across: Across, rows: Rows, masks: Masks, d: Operand, r: Operand | None) -> jax.Array:
    """The cotangents of scores, below the diagonal, into operands; returns those on the diagonal, [64]. A decay by row is in
    them.
    """

    def step(found: list[jax.Array], written: list[Operand], *others: list[Operand]) -> list[jax.Array]:
        return [now(x + dot(*map(nt, other, written)))[0] for x, other in zip(found, others, strict=True)]

    names = ("do", "dwritten")[: 1 + form.delta]
    found = across.fold(("written", *names), step, [zeros() for _ in names])
    decay = None if form.decay == "vector" else pairs(rows, masks)
    scores = found[0] * form.scale
    put(d, times(where(masks.strict(), scores), decay))
    if form.delta:
        put(r, times(where(masks.strict(), 0.0 - found[1]), decay))
    plgpu.commit_smem()
    return jnp.sum(where(masks.i == masks.j, scores), axis=1)


def body(form: Form, refs: SimpleNamespace) -> None:
    """64 channels of one chunk of one head."""
    pool, barrier = Pool(form, refs.pool), refs.barriers[0].at[0]
    vector = form.decay == "vector"
    cancel = vector and form.made == 1
    own = (refs.b, tokens(refs.n), refs.h)
    shared = (refs.b, tokens(refs.n), lax.div(refs.h, jnp.int32(form.group)))
    plgpu.copy_gmem_to_smem(refs.rows.at[(refs.b, refs.n, refs.h)], refs.rows_smem.at[0], barrier)
    # Where q and k are no operands of a product and take much room, they are brought from device memory when they are needed.
    q = k = None
    if not (form.exact and vector):
        q, k = pool.many(2)
        copy(form, refs.q, shared, refs.k_tile, q, barrier)
        copy(form, refs.k, shared, refs.k_tile, k, barrier)
    arrived(form, barrier)

    def q_rows() -> jax.Array:
        return fetched(refs.q.at[(hidden(refs.b), *shared[1:], columns(refs.k_tile))]) if q is None else read(q)

    def k_rows() -> jax.Array:
        return fetched(refs.k.at[(hidden(refs.b), *shared[1:], columns(refs.k_tile))]) if k is None else read(k)

    d, r = pool.take(form.made), pool.take(form.made) if form.delta else None
    staging = None if form.exact else pool.take()
    rows = Rows(form, refs.rows_smem.at[0])
    masks = Masks.in_shared_memory(rows, refs.numbers)
    across = Across(form, refs, pool)
    refs.diagonal[...] = _cotangents(form, across, rows, masks, d, r)
    beta = functools.partial(rows.factor, "beta") if form.delta else None
    dk = Parked(pool.take(form.fine))
    if vector:
        after = Parked(pool.take(form.fine))
    else:
        after = _RowSums(refs.vectors.at[0]) if form.decay == "scalar" else None
    held = pool.next
    chosen = gates = None
    if vector:
        gates, chosen = pool.take(form.fine), pool.take(1)
        put(gates, fetched(refs.g.at[(*own, columns(refs.k_tile))]))
    here = pool.next
    if vector:
        parked = pool.take() if form.exact else None
        working = pool.many(2, form.made)
        pairs_sums = _ByChannel(masks, chosen, gates, parked, working, q_rows, k_rows, d, r, beta, after if cancel else None)
    else:
        pairs_sums = _ByRow(pool, q, k, d, r, beta)

    def reached(a: str, scale: float) -> jax.Array:
        """What rows get through the entering state."""
        (x,) = now(across.product(a, "states") * (rows.factor("entry") * scale))
        return now(x * summed(chosen, masks.j <= masks.i, [gates])(0))[0] if vector else x

    def to_gates(x: jax.Array) -> None:
        """What the gates after a row get, if there are any."""
        if after is not None:
            after.add(x)

    # One sum after the other, each at once: what is alive together must fit the registers.
    pool.back(here)
    x = reached("do", form.scale)
    if cancel:  # begins the sum that pairs are added to
        to_gates(q_rows() * x)
    x = pairs_sums.to_q(x)
    if not cancel:
        to_gates(q_rows() * x)
    keep(form, refs.dq, own, refs.k_tile, staging, x + by_row(refs.diagonal) * k_rows())
    x = pairs_sums.to_column()
    if not cancel:
        to_gates(k_rows() * (0.0 - x))
    dk.add(x + by_row(refs.diagonal) * q_rows())
    if form.delta:
        pool.back(here)
        x = pairs_sums.to_row(reached("dwritten", -1.0))
        refs.vectors[len(sums(form)) - 1] = jnp.sum(k_rows() * x, axis=1)
        (x,) = now(x * beta())
        to_gates(k_rows() * x)
        dk.add(x)
    pool.back(here)
    names = ("written", "dstates")
    if form.decay == "none":
        x, through = across.product(*names), None
    elif form.exact:
        through = across.inner("states", "dstates")
        x = across.product(*names)
    else:

        def both(
            carry: tuple[jax.Array, jax.Array], written: list[Operand], dstates: list[Operand], states: list[Operand]
        ) -> tuple[jax.Array, jax.Array]:
            x, through = carry
            for y, z in zip(dstates, states, strict=True):
                (through,) = now(through + jnp.sum(read(y) * read(z), axis=1))
            return now(x + dot(*map(nt, written, dstates)))[0], through

        x, through = across.fold((*names, "states"), both, (zeros(), no_rows()))
    (x,) = now(x * rows.factor("exit"))
    if vector:
        (x,) = now(x * summed(chosen, masks.j > masks.i, [gates])(0))
    keep(form, refs.dk, own, refs.k_tile, staging, dk.read() + x)
    (left,) = now(k_rows() * x)
    if vector:
        pool.back(held)
        refs.dg[(*own, columns(refs.k_tile))] = _gate(form, refs, pool, masks, after.operand, left, through, rows)
    elif form.decay == "scalar":
        refs.vectors[1], refs.vectors[2] = jnp.sum(left, axis=1), through
    if sums(form):
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.vectors, refs.sums.at[(refs.b, refs.n, refs.h, refs.k_tile)])
    done()


class _RowSums:
    """Adds tiles up over channels, into a vector [64] of shared memory."""

    def __init__(self, vector: Any):
        self.vector, self.begun = vector, False

    def add(self, x: jax.Array) -> None:
        x = jnp.sum(x, axis=1)
        if self.begun:
            (x,) = now(each_row(self.vector) + x)
            plgpu.commit_smem()  # what was read has been read
        self.vector[...] = x
        self.begun = True


def _gate(
    form: Form, refs: SimpleNamespace, pool: Pool, masks: Masks, after: Operand, left: jax.Array, through: jax.Array, rows: Rows
) -> jax.Array:
    """dg of a decay by channel: what comes at or after a row, what left before it, and what went through, [64] over
    channels.
    """
    following, before = pool.many(2, 1)
    leaving = pool.take(form.fine)
    put(following, where(masks.j >= masks.i, 1.0))
    put(before, where(masks.j < masks.i, 1.0))
    put(leaving, left)
    # Over channels the numbers lie as those of the state's rows do; as a tile's columns they are read back from memory.
    refs.channel[...] = through * each_row(refs.through.at[(refs.b, refs.n, refs.h, columns(refs.k_tile))])
    plgpu.commit_smem()
    passed = by_column(refs.channel) * rows.factor("through")
    return dot(nn(following, after), nn(before, leaving)) + passed


def call(form: Form, size: Size, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """From q, k [B,T,H,K], do, written and for delta rules dwritten [B,T,HV,V], states, dstates [B,N,HV,K,V], rows; for a
    decay by channel g [B,T,HV,K] and through [B,N,HV,K].

    Returns:
      dq, dk [B,T,HV,K] in the stored dtype; for a decay by channel dg [B,T,HV,K] float32; and `sums`, if there are any, float32
      [B,N,HV,K/64,.,64]. Of them `through` is without the factor through, and `beta` lacks dW times v.
    """
    vector = form.decay == "vector"
    names = ["q", "k", "do", "written", "states", "dstates", "rows"] + ["dwritten"] * form.delta + ["g", "through"] * vector
    keys = (size.batch, size.chunks * TILE, size.heads, size.key_tiles * TILE)
    outputs = {name: jax.ShapeDtypeStruct(keys, form.stored) for name in ("dq", "dk")}
    if vector:
        outputs["dg"] = jax.ShapeDtypeStruct(keys, jnp.float32)
    count = len(sums(form))
    if count:
        shape = (size.batch, size.chunks, size.heads, size.key_tiles, count, TILE)
        outputs["sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    together = form.made * (1 if form.made > 1 else size.value_tiles)
    held = form.made * (1 + form.delta) + form.fine * (1 + vector)
    held += 0 if form.exact and vector else 2 * form.pieces
    held += 0 if form.exact else form.pieces
    gates = (form.fine + 1) * vector
    working = (
        (2 + form.delta) * together - form.fine * (1 + vector),
        gates + (2 + (form.decay != "none" and not form.exact)) * together,
        gates + (2 + form.exact) * form.made,
    )
    return launch(
        form,
        "gradients",
        body,
        grid={"k_tile": size.key_tiles, "n": size.chunks, "h": size.heads, "b": size.batch},
        inputs={name: arrays[name] for name in names},
        outputs=outputs,
        pool=held + max(working),
        copies=(1 if form.exact else 3, *streams(form, size)),
        row_slots=1,
        vectors=count,
        numbers=True,
        diagonal=True,
        channel=vector,
    )
