"""What each parameter says about itself: its role and its named axes.

A model declares both when it creates a parameter,

    nnx.Param(value, role="matrix", axes=("layer", "embed", "mlp"))

and everything that treats parameters differently (optimizer, weight decay, sharding) reads them here. Nothing is
guessed from a shape or a name.

| role | what it is |
|---|---|
| embedding | a table of token vectors, [vocab, embed] |
| head | the matrix to the logits |
| matrix | a weight multiplied with activations, [..., in, out] |
| factor | a matrix of a low-rank or nonlinear branch beside a weight: LoRA's and NOBLE's down, up and mixing matrices |
| vector | gains and biases |
| scalar | single numbers, one a layer or a head |
| table | any other look-up table, such as learned positions |

Blocks of one kind are stacked: their parameters carry a leading axis named "layer". Blocks that a looped model shares have as
many layers there as there are blocks, adapters (role factor) as many as are executed.

A parameter may also declare
  multiplier: by which its learning rate differs from that of its group. Its whole update, direction and decoupled decay, is
    multiplied by it, as a rate of its own would be.
  positions: the place of each of its layers among all layers of the model, ascending, such as (3, 7, 11) for every fourth
    block; without it 0, 1, 2, ...  A shared block stands where it is used first. A parameter without a layer axis may give one
    place.
  split: sizes of the consecutive blocks of its last axis that are matrices of their own, such as query, key and value stored
    as one, or the heads of a projection.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from optim.options.roles import ROLES
from strata import ConfigError, Problem


class Parameter(NamedTuple):
    """One parameter as declared."""

    path: str  # attributes and keys joined by dots, such as "blocks.attention.query"
    shape: tuple[int, ...]
    dtype: Any
    role: str
    axes: tuple[str, ...]  # a name for each axis of `shape`
    multiplier: float = 1.0  # of the learning rate
    positions: tuple[int, ...] = ()  # of each stacked layer among all layers of the model; empty without a "layer" axis
    split: tuple[int, ...] = ()  # sizes of blocks of the last axis that are matrices of their own; empty: one matrix

    @property
    def stacked(self) -> bool:
        """Whether it has a "layer" axis."""
        return self.axes[:1] == ("layer",)

    @property
    def layers(self) -> int:
        """Number of stacked layers; 1 for a parameter without a "layer" axis."""
        return self.shape[0] if self.stacked else 1


def parameters(model: nnx.Module | nnx.State) -> dict[str, Parameter]:
    """Every `nnx.Param` of a model by its path.

    Args:
      model: a module, its abstract form (`nnx.eval_shape`), or a state of it.

    Raises:
      ConfigError: listing every parameter whose role or axes are missing or do not fit it, or whose multiplier is none.
    """
    state = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else nnx.filter_state(model, nnx.Param)
    found: dict[str, Parameter] = {}
    problems: list[Problem] = []
    for keys, variable in nnx.to_flat_state(state):
        path = ".".join(str(key) for key in keys)
        metadata = variable.get_metadata()
        role, axes, shape = metadata.get("role"), metadata.get("axes"), tuple(variable.shape)
        multiplier = metadata.get("multiplier", 1.0)
        positions, split = metadata.get("positions"), tuple(metadata.get("split") or ())
        fault = _fault(role, axes, shape, multiplier) or _fault_of_layers(axes, shape, positions, split)
        if fault:
            problems.append(Problem(path, fault, has_value=False))
        else:
            stacked = tuple(axes[:1]) == ("layer",)
            places = tuple(positions) if positions is not None else tuple(range(shape[0])) if stacked else ()
            found[path] = Parameter(path, shape, variable.dtype, role, tuple(axes), float(multiplier), places, split)
    if problems:
        raise ConfigError(problems, source="the parameters of the model")
    return found


def _fault(role: Any, axes: Any, shape: tuple[int, ...], multiplier: Any) -> str | None:
    """What is wrong with a declaration, in words; None if nothing is."""
    if role is None:
        return f"a parameter of shape {shape} without a role; create it with nnx.Param(..., role=, axes=)"
    if role not in ROLES:
        return f"unknown role {role!r}; expected one of {', '.join(ROLES)}"
    if axes is None or len(axes) != len(shape):
        return f"axes {axes!r} do not name the {len(shape)} axes of shape {shape}"
    if "layer" in axes[1:]:
        return f"the layer axis comes first, not as in {tuple(axes)}"
    if role == "matrix" and len(shape) - (axes[0] == "layer") < 2:
        return f"a matrix has an axis in and an axis out beside the layer axis; shape {shape} has not"
    number = isinstance(multiplier, numbers.Real) and not isinstance(multiplier, bool)
    if not number or not 0 < multiplier < math.inf:
        return f"multiplier {multiplier!r} of the learning rate is not a finite number above 0"
    return None


def _fault_of_layers(axes: Any, shape: tuple[int, ...], positions: Any, split: tuple[int, ...]) -> str | None:
    """What is wrong with the places of its layers, or with its blocks."""
    if positions is not None:
        layers = shape[0] if tuple(axes[:1]) == ("layer",) else 1
        if len(positions) != layers or any(b <= a for a, b in zip((-1, *positions), positions, strict=False)):
            return f"positions {positions!r} are not {layers} ascending places of layers"
    if split and sum(split) != shape[-1]:
        return f"blocks of {split} do not make up the last axis of shape {shape}"
    return None


def depth_of(declared: Mapping[str, Parameter], role: str | None = None) -> int:
    """Number of layers of the model, by the places that its parameters declare; at least 1.

    With `role`, of those of that role alone: blocks that loops share have as many places as there are blocks, and their
    adapters as many as layers are executed.
    """
    chosen = (parameter for parameter in declared.values() if role in (None, parameter.role) and parameter.positions)
    return max((parameter.positions[-1] + 1 for parameter in chosen), default=1)


def path_of(keys: tuple[Any, ...]) -> str:
    """The dotted path of a leaf from the key path that `jax.tree_util` gives.

    The same for `nnx.State`, whose leaves sit in a variable's `value`, and for the plain dict of its arrays.
    """
    # Only a variable contributes an attribute key called "value"; a parameter of that name is a dict key.
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    names = []
    for key in keys:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
        else:
            raise TypeError(f"a tree of parameters is made of dicts, lists and attributes, not of {key!r}")
    return ".".join(names)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters, or of their gradients, by dotted path."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def like(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree shaped as `tree` with the leaves of the same paths from `leaves`."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: leaves[path_of(keys)], tree)


def mirror(state: Any, declared: Mapping[str, Parameter], values: Mapping[str, Any], other: Any) -> Any:
    """A tree shaped as an optimizer's state with the value of its parameter for every array that mirrors one.

    Args:
      state: of a transformation that `optim.build` made, or its abstract form.
      declared: as `parameters` gives.
      values: something for each parameter by path, such as its sharding.
      other: for arrays that mirror no parameter: counts, and statistics of another shape.
    """

    def value(keys: tuple[Any, ...], leaf: Any) -> Any:
        for key in reversed(keys):
            path = getattr(key, "key", None)
            if path in declared:
                return values[path] if tuple(leaf.shape) == declared[path].shape else other
        return other

    return jax.tree_util.tree_map_with_path(value, state)
