"""Stacked blocks: one pytree for all layers of a kind, with the layer as leading axis of every parameter.

Layers with equal options are of one kind, wherever they stand. In order, a stack is run as a short list of segments: a pattern
of layers and a number of repeats, scanned over the repeats. At once, it is one batched call a kind. Looped models run through
the same layers several times; only parameters that are declared `executed` differ between loops, and have a slice for each.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import options
from models.block import Block
from models.layers.parameter import is_executed
from models.placements.placement import Context

Kind = str
"""The name of the layers that are stacked together."""


class Pattern(NamedTuple):
    """`repeats` times the kinds of `period` layers, the first of them layer `start`."""

    start: int
    period: int
    repeats: int


def patterns(kinds: Sequence[Any]) -> list[Pattern]:
    """The split of a sequence of layer kinds into repeated patterns with the fewest blocks, then the fewest segments.

    Args:
      kinds: one hashable value a layer; equal ones can be stacked.
    """
    names = list(dict.fromkeys(kinds))
    return list(_patterns(tuple(names.index(kind) for kind in kinds)))


@functools.lru_cache(maxsize=64)
def _patterns(numbers: tuple[int, ...]) -> tuple[Pattern, ...]:
    count = len(numbers)
    best: list[tuple[int, int, tuple[Pattern, ...]]] = [(0, 0, ())] + [(count + 1, 0, ())] * count
    for start in range(count):
        blocks, parts, found = best[start]
        for period in range(1, count - start + 1):
            head, repeats = numbers[start : start + period], 0
            while numbers[start + repeats * period : start + (repeats + 1) * period] == head:
                repeats += 1
                end = start + repeats * period
                better = (blocks + period, parts + 1, (*found, Pattern(start, period, repeats)))
                if better[:2] < best[end][:2]:
                    best[end] = better
            if repeats > 1 and start + repeats * period == count:
                break  # a longer period can only cost more from here
    return best[count][2]


def stacked(make: Callable[[nnx.Rngs], nnx.Module], keys: jax.Array, loops: int = 1) -> nnx.Module:
    """Modules of one kind as one module whose parameters carry a leading `layer` axis.

    Args:
      make: builds one module from its random streams.
      keys: typed PRNG keys [loops * layers]; layer i of the first loop is exactly `make(nnx.Rngs(keys[i]))`.
      loops: parameters declared `executed` get a slice of their own in each loop, others one a layer.
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
            if loops > 1 and not variable.get_metadata().get("executed", False):
                variable.set_value(variable.get_value()[: keys.shape[0] // loops])
    return module


def order(plan: Sequence[Any]) -> list[Kind]:
    """The kind of every layer of a plan: equal options, one kind, numbered as they first appear."""
    names = {layer: f"block{i}" for i, layer in enumerate(dict.fromkeys(plan))}
    return [names[layer] for layer in plan]


def make_blocks(model: options.Model, keys: jax.Array) -> nnx.Dict:
    """The blocks of a model, one stacked module a kind, its layers in the order in which they are run.

    Args:
      model: options of the whole model.
      keys: typed PRNG keys [layers], one an executed layer.
    """
    plan, loops = model.plan(), model.depth.loops
    keys = keys.reshape(loops, len(plan))
    members: dict[Kind, list[int]] = {}
    for layer, kind in enumerate(order(plan)):
        members.setdefault(kind, []).append(layer)
    blocks = {}
    for kind, layers in members.items():
        blocks[kind] = stacked(
            lambda rngs, layer=layers[0]: Block(plan[layer], rngs=rngs), keys[:, np.array(layers)].reshape(-1), loops
        )
        _name_places(blocks[kind], layers, len(plan), loops)
    return nnx.Dict(blocks)


def _name_places(block: nnx.Module, layers: list[int], unique: int, loops: int) -> None:
    """Say of every parameter which executed layers its slices belong to; of one that loops share, where it is used first."""
    for _, variable in nnx.iter_graph(block):
        if isinstance(variable, nnx.Param):
            rounds = loops if variable.get_metadata().get("executed", False) else 1
            places = tuple(loop * unique + layer for loop in range(rounds) for layer in layers)
            variable.set_metadata("positions", places)


class Place(NamedTuple):
    """Where the parameters of one executed layer are."""

    kind: Kind
    index: int  # among the layers of its kind in a loop
    loop: int


class Span(NamedTuple):
    """Executed layers that one scan can run: a pattern, or part of one, over consecutive repeats of one loop."""

    kinds: tuple[Kind, ...]
    repeats: int
    layer: int  # number of its first executed layer


class Stack:
    """The executed layers of a model, in order, whatever loops and patterns they come from.

    Attributes:
      places: one `Place` an executed layer.
      mixers: the mixer of each kind, for what its layers share.
    """

    def __init__(self, blocks: Mapping[Kind, Any], kinds: Sequence[Kind], loops: int):
        """`kinds` are those of the unique layers, as `order` gives them."""
        self.loops = loops
        self._counts, self._length, self._patterns = Counter(kinds), len(kinds), patterns(kinds)
        self._parts = {kind: nnx.split(module, is_executed, ...) for kind, module in blocks.items()}
        self.mixers = {kind: module.mixer for kind, module in blocks.items()}
        indices = [kinds[:layer].count(kind) for layer, kind in enumerate(kinds)]
        self.places = [Place(kind, index, loop) for loop in range(loops) for kind, index in zip(kinds, indices, strict=True)]

    def __len__(self) -> int:
        """Number of executed layers."""
        return len(self.places)

    def count(self, kind: Kind) -> int:
        """Layers of a kind in one loop."""
        return self._counts[kind]

    def spans(self, first: int, stop: int) -> list[Span]:
        """Executed layers `first` to `stop` - 1 as as few scans as possible."""
        found = []
        for loop in range(self.loops):
            for start, period, repeats in self._patterns:
                layer = loop * self._length + start
                low, high = max(first, layer), min(stop, layer + period * repeats)
                while low < high:
                    offset = (low - layer) % period
                    whole = (high - low) // period if offset == 0 else 0
                    taken = period if whole else min(high - low, period - offset)
                    found.append(Span(tuple(place.kind for place in self.places[low : low + taken]), max(1, whole), low))
                    low += taken * max(1, whole)
        return found

    def rows(self, span: Span, repeat: int | None = None) -> dict[Kind, slice]:
        """Where the layers of a span, or of one repeat of it, are in arrays stacked over loops and layers, such as caches."""
        found = {}
        for kind, layers in Counter(span.kinds).items():
            first = self.places[span.layer + span.kinds.index(kind)]
            start = first.loop * self.count(kind) + first.index + layers * (repeat or 0)
            found[kind] = slice(start, start + layers * (span.repeats if repeat is None else 1))
        return found

    def states(self, span: Span, repeat: int | None = None) -> dict[Kind, Any]:
        """Parameters of the layers of a span, or of one repeat of it, stacked by kind."""
        found = {}
        for kind, rows in self.rows(span, repeat).items():
            _, own, shared = self._parts[kind]
            inside = self.places[span.layer].loop * self.count(kind)
            found[kind] = (
                jax.tree.map(lambda x, rows=rows: x[rows], own),
                jax.tree.map(lambda x, rows=rows, inside=inside: x[rows.start - inside : rows.stop - inside], shared),
            )
        return found

    def gather(self, kind: Kind, places: Sequence[Place]) -> Any:
        """Parameters of any executed layers of one kind, stacked."""
        _, own, shared = self._parts[kind]
        indices, executed = np.array([place.index for place in places]), self.slots(kind, places)
        return jax.tree.map(lambda x: taken(x, executed), own), jax.tree.map(lambda x: taken(x, indices), shared)

    def block(self, kind: Kind, state: Any) -> Block:
        """The block with one layer's parameters."""
        return nnx.merge(self._parts[kind][0], *state)

    def slots(self, kind: Kind, places: Sequence[Place]) -> np.ndarray:
        """Indices of executed layers of one kind in an array that is stacked over loops and layers, such as a cache."""
        return np.array([place.loop * self.count(kind) + place.index for place in places])


def by_repeat(span: Span, stacked: Mapping[Kind, Any]) -> dict[Kind, Any]:
    """What is stacked over the layers of a span, by kind, as [repeats, layers of the kind in a repeat, ...], to scan over."""
    return {kind: jax.tree.map(lambda x: x.reshape(span.repeats, -1, *x.shape[1:]), tree) for kind, tree in stacked.items()}


def by_layer(span: Span, stacked: Mapping[Kind, Any]) -> list[Any]:
    """What the layers of one repeat have, in their order, from what is stacked by kind."""
    rows = {}
    for kind, count in Counter(span.kinds).items():
        leaves, tree = jax.tree.flatten(stacked[kind])
        # Split rather than indexed: gradients are then joined, not padded and added.
        parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
        rows[kind] = iter([jax.tree.unflatten(tree, [part[i][0] for part in parts]) for i in range(count)])
    return [next(rows[kind]) for kind in span.kinds]


def by_kind(span: Span, layers: Sequence[Any]) -> dict[Kind, Any]:
    """What the layers of one repeat have, stacked by kind: the inverse of `by_layer`."""
    own: dict[Kind, list[Any]] = {}
    for kind, value in zip(span.kinds, layers, strict=True):
        own.setdefault(kind, []).append(value)
    return {kind: jax.tree.map(lambda *parts: jnp.stack(parts), *values) for kind, values in own.items()}


def taken(x: jax.Array, rows: np.ndarray) -> jax.Array:
    """Rows of an array by static indices; consecutive ones are a slice."""
    first, last = int(rows[0]), int(rows[-1])
    if np.array_equal(rows, np.arange(first, last + 1)):
        return x if len(rows) == x.shape[0] else x[first : last + 1]
    return x[rows]


LAYERS = "layers at once"


def at_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` of one layer as a function of many, stacked on a leading axis of every argument and result."""
    return jax.vmap(call, axis_name=LAYERS)


def runs_at_once() -> bool:
    """Whether what is being traced is one layer of many, within `at_once`."""
    try:
        jax.lax.axis_size(LAYERS)
    except NameError:
        return False
    return True


class Forward(NamedTuple):
    """What all layers of a forward pass read."""

    shared: dict[Kind, Any]  # what each kind of mixer prepared
    embedding: jax.Array  # [B, T, width]
    read_out: Callable[[jax.Array], jax.Array]  # the state between two blocks -> float32 logits [B, T, vocab]
    remat: str = "none"
    cut: int = 0  # layers below this one get no gradient, and no backward pass is made for them where they run in order

    def checkpointed(self, body: Callable[..., Any], *, prevent_cse: bool = True) -> Callable[..., Any]:
        """`body` with what `remat` names recomputed in its backward pass: nothing, all but plain products, or everything."""
        if self.remat == "none":
            return body
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
        return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)

    def context(self, kind: Kind, layer: Any) -> Context:
        """The context of one executed layer, or within `at_once` of each."""
        return Context(self.shared[kind], jnp.asarray(layer, jnp.int32), self.embedding)
