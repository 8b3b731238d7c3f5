"""Linear maps inside a block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from models.layers.parameter import parameter


class Dense(nnx.Module):
    """`x @ kernel`; `kernel` is float32 [in, out] and used in the type of `x`."""

    def __init__(
        self, option: options.Dense, features_in: int, features_out: int, *, axes: tuple[str, str], std: float, rngs: nnx.Rngs
    ):
        """Draw the kernel from a normal of standard deviation `std`; 0 gives zeros."""
        del option
        initializer = nnx.initializers.normal(std) if std else nnx.initializers.zeros
        self.kernel = parameter(rngs, (features_in, features_out), initializer, role="matrix", axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        return product(x, self.kernel[...].astype(x.dtype))


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` over flattened leading axes.

    The gradient of the kernel is then one plain product of two matrices. With several leading axes XLA's CPU backend
    runs it as a contraction over all of them, a third slower for the whole training step (`benchmarks/step_speed.py`).
    """
    flat = jnp.dot(x.reshape(-1, x.shape[-1]), kernel)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])
