"""From tokens [B,T,H,...] to chunks [N,B,H,C,...] and back; where chunks stand in their sequences."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.sequences import boundaries
from kernels.xla.decay import Factors, Runs, lower
from kernels.xla.states import Packed


class Form(NamedTuple):
    """Static choices of one call; hashable.

    exact: products in full float32 even where the device would rather take fewer bits: all inputs but bfloat16, which has no
    more, and delta rules of any, whose reflections (beta = 2) damp no rounding.
    """

    exact: bool

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """The precision of every product traced inside."""
        return jax.default_matmul_precision("highest") if self.exact else contextlib.nullcontext()


class Layout(NamedTuple):
    """Segments of the rows (None: a row is one) and packed sequences (None: every row of the batch is one)."""

    runs: Runs | None
    packed: Packed | None
    count: jax.Array  # int [N], the numbers of the chunks: the length of every scan

    def causal(self, size: int, diagonal: int = 0) -> jax.Array:
        """bool [.,.,1,C,C]: pairs of rows j <= i (diagonal 0) or j < i (-1) of one segment."""
        mask = lower(size, diagonal)
        return mask if self.runs is None else mask & self.runs.same

    def through(self, factors: Factors | None) -> jax.Array | None:
        """The factor of the state by chunk, for a scan."""
        if factors is None:
            return None
        return jnp.broadcast_to(factors.through, (self.count.shape[0], *factors.through.shape[1:]))


def weighed(state: jax.Array, factor: jax.Array | None) -> jax.Array:
    """The state, decayed."""
    return state if factor is None else state * factor


def to_chunks(x: jax.Array, size: int, count: int) -> jax.Array:
    """[B,T,H,D] -> [count,B,H,size,D], zeros behind the last token."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    return x.reshape(batch, count, size, heads, width).transpose(1, 0, 3, 2, 4)


def from_chunks(x: jax.Array, length: int) -> jax.Array:
    """[N,B,H,C,D] -> [B,T,H,D]"""
    count, batch, heads, size, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, width)[:, :length]


def runs_of(segment_ids: jax.Array, size: int, count: int) -> Runs:
    """The runs of `count` chunks of `size` rows; rows behind the last token go on with its run."""
    run = jnp.cumsum(boundaries(segment_ids), axis=1, dtype=jnp.int32)
    batch, length = run.shape
    run = jnp.pad(run, ((0, 0), (0, count * size - length)), mode="edge")
    run = run.reshape(batch, count, size).transpose(1, 0, 2)[:, :, None, :]
    before = jnp.concatenate([jnp.zeros_like(run[:1, ..., -1:]), run[:-1, ..., -1:]])
    last = run[..., -1:]
    entered, left = (run == before)[..., None], (run == last)[..., None]
    return Runs(run[..., :, None] == run[..., None, :], entered, left, (before == last)[..., None])


def packed_chunks(cu_seqlens: jax.Array, length: int, size: int) -> tuple[Packed, jax.Array, jax.Array, jax.Array]:
    """Chunks for a packed row such that none holds tokens of two sequences.

    There are floor(T / C) + n chunks at most, whatever the lengths; those not needed hold no token.

    Returns:
      the chunks' places; for every row of every chunk its token [N C] and whether it has one [N C]; for every token
      its row [T].
    """
    cu_seqlens = cu_seqlens.astype(jnp.int32)
    sequences = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    needed = -(-lengths // size)
    end = jnp.cumsum(needed)
    begin = end - needed
    count = min(length // size + sequences, length)
    chunk = jnp.arange(count, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.searchsorted(end, chunk, side="right").astype(jnp.int32), sequences - 1)
    used = chunk < end[-1]
    packed = Packed(
        first=used & (chunk == begin[sequence]),
        last=used & (chunk == end[sequence] - 1),
        sequence=sequence,
        begin=jnp.minimum(begin, count - 1),
        end=jnp.maximum(end - 1, 0),
        empty=lengths == 0,
    )
    offset = ((chunk - begin[sequence]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    token = cu_seqlens[sequence][:, None] + offset
    valid = used[:, None] & (offset < lengths[sequence][:, None])
    tokens = jnp.arange(length, dtype=jnp.int32)
    owner = jnp.searchsorted(cu_seqlens, tokens, side="right").astype(jnp.int32) - 1
    row = begin[owner] * size + tokens - cu_seqlens[owner]
    return packed, jnp.clip(token, 0, length - 1).reshape(-1), valid.reshape(-1), row


def to_rows(x: jax.Array, token: jax.Array, valid: jax.Array) -> jax.Array:
    """[1,T,...] -> the rows of packed chunks [1,N C,...], zeros in those without a token; see `packed_chunks`."""
    return jnp.where(valid.reshape(1, -1, *(1,) * (x.ndim - 2)), x[:, token], 0)
