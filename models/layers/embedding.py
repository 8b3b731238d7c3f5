"""The table that turns tokens into vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models import sharding
from models.layers.parameter import parameter


class Embedding(nnx.Module):
    """Rows of a float32 table [vocab, width], drawn from a normal of standard deviation `std`."""

    def __init__(self, vocab_size: int, width: int, *, std: float, rngs: nnx.Rngs):
        initializer = nnx.initializers.normal(std)
        self.table = parameter(rngs, (vocab_size, width), initializer, role="embedding", axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32 [B, T] -> [B, T, width]."""
        # Gathered whole first, as FSDP does with every parameter: rows split over the devices of the batch would make the
        # compiler reshard the result of each lookup.
        table = sharding.constrain(self.table[...], (None, None))
        return jnp.take(table, tokens, axis=0).astype(dtype)
