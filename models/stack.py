"""Stacked blocks: one pytree for all layers of a kind, with the layer as leading axis of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from models.block import Block


def stacked(make: Callable[[nnx.Rngs], nnx.Module], keys: jax.Array) -> nnx.Module:
    """Modules of one kind as one module whose parameters carry a leading `layer` axis.

    Args:
      make: builds one module from its random streams.
      keys: typed PRNG keys [layers]; layer i is exactly `make(nnx.Rngs(keys[i]))`.
    """
    graphs = []

    def one(key: jax.Array) -> nnx.State:
        graph, state = nnx.split(make(nnx.Rngs(params=key)))
        graphs.append(graph)
        return state

    state = jax.vmap(one)(keys)
    module = nnx.merge(graphs[0], state)
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            variable.set_metadata("axes", ("layer", *variable.get_metadata()["axes"]))
    return module


class Segment(nnx.Module):
    """A pattern of blocks, repeated. Block j of the pattern stands for layers j, j + p, j + 2p, ... of the segment.

    Attributes:
      blocks: one stacked module a position in the pattern, each with `repeats` layers.
      repeats: how often the pattern is applied.
    """

    def __init__(self, pattern: Sequence[Callable[[nnx.Rngs], Block]], keys: jax.Array):
        """`keys` [repeats, len(pattern)] are typed PRNG keys, one a layer."""
        self.repeats = keys.shape[0]
        self.blocks = nnx.Dict({f"block{j}": stacked(make, keys[:, j]) for j, make in enumerate(pattern)})

    def prepare(self, length: int, segment_ids: jax.Array | None) -> dict[str, Any]:
        """What the layers of each pattern position share in a forward pass."""
        return {name: block.mixer.prepare(length, segment_ids) for name, block in self.blocks.items()}

    def prepare_step(self, new: int, capacity: int, index: jax.Array, start: jax.Array) -> dict[str, Any]:
        """What they share in a decoding step."""
        return {name: block.mixer.prepare_step(new, capacity, index, start) for name, block in self.blocks.items()}

    def init_cache(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """A cache a pattern position, stacked over repeats."""

        def repeat(leaf: jax.Array) -> jax.Array:
            return jax.numpy.broadcast_to(leaf[None], (self.repeats, *leaf.shape))

        return {name: jax.tree.map(repeat, block.mixer.init_cache(batch, length, dtype)) for name, block in self.blocks.items()}
