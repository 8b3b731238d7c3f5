"""Matrices of a tree of parameters, and how they are orthogonalised.

A parameter may hold several matrices side by side on its last axis (`Parameter.split`): query, key and value stored as one, or
the heads of a projection. Each is orthogonalised, and scaled, by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optim.directions.newton_schulz import Polynomial, newton_schulz_leaves
from optim.roles import path_of

Blocks = dict[str, jax.Array]
"""Matrices [..., m, n] by dotted path, with `[i]` behind it where the parameter holds several."""


class Orthogonalizer(NamedTuple):
    """A way to orthogonalise matrices, with a state of arrays."""

    init: Callable[[Blocks], Any]
    apply: Callable[[Blocks, Blocks, Any], tuple[Blocks, Any]]  # of the matrices, their momentum, and the state


def fixed(chosen: Sequence[Polynomial]) -> Orthogonalizer:
    """The same polynomials for every matrix; no state."""

    def apply(matrices: Blocks, momentum: Blocks, state: Any) -> tuple[Blocks, Any]:
        del momentum
        return dict(zip(matrices, newton_schulz_leaves(list(matrices.values()), chosen), strict=True)), state

    return Orthogonalizer(lambda matrices: (), apply)


def blocks_of(tree: Any, splits: Mapping[str, tuple[int, ...]]) -> Blocks:
    """The matrices of a tree."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = path_of(keys)
        sizes = splits.get(path, ())
        if len(sizes) < 2:
            found[path] = leaf
        else:
            found |= {f"{path}[{i}]": part for i, part in enumerate(split_last(leaf, sizes))}
    return found


def split_last(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """Consecutive blocks of the last axis."""
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=-1)


def joined(tree: Any, matrices: Blocks, splits: Mapping[str, tuple[int, ...]]) -> Any:
    """A tree shaped as `tree` of the matrices that `blocks_of` gave."""

    def leaf(keys: tuple[Any, ...], _: Any) -> jax.Array:
        path = path_of(keys)
        count = len(splits.get(path, ()))
        return matrices[path] if count < 2 else jnp.concatenate([matrices[f"{path}[{i}]"] for i in range(count)], axis=-1)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def nuclear_scale(momentum: jax.Array, polar: jax.Array) -> jax.Array:
    """`<M, O>` of each matrix, float32 [..., 1, 1]: its nuclear norm if O is its polar factor."""
    product = momentum.astype(jnp.float32) * polar.astype(jnp.float32)
    return jnp.sum(product, axis=(-2, -1), keepdims=True)
