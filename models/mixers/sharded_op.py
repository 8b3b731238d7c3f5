"""A chunked op of `kernels` over a mesh: each device runs it on its own rows and heads.

Nothing in the recurrences crosses rows or heads, so no device needs another's numbers. Said explicitly because the compiler
cannot split a Pallas kernel by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

import kernels
from kernels.ops import GATES
from kernels.registry import Choice
from models.sharding import RULES


def run(
    op: str,
    arrays: Sequence[jax.Array],
    *,
    segment_ids: jax.Array | None,
    initial_state: Any,
    decay: Any,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Run an op, over the mesh in use if there is one.

    Args:
      op: its name.
      arrays: q, k [B, T, H, K], v [B, T, HV, V] and the gates of the op, [B, T, HV, ...].
      segment_ids: int [B, T], or None.
      initial_state: [B, HV, K, V] (of `lightnet` a pair), or None.
      decay: [HV] for the ops whose decay is constant, else None.
      options: others of the op, static.

    Returns:
      [B, T, HV, V], and the final state if `output_final_state`.
    """

    def call(arrays: Any, segment_ids: Any, initial_state: Any, decay: Any) -> tuple[jax.Array, Any]:
        constant = {} if decay is None else {"decay": decay}
        given = {"segment_ids": segment_ids, "initial_state": initial_state}
        return getattr(kernels, op)(*arrays, **given, **constant, **options)

    keeps = bool(options.get("output_final_state"))
    return _over_mesh(call, arrays, segment_ids, initial_state, decay, keeps_state=keeps)


def explain(op: str, arrays: Sequence[Any], *, segment_ids: Any, decay: Any, **options: Any) -> Choice:
    """Which back-end serves the same call of `run` without an initial state, from within: a device has its own rows and heads.

    Args:
      op, arrays, segment_ids, decay, options: as of `run`; arrays may be `jax.ShapeDtypeStruct`.

    Raises:
      ConfigError: the back-end that is asked for cannot serve.
    """
    kind, delta = GATES[op]
    names = ["g"] * (kind in ("scalar", "vector") and op != "lightnet") + ["beta"] * delta
    found = []

    def call(arrays: Any, segment_ids: Any, initial_state: Any, decay: Any) -> tuple[jax.Array, None]:
        constant = {} if decay is None else {"decay": decay}
        gates = dict(zip(names, arrays[3:], strict=True))
        found.append(kernels.explain(op, *arrays[:3], segment_ids=segment_ids, **gates, **constant, **options))
        return arrays[2], None

    jax.eval_shape(lambda *x: _over_mesh(call, x[0], x[1], None, x[2], keeps_state=False), tuple(arrays), segment_ids, decay)
    return found[0]


def _over_mesh(
    call: Callable[..., tuple[jax.Array, Any]],
    arrays: Sequence[jax.Array],
    segment_ids: Any,
    initial_state: Any,
    decay: Any,
    *,
    keeps_state: bool,
) -> tuple[jax.Array, Any]:
    """`call(arrays, segment_ids, initial_state, decay) -> ([B, T, HV, V], final state)`, split over the mesh in use."""
    batch, _, heads, _ = arrays[0].shape
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or mesh.size == 1:
        return call(tuple(arrays), segment_ids, initial_state, decay)
    rows, own = _split(mesh, "batch", batch), _split(mesh, "heads", heads)  # value heads are a multiple of heads
    by_token, state = PartitionSpec(rows, None, own), PartitionSpec(rows, own)
    inputs = (by_token, PartitionSpec(rows), state, PartitionSpec(own))
    outputs = (by_token, state if keeps_state else None)
    split = jax.shard_map(call, in_specs=inputs, out_specs=outputs, check_vma=False)
    return split(tuple(arrays), segment_ids, initial_state, decay)


def _split(mesh: Any, axis: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes that a named axis of this size is split over; None where they do not divide it."""
    names = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    over = tuple(name for name in RULES[axis] if names.get(name, 1) > 1)
    return over if over and size % math.prod(names[name] for name in over) == 0 else None
