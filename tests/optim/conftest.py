"""A small model whose parameters declare every role."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx


class Toy(nnx.Module):
    """An embedding, two stacked layers, a head: no forward pass, only declarations."""

    def __init__(self, key: jax.Array):
        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, sum(shape)), shape)

        self.embedding = nnx.Param(normal(11, 8), role="embedding", axes=("vocab", "embed"))
        self.positions = nnx.Param(normal(5, 8), role="table", axes=("position", "embed"))
        self.blocks = nnx.Dict(
            query=nnx.Param(normal(2, 8, 8), role="matrix", axes=("layer", "embed", "heads")),
            up=nnx.Param(normal(2, 8, 20), role="matrix", axes=("layer", "embed", "mlp")),
            down=nnx.Param(normal(2, 20, 8), role="matrix", axes=("layer", "mlp", "embed")),
            gain=nnx.Param(jnp.ones((2, 8)), role="vector", axes=("layer", "embed")),
            temperature=nnx.Param(jnp.ones((2,)), role="scalar", axes=("layer",)),
        )
        self.head = nnx.Param(normal(8, 11), role="head", axes=("embed", "vocab"))


@pytest.fixture
def model() -> Toy:
    return Toy(jax.random.key(0))


@pytest.fixture
def params(model: Toy) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.fixture
def gradients(params: dict):
    """`gradients(k)`: a reproducible gradient for update k."""

    def of(k: int) -> dict:
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(100 + k), len(leaves))
        return jax.tree.unflatten(structure, [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])

    return of
