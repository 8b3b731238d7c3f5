"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves convention."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_table(positions: jax.Array, head_size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `positions`.

    Args:
      positions: int32 [T].
      head_size: even; pair i is units i and i + head_size / 2, with frequency theta**(-2 i / head_size).
      theta: base of the frequencies.

    Returns:
      Two float32 arrays [1, T, 1, head_size / 2].
    """
    frequency = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angle = positions.astype(jnp.float32)[None, :, None, None] * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate [B, T, H, D] by a `rotary_table`, in float32; the type of `x` is kept."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
