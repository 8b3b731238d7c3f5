"""Corrections along depth of a layer-parallel sweep (Han et al. 2026, SNLP, arXiv:2605.17842).

With inputs h_{j-1}, results o_j = f_j(h_{j-1}) and the exact state h_0 before the suffix,

    c_j = o_j + A_j (c_{j-1} - h_{j-1}),        c_0 = h_0

and every surrogate A_j of the Jacobian makes one more layer exact a sweep, since the difference is zero there. Sums are
float32 whatever the compute type, or rounding would add up over the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def along_depth(results: jax.Array, inputs: jax.Array, apply: Callable[[Any, jax.Array], jax.Array], factors: Any) -> jax.Array:
    """The recurrence for any A_j.

    Args:
      results: o, [N, ...].
      inputs: h_0 to h_{N-1}, [N, ...].
      apply: (factor of layer j, float32 difference) -> A_j times the difference.
      factors: a pytree of arrays [N, ...].

    Returns:
      c, [N, ...] in the type of `results`.
    """

    def layer(before: jax.Array, own: Any) -> tuple[jax.Array, jax.Array]:
        result, entered, factor = own
        after = result.astype(jnp.float32) + apply(factor, before - entered.astype(jnp.float32))
        return after, after

    _, corrected = jax.lax.scan(layer, inputs[0].astype(jnp.float32), (results, inputs, factors))
    return corrected.astype(results.dtype)


def identity(results: jax.Array, inputs: jax.Array) -> jax.Array:
    """A = I (IDN), as a running sum over layers: c_j = h_0 + the sum of o_i - h_{i-1} for i up to j."""
    moved = results.astype(jnp.float32) - inputs.astype(jnp.float32)
    return (inputs[:1].astype(jnp.float32) + jnp.cumsum(moved, axis=0)).astype(results.dtype)


def damped(results: jax.Array, inputs: jax.Array, kappa: float) -> jax.Array:
    """A = (1 - kappa) I."""
    return along_depth(results, inputs, lambda _, x: (1 - kappa) * x, ())


def scaled(results: jax.Array, inputs: jax.Array, scales: jax.Array) -> jax.Array:
    """A_j = a_j I with a_j [N]."""
    return along_depth(results, inputs, lambda a, x: a * x, scales)


def hyper_connected(results: jax.Array, inputs: jax.Array, matrices: jax.Array) -> jax.Array:
    """HCN: A_j = M_j over streams, [N, S, S] or [N, B, T, S, S]; states are [N, B, T, S, width]."""

    def apply(matrix: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("ij,btjd->btid" if matrix.ndim == 2 else "btij,btjd->btid", matrix, x, precision="highest")

    return along_depth(results, inputs, apply, matrices)


def probed(inputs: jax.Array, signs: jax.Array, length: float) -> jax.Array:
    """`inputs` [N, ..., width] moved by `length` of their own root mean square over the width, along `signs`."""
    wide = inputs.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True))
    return (wide + length * size * signs).astype(inputs.dtype)


def diagonal(results: jax.Array, inputs: jax.Array, results_probed: jax.Array, probed: jax.Array, limit: float) -> jax.Array:
    """DiagN: A_j = diag((f_j(h + d) - f_j(h)) / d) for a small d of random signs, clipped to +-limit and held.

    A finite difference, as in the released code, and not a product with the transposed Jacobian: that would let a
    position depend on later ones. It is divided by the step that was taken, rounding included; where rounding left none, 0.
    """
    step = probed.astype(jnp.float32) - inputs.astype(jnp.float32)
    change = results_probed.astype(jnp.float32) - results.astype(jnp.float32)
    slope = jnp.where(step == 0, 0.0, change / jnp.where(step == 0, 1.0, step))
    slope = jax.lax.stop_gradient(jnp.clip(slope, -limit, limit))
    return along_depth(results, inputs, lambda d, x: d * x, slope)


def exact(call: Callable[[int, jax.Array], jax.Array], results: jax.Array, inputs: jax.Array) -> jax.Array:
    """A_j is the Jacobian itself: Newton's method. One layer after another, so slower than the sequential stack; for study.

    The product with the Jacobian is the transpose of the product with its transpose, so that layers with a derivative
    written out for reverse mode only can be used.

    Args:
      call: (j, h) -> f_j(h), one layer.
      results, inputs: as in `along_depth`.
    """
    before, corrected = inputs[0].astype(jnp.float32), []
    for j in range(len(inputs)):
        _, pull = jax.vjp(lambda h, j=j: call(j, h), inputs[j])
        _, push = jax.vjp(lambda u, pull=pull: pull(u)[0], jnp.zeros_like(results[j]))
        moved = push((before - inputs[j].astype(jnp.float32)).astype(inputs.dtype))[0]
        before = results[j].astype(jnp.float32) + moved.astype(jnp.float32)
        corrected.append(before.astype(results.dtype))
    return jnp.stack(corrected)
