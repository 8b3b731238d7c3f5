"""The arrays of a state by their path, such as `optimizer/0/mu/blocks/kernel`, and how two states differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

Described = Mapping[str, tuple[str, tuple[int, ...]]]
"""Path -> dtype name, global shape."""

_SHOWN = 20  # differing paths listed before the rest is only counted


def by_path(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a pytree by path, in tree order, and its structure for `jax.tree.unflatten`.

    Raises:
      ValueError: two leaves have the same path (a dict key that contains a slash).
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/") or "state": leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return named, structure


def describe(leaves: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype name and shape of each leaf."""
    return {path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in leaves.items()}


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of an array or abstract array; without a sharding, on the default device."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def differences(saved: Described, wanted: Described, *, partial: bool = False) -> list[str]:
    """One line for every path whose presence, dtype or shape differs, the first twenty and a count of the rest.

    Args:
      saved: what the checkpoint holds.
      wanted: what the run needs.
      partial: what is in the checkpoint alone is not a difference.
    """
    differ = []
    for path in sorted({*saved, *wanted}):
        if path not in saved:
            differ.append(f"{path}: not in the checkpoint, the run has {_shown(wanted[path])}")
        elif path not in wanted:
            if not partial:
                differ.append(f"{path}: {_shown(saved[path])} in the checkpoint, not in the run")
        elif saved[path] != wanted[path]:
            differ.append(f"{path}: {_shown(saved[path])} in the checkpoint, {_shown(wanted[path])} in the run")
    rest = len(differ) - _SHOWN
    return [*differ[:_SHOWN], f"... and {rest} more"] if rest > 0 else differ


def _shown(array: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = array
    return f"{dtype}[{','.join(map(str, shape))}]"
