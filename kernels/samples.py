"""Inputs to time an op on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels.ops import GATES


def inputs(
    op: str, batch: int, length: int, heads: int, size: int, dtype: str = "float32", seed: int = 0
) -> tuple[jax.Array, ...]:
    """q, k, v [B,T,H,K] with K = V = `size`, and the gates of the op in its order, float32: keys normalised for delta rules,
    decays mild, beta uniform in [0, 1).
    """
    rng = np.random.default_rng(seed)
    decay, delta = GATES[op]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = (normal(batch, length, heads, size) for _ in range(3))
    gates = []
    if decay in ("scalar", "vector") and op != "lightnet":
        gates.append(-np.abs(0.1 * normal(batch, length, heads, *((size,) if decay == "vector" else ()))))
    if delta:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        gates.append(rng.uniform(0, 1, (batch, length, heads)).astype(np.float32))
    return (*(jnp.asarray(x, dtype) for x in (q, k, v)), *map(jnp.asarray, gates))
