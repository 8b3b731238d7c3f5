"""One model's parameters as those of another: what conversions work on, and how they are called.

A conversion is a component of kind `model.conversion`: options, and a function

    (options, donor, params, target, fresh, *, seed) -> (parameters of the target, what was lost by name)

where `donor` and `target` are `models.options.Model`, and parameters are `Flat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from models import options
from models.stack import Kind, order
from strata import ConfigError, registry

Path = tuple[Any, ...]
Flat = dict[Path, np.ndarray]
"""Parameters by path, as in `nnx.to_flat_state`; those of blocks are `("blocks", kind, ...)`, layers on the leading axis."""


def convert(
    option: Any, donor: options.Model, params: Flat, target: options.Model, fresh: Flat, *, seed: int = 0
) -> tuple[Flat, dict[str, float]]:
    """Parameters of `target` from those of `donor`.

    Args:
      option: of kind `model.conversion`.
      donor, params: options and parameters of the model that is there.
      target, fresh: options of the model to make, and parameters of one newly built.
      seed: of whatever is drawn.

    Returns:
      The parameters, each of the shape that it has in `fresh`; and what was lost by name, as the conversion counts it.

    Raises:
      ConfigError: the two models cannot be matched, with every reason; or what was made is not what the model has.
    """
    found, lost = registry.implementation(option)(option, donor, params, target, fresh, seed=seed)
    wrong = [
        f"{'.'.join(map(str, path))} is {_shape(found.get(path))}, and the model has {_shape(fresh.get(path))}"
        for path in sorted(found.keys() | fresh.keys(), key=str)
        if _shape(found.get(path)) != _shape(fresh.get(path))
    ]
    if wrong:
        raise ConfigError(f"the conversion {option.name} does not make this model: " + "; ".join(wrong))
    return found, lost


def _shape(value: np.ndarray | None) -> str:
    return "absent" if value is None else str(list(np.shape(value)))


def places(model: options.Model) -> list[tuple[Kind, int, int]]:
    """Kind, index among its kind, and number of its kind, of every unique layer."""
    kinds = order(model.plan())
    return [(kind, kinds[:layer].count(kind), kinds.count(kind)) for layer, kind in enumerate(kinds)]


def by_layer(model: options.Model, params: Flat) -> list[Flat]:
    """Parameters of each layer of a sequential model by their path within the block."""
    return [
        {path[2:]: value[index] for path, value in params.items() if path[:2] == ("blocks", kind)}
        for kind, index, _ in places(model)
    ]


def from_layers(model: options.Model, layers: Sequence[Flat]) -> Flat:
    """The inverse of `by_layer`: parameters of the blocks of a sequential model, and nothing beside them.

    Raises:
      ConfigError: there are not as many layers as the model has, or layers of one kind have other parameters or shapes.
    """
    if len(layers) != model.layers:
        raise ConfigError(f"{len(layers)} layers are given for a model of {model.layers}")
    stacks: dict[Path, list[np.ndarray]] = {}
    counts: dict[Kind, int] = {}
    for (kind, _, count), layer in zip(places(model), layers, strict=True):
        counts[kind] = count
        for path, value in layer.items():
            stacks.setdefault(("blocks", kind, *path), []).append(value)
    for path, values in stacks.items():
        if len(values) != counts[path[1]] or len({value.shape for value in values}) > 1:
            raise ConfigError(f"{'.'.join(map(str, path))}: layers of one kind have other parameters or shapes")
    return {path: np.stack(values) for path, values in stacks.items()}
