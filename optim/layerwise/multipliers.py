"""What a layerwise rate is to the recipe: multipliers by parameter and layer, with a state of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim.options import Optimizer
from optim.roles import Parameter
from strata import ConfigError, Problem, implementation

Multipliers = dict[str, jax.Array]
"""By dotted path: float32 [layers] for a stacked parameter, float32 [] for another. A path that is missing has multiplier 1."""


class LayerwiseState(NamedTuple):
    """State of a layerwise rate. Its first two fields are what the last update used."""

    rate: Multipliers  # of the learning rate
    decay: Multipliers  # of the weight decay, beside that of the rate
    inner: Any  # of the method


class Seen(NamedTuple):
    """What a layerwise rate may look at in an update, everything by dotted path."""

    gradients: Mapping[str, jax.Array]  # after clipping; rows of frozen layers are zero
    weights: Mapping[str, jax.Array]
    count: jax.Array  # int32[], the update; the first is 1
    active: Mapping[str, Any]  # bool [layers] or [] by path: which layers this update touches; a missing path: all
    difference: Mapping[str, jax.Array] | None  # of two independent gradients at the same weights, shrunk by clipping too


class Layerwise(NamedTuple):
    """A layerwise rate. A registered implementation is called as `(options, declared, groups, steps)` and returns one.

    `declared` are the model's parameters by path, `groups` the name of the rule of each, `steps` the length of the run or None.
    """

    init: Callable[[Mapping[str, jax.Array]], LayerwiseState]
    update: Callable[[Seen, LayerwiseState], LayerwiseState]
    words: Mapping[str, str]  # by path, for the table: how the multiplier of a parameter comes about
    fixed: Mapping[str, float] = {}  # by path: multipliers of the rate that never change


def layerwise_of(
    optimizer: Optimizer, declared: Mapping[str, Parameter], groups: Mapping[str, str], steps: int | None
) -> Layerwise | None:
    """The layerwise rate of a recipe; None without.

    Raises:
      ConfigError: it needs the length of the run, or does not fit the model.
    """
    chosen = optimizer.layerwise
    if chosen is None:
        return None
    if steps is None and chosen.depends_on_steps:
        message = "it depends on the length of the run, which was not given: pass steps="
        raise ConfigError([Problem("optimizer.layerwise.name", message, chosen.name)], source="the optimizer's layerwise rate")
    return implementation(chosen)(chosen, declared, groups, steps)


def described(optimizer: Optimizer, declared: Mapping[str, Parameter], rules: Mapping[str, Any]) -> tuple[Any, Any]:
    """Fixed multipliers by path, and the words for the table."""
    found = layerwise_of(optimizer, declared, {path: rule.name for path, rule in rules.items()}, 1)
    return found.fixed, found.words


def ones(declared: Mapping[str, Parameter], paths: Any) -> Multipliers:
    """Multipliers of 1 for the given paths."""
    return {path: jnp.ones((declared[path].layers,) if declared[path].stacked else (), jnp.float32) for path in paths}


def along(multiplier: jax.Array, leaf: jax.Array) -> jax.Array:
    """A multiplier [layers] or [] shaped to be multiplied with a leaf [layers, ...]."""
    return multiplier.reshape(multiplier.shape + (1,) * (leaf.ndim - multiplier.ndim))
