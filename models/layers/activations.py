"""Activations, called on hidden units `[..., units]`; one with parameters of its own declares them as a norm does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class _Plain(nnx.Module):
    def __init__(self, option: Any, units: int, *, axis: str, rngs: nnx.Rngs):
        del option, units, axis, rngs


class SiLU(_Plain):
    """`x sigmoid(x)`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., units] -> [..., units]."""
        return jax.nn.silu(x)


class GELU(_Plain):
    """`x Phi(x)`, tanh form."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., units] -> [..., units]."""
        return jax.nn.gelu(x, approximate=True)


class SquaredReLU(_Plain):
    """`max(x, 0)**2`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., units] -> [..., units]."""
        positive = jnp.maximum(x, 0)
        return positive * positive
