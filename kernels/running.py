"""Running logsumexp that starts anew with every sequence: the weight of LightNet's average."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels.sequences import boundaries, owners

BLOCK = 16
"""Tokens, at least 2; the number changes the rounding of sums and nothing else."""

Pair = tuple[jax.Array, jax.Array]


def running_logsumexp(
    keys: jax.Array,
    weight: jax.Array | None,
    segment_ids: jax.Array | None,
    cu_seqlens: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """z_t = log(e^{weight} + sum_{s<=t} e^{keys_s}) within each sequence.

    Args:
      keys: [B,T,H,K]. weight: [B or N,H,K], the logarithm of what came before; -inf (nothing) unless given.
      segment_ids, cu_seqlens: as in `kernels.ops`.

    Returns:
      z before each token and after it, [B,T,H,K]; and after the last token, [B or N,H,K].
    """
    batch, length = keys.shape[:2]
    none = jnp.full((), -jnp.inf, keys.dtype)
    weight = None if weight is None else weight.astype(keys.dtype)
    if cu_seqlens is None:
        first = (jnp.arange(length) == 0)[None, :, None, None]
        starts = first if segment_ids is None else first | boundaries(segment_ids)[:, :, None, None]
        entering = none if weight is None else jnp.where(first, weight[:, None], none)
    else:
        sequence, begins = owners(cu_seqlens, length)
        starts = begins[None, :, None, None]
        entering = none if weight is None else weight[sequence][None]
    starts = jnp.broadcast_to(starts, (batch, length, 1, 1))
    after = _running(keys if weight is None else jnp.where(starts, _added(entering, keys), keys), starts)
    before = jnp.where(starts, entering, _shifted(after))
    if cu_seqlens is None:
        return before, after, after[:, -1]
    empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None, None]
    return before, after, jnp.where(empty, none if weight is None else weight, after[0, jnp.maximum(cu_seqlens[1:] - 1, 0)])


@jax.custom_jvp
def _running(values: jax.Array, starts: jax.Array) -> jax.Array:
    """Running logsumexp along T of values [B,T,H,K], begun anew where `starts` [B,T,1,1]."""

    def join(left: Pair, right: Pair) -> Pair:
        return jnp.where(right[1], right[0], jnp.logaddexp(left[0], right[0])), left[1] | right[1]

    return _prefixes(join, (values, starts), (-jnp.inf, False))[0]


@_running.defjvp
def _running_tangent(primals: Pair, tangents: Pair) -> Pair:
    """A sum's tangent is a running one too: dz_t = e^{z_{t-1} - z_t} dz_{t-1} + e^{x_t - z_t} dx_t, shares that add up to 1."""
    values, starts = primals
    found = _running(values, starts)
    base = jnp.where(found == -jnp.inf, 0, found)
    kept = jnp.where(starts, 0, jnp.exp(_shifted(found) - base))

    def join(left: Pair, right: Pair) -> Pair:
        return left[0] * right[0], left[1] * right[0] + right[1]

    return found, _prefixes(join, (kept, jnp.exp(values - base) * tangents[0]), (1, 0))[1]


def _shifted(sums: jax.Array) -> jax.Array:
    """[B,T,H,K], one token later; -inf before the first."""
    return jnp.pad(sums, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=-jnp.inf)[:, :-1]


def _added(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(e^a + e^b), with derivatives of zero where both are -inf."""
    none = (a == -jnp.inf) & (b == -jnp.inf)
    return jnp.where(none, -jnp.inf, jnp.logaddexp(jnp.where(none, 0.0, a), jnp.where(none, 0.0, b)))


def _prefixes(join: Callable[[Pair, Pair], Pair], elements: Pair, nothing: tuple[float, float]) -> Pair:
    """What `jax.lax.associative_scan` gives along axis 1 of elements [B,T,...], moving them less.

    Token after token in all blocks of `BLOCK` tokens at once, then over the blocks in the same way. The other moves all
    elements at each of its levels, and XLA:CPU of jax 0.11.2 crashes in compiling its transpose for a recurrence inside
    `jax.shard_map`.

    Args:
      join: associative. nothing: its neutral element.
    """
    batch, length = elements[0].shape[:2]
    if length == 1:
        return elements
    size = min(BLOCK, length)
    count = -(-length // size)

    def blocks(x: jax.Array) -> jax.Array:
        """[B,T,...] -> [size,B,count,...]"""
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 2, 0)

    def token(left: Pair, right: Pair) -> tuple[Pair, Pair]:
        joined = join(left, right)
        return joined, joined

    by_token = tuple(blocks(x) for x in elements)
    first = tuple(x[0] for x in by_token)
    whole, later = lax.scan(token, first, tuple(x[1:] for x in by_token))
    within = tuple(jnp.concatenate([x[None], y]) for x, y in zip(first, later, strict=True))
    before = tuple(
        jnp.pad(x[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)), constant_values=value)[None]
        for x, value in zip(_prefixes(join, whole, nothing), nothing, strict=True)
    )
    found = (jnp.moveaxis(x, 0, 2) for x in join(before, within))
    return tuple(x.reshape(batch, count * size, *x.shape[3:])[:, :length] for x in found)
