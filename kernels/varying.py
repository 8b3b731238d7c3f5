"""Which axes of the mesh arrays vary over, within a `jax.shard_map` that checks it (`check_vma=True`, its default)."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def axes_of(tree: Any) -> frozenset[str]:
    """The axes that some array of a tree varies over; none outside such a `jax.shard_map`."""
    kinds = (getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(tree))
    return frozenset().union(*(getattr(kind, "varying", ()) for kind in kinds))


def varying_alike(tree: Any, like: Any = ()) -> Any:
    """The tree, every array of it varying over all axes that one of them, or of `like`, varies over.

    Values stay as they are. A scan wants its carry to vary as what it becomes does, and a backward pass by hand gives
    cotangents that vary as its results do: JAX sums those of arrays that were the same on all devices.
    """
    wanted = axes_of((tree, like))

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(wanted - axes_of(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if wanted else tree
