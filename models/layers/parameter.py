"""Parameters that say what they are."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

ROLES = ("embedding", "head", "matrix", "vector", "scalar", "table")
AXES = ("layer", "vocab", "embed", "heads", "kv_heads", "mlp", "head_size")


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], initializer: Callable[..., jax.Array], *, role: str, axes: tuple[str, ...]
) -> nnx.Param:
    """A float32 parameter with a role and one named axis a dimension.

    Args:
      rngs: its `params` stream is read once, whatever the initialiser does with the key.
      shape: of one layer; stacking adds a leading `layer` axis to the value and to `axes`.
      initializer: `(key, shape, dtype) -> array`.
      role: one of `ROLES`. A `matrix` maps its second to last axis (in) to its last (out).
      axes: names from `AXES`, as many as dimensions.

    Raises:
      ValueError: an unknown role or axis, or a wrong number of axes.
    """
    if role not in ROLES or not set(axes) <= set(AXES) or len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {shape} cannot have role {role!r} and axes {axes}")
    return nnx.Param(initializer(rngs.params(), shape, jnp.float32), role=role, axes=axes)
