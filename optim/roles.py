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
| vector | gains and biases |
| scalar | single numbers, one a layer or a head |
| table | any other look-up table, such as learned positions |

Blocks of one kind are stacked: their parameters carry a leading axis named "layer".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from optim.options import ROLES
from strata import ConfigError, Problem


class Parameter(NamedTuple):
    """One parameter as declared."""

    path: str  # attributes and keys joined by dots, such as "blocks.attention.query"
    shape: tuple[int, ...]
    dtype: Any
    role: str
    axes: tuple[str, ...]  # a name for each axis of `shape`

    @property
    def layers(self) -> int:
        """Number of stacked layers; 1 for a parameter without a "layer" axis."""
        return self.shape[0] if self.axes[:1] == ("layer",) else 1


def parameters(model: nnx.Module | nnx.State) -> dict[str, Parameter]:
    """Every `nnx.Param` of a model by its path.

    Args:
      model: a module, its abstract form (`nnx.eval_shape`), or a state of it.

    Raises:
      ConfigError: listing every parameter whose role or axes are missing or do not fit it.
    """
    state = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else nnx.filter_state(model, nnx.Param)
    found: dict[str, Parameter] = {}
    problems: list[Problem] = []
    for keys, variable in nnx.to_flat_state(state):
        path = ".".join(str(key) for key in keys)
        metadata = variable.get_metadata()
        role, axes, shape = metadata.get("role"), metadata.get("axes"), tuple(variable.shape)
        fault = _fault(role, axes, shape)
        if fault:
            problems.append(Problem(path, fault, has_value=False))
        else:
            found[path] = Parameter(path, shape, variable.dtype, role, tuple(axes))
    if problems:
        raise ConfigError(problems, source="the parameters of the model")
    return found


def _fault(role: Any, axes: Any, shape: tuple[int, ...]) -> str | None:
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
    return None


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
