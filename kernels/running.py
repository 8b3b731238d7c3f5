"""Running logsumexp that starts anew with every sequence: the weight of LightNet's average."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels.sequences import boundaries, owners


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
    batch, length, heads, size = keys.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if weight is None:
        weight = jnp.full((rows, heads, size), -jnp.inf, keys.dtype)
    weight = weight.astype(keys.dtype)
    if cu_seqlens is None:
        first = (jnp.arange(length) == 0)[None, :, None, None]
        reset = first if segment_ids is None else first | boundaries(segment_ids)[:, :, None, None]
        entering = jnp.where(first, weight[:, None], -jnp.inf)
    else:
        sequence, starts = owners(cu_seqlens, length)
        reset = starts[None, :, None, None]
        entering = weight[sequence][None]
    reset = jnp.broadcast_to(reset, (batch, length, 1, 1))
    begun = jnp.where(reset, _added(entering, keys), keys)

    def join(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.where(right[1], right[0], _added(left[0], right[0])), left[1] | right[1]

    after, _ = lax.associative_scan(join, (begun, reset), axis=1)
    before = jnp.where(reset, entering, jnp.pad(after, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1])
    if cu_seqlens is None:
        return before, after, after[:, -1]
    empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None, None]
    return before, after, jnp.where(empty, weight, after[0, jnp.maximum(cu_seqlens[1:] - 1, 0)])


def _added(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(e^a + e^b), with derivatives of zero where both are -inf."""
    none = (a == -jnp.inf) & (b == -jnp.inf)
    return jnp.where(none, -jnp.inf, jnp.logaddexp(jnp.where(none, 0.0, a), jnp.where(none, 0.0, b)))
