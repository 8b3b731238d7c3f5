"""Running logsumexp that starts anew with every sequence: the weight of LightNet's average."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels.sequences import boundaries, owners

BLOCK = 16
"""Tokens, at least 2; the number changes the rounding of sums and nothing else."""

Elements = tuple[jax.Array, ...]


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

    def join(left: Elements, right: Elements) -> Elements:
        return jnp.where(right[1], right[0], jnp.logaddexp(left[0], right[0])), left[1] | right[1]

    return _prefixes(join, (values, starts), (-jnp.inf, True))[0]


@_running.defjvp
def _running_tangent(primals: Elements, tangents: Elements) -> tuple[jax.Array, jax.Array]:
    """Its tangent is a running sum too: dz_t = e^{z_s - z_t} dz_s + sum_{s<r<=t} e^{x_r - z_t} dx_r, shares of 1.

    What is kept over a stretch of tokens is one exponential: a product of one a token would gather all their roundings.
    """
    values, starts = primals
    found = _running(values, starts)

    def join(left: Elements, right: Elements) -> Elements:
        # At a start the difference may be large: it must not reach the exponential, whose own derivative would be infinite.
        kept = jnp.exp(jnp.where(right[1], -jnp.inf, left[0]) - _finite(right[0]))
        return right[0], left[1] | right[1], kept * left[2] + right[2]

    taken = jnp.exp(values - _finite(found)) * tangents[0]
    return found, _prefixes(join, (found, starts, taken), (-jnp.inf, True, 0))[2]


def _finite(sums: jax.Array) -> jax.Array:
    """Zero in place of -inf, to be subtracted."""
    return jnp.where(sums == -jnp.inf, 0, sums)


def _shifted(sums: jax.Array) -> jax.Array:
    """[B,T,H,K], one token later; -inf before the first."""
    return jnp.pad(sums, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=-jnp.inf)[:, :-1]


def _added(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(e^a + e^b), with derivatives of zero where both are -inf."""
    none = (a == -jnp.inf) & (b == -jnp.inf)
    return jnp.where(none, -jnp.inf, jnp.logaddexp(jnp.where(none, 0.0, a), jnp.where(none, 0.0, b)))


def _prefixes(join: Callable[[Elements, Elements], Elements], elements: Elements, nothing: tuple[float, ...]) -> Elements:
    """What `jax.lax.associative_scan` gives along axis 1 of elements [B,T,...], moving them less.

    Token after token in all blocks of `BLOCK` tokens at once, then over the blocks in the same way. The other moves all
    elements at each of its levels, and XLA:CPU of jax 0.11.2 crashes in compiling its transpose for a recurrence inside
    `jax.shard_map`.

    Args:
      join: associative. nothing: a sequence of its own that holds nothing, to stand before the first token and behind the last.
    """
    batch, length = elements[0].shape[:2]
    if length == 1:
        return elements
    size = min(BLOCK, length)
    count = -(-length // size)

    def blocks(x: jax.Array, value: float) -> jax.Array:
        """[B,T,...] -> [size,B,count,...]"""
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)), constant_values=value)
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 2, 0)

    def token(left: Elements, right: Elements) -> tuple[Elements, Elements]:
        joined = join(left, right)
        return joined, joined

    by_token = tuple(blocks(x, value) for x, value in zip(elements, nothing, strict=True))
    first = tuple(x[0] for x in by_token)
    whole, later = lax.scan(token, first, tuple(x[1:] for x in by_token))
    within = tuple(jnp.concatenate([x[None], y]) for x, y in zip(first, later, strict=True))
    before = tuple(
        jnp.pad(x[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)), constant_values=value)[None]
        for x, value in zip(_prefixes(join, whole, nothing), nothing, strict=True)
    )
    found = (jnp.moveaxis(x, 0, 2) for x in join(before, within))
    return tuple(x.reshape(batch, count * size, *x.shape[3:])[:, :length] for x in found)
