"""What a diagnostic may read: a forward pass with everything between its layers, gradients, weights, the optimizer's state.

All of it is computed inside one jitted function and only when a diagnostic asks for it. The model computes in float32 whatever
`train.precision` is, every layer once and in order whatever the depth strategy. A model with several residual streams is seen
through their sum, which its final norm reads and which doubly stochastic mixing leaves as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.stack import Forward, Kind, Stack
from models.transformer import Transformer
from optim.options import Optimizer
from optim.roles import Parameter, by_path
from trainer.diagnostics.forward import Taps, begin, in_block, kinds_of, read_out, skipped, tapped
from trainer.diagnostics.options import Diagnostics
from trainer.setup import keys

MOMENTUM = ("momentum", "mu", "trace")
"""Fields of optimizer states that hold a running mean of the gradient: our own directions', Adam's, optax.trace's."""

SMALLEST = 1e-6
"""Denominators are at least this (the released metrics of arXiv:2505.13898)."""


@dataclasses.dataclass
class Trace:
    """N is the number of executed layers, K of those with parameters of their own.

    What costs something is computed when it is first read. Read `taps`, `states` and `gradients` outside of `jax.lax` loops.

    Attributes:
      graph: the model in float32, without its parameters.
      params: nested dict of parameters.
      batch: `tokens`, `targets`, `segment_ids` int32 [B, T] and `weights` float32 [B, T].
      optimizer: the optimizer's state.
      recipe: its options.
      declared: shape, role and axes of every parameter, by dotted path.
      executed: dotted paths of the parameters that looped blocks do not share.
      option: the config section.
      model: with its parameters.
      stack, forward: its executed layers, and what they read beside the state.
      mask: float32 [B, T], 1 at the tokens that count: no padding, and not the first positions of a document.
      last: int32 [B], the last token of each row that is no padding, and float32 [B], whether there is one.
    """

    graph: nnx.GraphDef
    params: Any
    batch: dict[str, jax.Array]
    optimizer: Any
    recipe: Optimizer
    declared: dict[str, Parameter]
    executed: frozenset[str]
    option: Diagnostics

    def __post_init__(self):
        # At once, not on demand: a value that is first computed inside a loop could not be used outside it.
        self.model: Transformer = nnx.merge(self.graph, nnx.State(self.params))
        self.stack: Stack
        self.forward: Forward
        self.stack, self._start, self.forward = begin(self.model, self.batch)
        segments = self.batch["segment_ids"]
        places = jnp.arange(segments.shape[1])[None]
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        first = jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
        self.mask = ((segments > 0) & (places - first >= self.option.skip_positions)).astype(jnp.float32)
        count = jnp.sum(segments > 0, axis=1)
        self.last = (jnp.maximum(count - 1, 0), (count > 0).astype(jnp.float32))

    def mean(self, values: jax.Array) -> jax.Array:
        """[..., B, T] -> [...], over the tokens that count; NaN where none does."""
        return jnp.sum(values * jnp.broadcast_to(self.mask, values.shape), axis=(-2, -1)) / jnp.sum(self.mask)

    def sampled(self, values: jax.Array) -> jax.Array:
        """[B, T, ...] -> [tokens, ...]: at most `diagnostics.sample` tokens, evenly spread over the batch."""
        rows = values.reshape(-1, *values.shape[2:])
        taken = min(len(rows), self.option.sample)
        return rows[jnp.arange(taken) * len(rows) // taken]

    @functools.cached_property
    def taps(self) -> Taps:
        """What the forward pass went through."""
        return self._backward[0][1] if "gradient_norm" in self.option.chosen else self._forward(self.params)[1]

    @property
    def gradients(self) -> tuple[Any, jax.Array]:
        """Of the mean cross-entropy, with respect to the parameters and to the states; nothing that training adds is in it.

        The first is a tree of parameters; shared ones have the sum over their uses. The second is float32
        [N + 1, B, T, (streams,) width], of the state before each layer and of the last.
        """
        return self._backward[1]

    @functools.cached_property
    def _backward(self) -> tuple[tuple[jax.Array, Taps], tuple[Any, jax.Array]]:
        zeros = jnp.zeros((len(self.stack) + 1, *self._start.shape), self._start.dtype)
        return jax.value_and_grad(self._forward, argnums=(0, 1), has_aux=True)(self.params, zeros)

    def _forward(self, params: Any, added: jax.Array | None = None) -> tuple[jax.Array, Taps]:
        model = nnx.merge(self.graph, nnx.State(params))
        stack, h, forward = begin(model, self.batch)
        h, taps = tapped(model, stack, h, forward, added)
        return self.nats(jax.nn.log_softmax(forward.read_out(h), axis=-1)), taps

    def nats(self, logs: jax.Array) -> jax.Array:
        """Mean nats over the scored tokens of the batch, from log-probabilities [B, T, vocab].

        Not `models.cross_entropy`, whose chunks want a batch that divides over the mesh: this one is small, and its rows are
        on every device.
        """
        chosen = jnp.take_along_axis(logs, self.batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * self.batch["weights"]) / jnp.sum(self.batch["weights"])

    @property
    def states(self) -> jax.Array:
        """float32 [N + 1, B, T, width]: the state before each layer, and the last; streams are summed."""
        return self.taps.states

    def logits(self, state: jax.Array) -> jax.Array:
        """A state read as if it were the last: [B, T, width] -> float32 [B, T, vocab]."""
        return read_out(self.model, state)

    def without(self, keep: jax.Array) -> jax.Array:
        """The states [N + 1, B, T, width] of a pass in which only the layers with `keep` bool [N] are run."""
        return skipped(self.model, self.stack, self._start, self.forward, keep)

    @functools.cached_property
    def unique(self) -> dict[Kind, list[int]]:
        """Numbers below K of the layers of each kind: where they are used first."""
        found: dict[Kind, list[int]] = {}
        for number, place in enumerate(self.stack.places):
            if place.loop == 0:
                found.setdefault(place.kind, []).append(number)
        return found

    @property
    def unique_layers(self) -> int:
        """K."""
        return sum(len(numbers) for numbers in self.unique.values())

    def per_layer(self, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Something for each layer of stacked parameters, by dotted path [layers of the kind, ...], as [K, ...] by site.

        The site is the path within the block, such as `mixer.query`; NaN for layers that lack it. What belongs to executed
        layers gives [N, ...]. What is not of the blocks stays as it is, under its path.
        """
        found: dict[str, jax.Array] = {}
        for path, value in values.items():
            if not in_block(path):
                found[path] = value
                continue
            site = kinds_of(path)[1].removesuffix(".kernel")
            layers = len(self.stack) if path in self.executed else self.unique_layers
            empty = jnp.full((layers, *value.shape[1:]), jnp.nan, jnp.float32)
            found[site] = found.get(site, empty).at[jnp.asarray(self.declared[path].positions)].set(value)
        return found

    def decomposed(self, arrays: Mapping[str, jax.Array], spectrum: Callable[[jax.Array], jax.Array]) -> dict[str, jax.Array]:
        """A function of spectra of the stacked matrices of blocks, [K, ...] by site as `per_layer` gives it.

        Args:
          arrays: by dotted path; those that are no stacked matrices are left out.
          spectrum: [layers, in, out] -> [layers, ...]; NaN stands for the layers of large matrices that are not measured.
        """
        found = {}
        for path, array in arrays.items():
            if not is_matrix(self.declared[path]):
                continue
            chosen = measured_layers(self.declared[path], self.option)
            if len(chosen) == len(array):
                found[path] = spectrum(array)
            elif len(chosen):
                values = spectrum(array[chosen])
                found[path] = jnp.full((len(array), *values.shape[1:]), jnp.nan, values.dtype).at[chosen].set(values)
        return self.per_layer(found)

    @functools.cached_property
    def momentum(self) -> dict[str, jax.Array]:
        """The running mean of the gradient of every parameter that the optimizer keeps one of, by dotted path."""
        return momentum(self.optimizer, self.declared)

    @functools.cached_property
    def weights(self) -> dict[str, jax.Array]:
        """The parameters by dotted path."""
        return by_path(self.params)


def momentum(optimizer: Any, declared: Mapping[str, Parameter]) -> dict[str, jax.Array]:
    """The running mean of the gradient of every parameter that an optimizer's state has one of, by dotted path.

    Such an array lies in a field of a name in `MOMENTUM`, under the path of its parameter and with its shape. The state of an
    optax transformation is apart for each parameter: there the field lies under the path.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer):
        names = keys(path)
        field = max((i for i, name in enumerate(names) if name in MOMENTUM), default=None)
        if field is not None:
            around = (".".join(names[field + 1 :]), *names[:field])
            parameter = next((declared[name] for name in around if name in declared), None)
            if parameter is not None and parameter.shape == leaf.shape:
                found[parameter.path] = leaf
    return found


def is_matrix(parameter: Parameter) -> bool:
    """Whether a parameter is a stack of matrices, one a layer."""
    return parameter.role == "matrix" and parameter.stacked and len(parameter.shape) == 3


def measured_layers(parameter: Parameter, option: Diagnostics) -> np.ndarray:
    """Which matrices of a stack are decomposed: all, or `large_layers` of those above `largest_matrix` (options)."""
    layers, *sides = parameter.shape
    if min(sides) <= option.largest_matrix or layers <= option.large_layers:
        return np.arange(layers)
    return np.unique(np.linspace(0, layers - 1, option.large_layers).round().astype(int))


def norm(x: jax.Array) -> jax.Array:
    """Euclidean length over the last axis."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))
