"""The last layers of a stack, all evaluated at once: one batched call for each kind of block.

Layers of one kind are stored together in the order in which they are run, so that those of a suffix are one slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.block import Block
from models.placements.placement import Context
from models.stack import Forward, Kind, Stack, at_once, taken

Caches = dict[Kind, Any]


class Suffix:
    """Executed layers `first` to the end, in parallel."""

    def __init__(self, stack: Stack, first: int, forward: Forward):
        self.stack, self.first, self.forward = stack, first, forward
        self.places = stack.places[first:]
        self.members: dict[Kind, np.ndarray] = {}  # positions in the suffix of the layers of each kind
        for position, place in enumerate(self.places):
            self.members[place.kind] = np.append(self.members.get(place.kind, np.zeros(0, int)), position)
        self.order = np.argsort(np.concatenate(list(self.members.values())), kind="stable")

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.places)

    def map(self, call: Callable[..., Any], *inputs: jax.Array) -> Any:
        """`call(block, context, *inputs of the layer)` for every layer, results stacked in the order of the layers.

        Args:
          call: a function of one layer.
          *inputs: arrays [layers, ...].
        """
        found = []
        for kind, members in self.members.items():
            own = tuple(taken(x, members) for x in inputs)
            found.append(self._of(kind, call, members, *own))
        return self._joined(found)

    def map_cached(self, call: Callable[..., Any], caches: Caches, inputs: jax.Array) -> tuple[Any, Caches]:
        """`call(block, context, input, cache)` -> (result, new cache) for every layer.

        Returns:
          Results stacked in the order of the layers, and the new caches by kind.
        """
        found, new = [], {}
        for kind, members in self.members.items():
            slots = self.stack.slots(kind, [self.places[i] for i in members])
            own = jax.tree.map(lambda x, slots=slots: taken(x, slots), caches[kind])
            result, new[kind] = self._of(kind, call, members, taken(inputs, members), own)
            found.append(result)
        return self._joined(found), new

    def _joined(self, found: list[Any]) -> Any:
        if len(found) == 1:
            return found[0]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[self.order], *found)

    def write(self, caches: Caches, new: dict[Kind, Any]) -> Caches:
        """All caches, with those of the suffix replaced."""
        caches = dict(caches)
        for kind, members in self.members.items():
            slots = self.stack.slots(kind, [self.places[i] for i in members])
            caches[kind] = jax.tree.map(lambda old, part, at=slots: old.at[at].set(part), caches[kind], new[kind])
        return caches

    def one(self, position: int) -> tuple[Block, Context]:
        """One layer and its context."""
        place = self.places[position]
        state = jax.tree.map(lambda x: x[0], self.stack.gather(place.kind, [place]))
        return self.stack.block(place.kind, state), self.forward.context(place.kind, self.first + position)

    def cache(self, position: int, caches: Caches) -> Any:
        """The cache of one layer."""
        place = self.places[position]
        slot = int(self.stack.slots(place.kind, [place])[0])
        return jax.tree.map(lambda x: x[slot], caches[place.kind])

    def _of(self, kind: Kind, call: Callable[..., Any], members: np.ndarray, *inputs: Any) -> Any:
        """`call` for the layers of one kind, their inputs stacked."""
        numbers = jnp.asarray(self.first + members, jnp.int32)

        def layer(state: Any, number: jax.Array, *own: Any) -> Any:
            return call(self.stack.block(kind, state), self.forward.context(kind, number), *own)

        layer = self.forward.checkpointed(layer)
        return at_once(layer)(self.stack.gather(kind, [self.places[i] for i in members]), numbers, *inputs)
