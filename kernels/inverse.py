"""Inverse of a unit lower triangular matrix, I + L with L strictly lower: six methods, one of them the default.

All chunked delta rules need it (Akk = I + tril(beta k k^T e^{G-G}) of a chunk). Random keys hide every difference between the
methods; correlated keys or beta = 2 with equal keys do not. There the polynomial methods (`neumann`, `newton_schulz`, and
`mxr` on its 16 x 16 blocks) form powers of L that are larger than the inverse by many orders of magnitude and cancel.
`docs/triangular_inverse.md` has the table and `benchmarks/linear_attention.py --inverse` makes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from strata.errors import ConfigError

BLOCK = 16
"""Side of the diagonal blocks that are inverted first, by substitution or by Neumann's series."""

Matmul = Callable[[jax.Array, jax.Array], jax.Array]


def triangular_inverse(lower: jax.Array, method: str = "auto", *, operand_dtype: Any = None) -> jax.Array:
    """(I + L)^-1 for L the strictly lower part of `lower`; the rest of `lower` is not read.

    Methods:
      "substitution16" ("auto"): exact forward substitution on 16 x 16 diagonal blocks, all at once, then pairs of blocks are
        merged, X21 = -X22 L21 X11, doubling the side. Stable.
      "substitution": forward substitution row by row. Stable; C dependent rows.
      "ladder": the merges from blocks of side 1 on, as dense products X <- X - X L_b X. Stable.
      "mxr": Neumann's series on 16 x 16 blocks, then the merges. Loses digits on correlated keys, all in bfloat16.
      "neumann": (I - L)(I + L^2)(I + L^4) ... Unstable.
      "newton_schulz": X <- X (2 I - (I + L) X) from X = I. The same polynomial as Neumann's, unstable.

    The gradient, dL = -stril(X^T dX X^T), is written by hand for all of them.

    Args:
      lower: float32 or float64 [..., C, C], any C; bfloat16 and float16 are computed in float32.
      operand_dtype: round the operands of every matrix product to this dtype, accumulating in float32: what a matrix unit
        does. None: products in the dtype of the computation.

    Returns:
      [..., C, C] in the dtype of `lower`, unit lower triangular.

    Raises:
      ConfigError: an unknown method, `lower` is not square, or a dtype is not a floating one.

    References: Huawei CSL, arXiv:2605.21325 and its `gdn-tri-inverse` code, for mxr and the ladder (their MBH).
    """
    name = "substitution16" if method == "auto" else method
    if name not in METHODS:
        raise ConfigError(f"kernels.triangular_inverse: method = {method!r}; expected one of auto, {', '.join(METHODS)}")
    if not hasattr(lower, "dtype") or not jnp.issubdtype(lower.dtype, jnp.floating):
        found = getattr(lower, "dtype", type(lower).__name__)
        raise ConfigError(f"kernels.triangular_inverse: lower is a {found}; expected an array of floating numbers")
    if operand_dtype is not None and not jnp.issubdtype(operand_dtype, jnp.floating):
        raise ConfigError(f"kernels.triangular_inverse: operand_dtype = {operand_dtype}; expected a floating one")
    if lower.ndim < 2 or lower.shape[-1] != lower.shape[-2]:
        raise ConfigError(f"kernels.triangular_inverse: lower has shape {list(lower.shape)}; expected [..., C, C]")
    lower = jnp.asarray(lower)
    wide = jnp.promote_types(lower.dtype, jnp.float32)
    operand = None if operand_dtype is None else str(jnp.dtype(operand_dtype))
    return _inverse(jnp.tril(lower.astype(wide), -1), name, operand).astype(lower.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _inverse(lower: jax.Array, method: str, operand_dtype: str | None) -> jax.Array:
    def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
        if operand_dtype is not None:
            a, b = (lax.reduce_precision(x, *_bits(operand_dtype)) for x in (a, b))
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    size = lower.shape[-1]
    side = 1 << (size - 1).bit_length()
    # Rows added to reach a power of two are rows of the identity; the inverse of the rest is not touched by them.
    padded = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, side - size)] * 2)
    return METHODS[method](padded, matmul)[..., :size, :size]


def _inverse_forward(lower: jax.Array, method: str, operand_dtype: str | None) -> tuple[jax.Array, jax.Array]:
    inverse = _inverse(lower, method, operand_dtype)
    return inverse, inverse


def _inverse_backward(method: str, operand_dtype: str | None, inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return (-jnp.tril(product(product(transposed, cotangent), transposed), -1),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


def _bits(dtype: str) -> tuple[int, int]:
    """Exponent and mantissa bits. Rounding within float32 is the same arithmetic, and runs on every device."""
    found = jnp.finfo(dtype)
    return found.bits - 1 - found.nmant, found.nmant


def _eye(like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _substitution(lower: jax.Array, matmul: Matmul) -> jax.Array:
    """Row i of X is e_i - sum_{j<i} L_ij X_j. The products are elementwise: no matrix unit, nothing rounded."""
    size = lower.shape[-1]
    unit = _eye(lower)

    def row(i: jax.Array, inverse: jax.Array) -> jax.Array:
        # Rows of the inverse from i on are still zero, so that the whole row of L may be used.
        factors = lax.dynamic_index_in_dim(lower, i, -2, keepdims=False)
        new = lax.dynamic_index_in_dim(unit, i, -2, keepdims=False) - jnp.sum(factors[..., None] * inverse, axis=-2)
        return lax.dynamic_update_index_in_dim(inverse, new, i, -2)

    return lax.fori_loop(0, size, row, jnp.zeros_like(lower))


def _diagonal_blocks(matrix: jax.Array, side: int) -> jax.Array:
    """[..., C, C] -> [..., C/side, side, side]"""
    count = matrix.shape[-1] // side
    blocks = matrix.reshape(*matrix.shape[:-2], count, side, count, side)
    return jnp.stack([blocks[..., i, :, i, :] for i in range(count)], axis=-3)


def _merge(lower: jax.Array, inverses: jax.Array, matmul: Matmul) -> jax.Array:
    """From the inverses of the diagonal blocks [..., n, b, b] to that of the whole, doubling the side."""
    while (side := inverses.shape[-1]) < lower.shape[-1]:
        below = _diagonal_blocks(lower, 2 * side)[..., side:, :side]
        upper, under = inverses[..., 0::2, :, :], inverses[..., 1::2, :, :]
        corner = -matmul(under, matmul(below, upper))
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverses = jnp.concatenate([top, jnp.concatenate([corner, under], axis=-1)], axis=-2)
    return inverses[..., 0, :, :]


def _substitution16(lower: jax.Array, matmul: Matmul) -> jax.Array:
    blocks = _diagonal_blocks(lower, min(BLOCK, lower.shape[-1]))
    return _merge(lower, _substitution(blocks, matmul), matmul)


def _mxr(lower: jax.Array, matmul: Matmul) -> jax.Array:
    blocks = _diagonal_blocks(lower, min(BLOCK, lower.shape[-1]))
    return _merge(lower, _neumann(blocks, matmul), matmul)


def _ladder(lower: jax.Array, matmul: Matmul) -> jax.Array:
    """Side b to 2b on all blocks at once: L_b holds the corners that the merge brings in, X the inverse so far."""
    row, column = (lax.broadcasted_iota(jnp.int32, lower.shape, axis) for axis in (lower.ndim - 2, lower.ndim - 1))
    inverse, side = _eye(lower), 1
    while side < lower.shape[-1]:
        corner = (row // (2 * side) == column // (2 * side)) & (row // side != column // side)
        inverse = inverse - matmul(inverse, matmul(jnp.where(corner, lower, 0), inverse))
        side *= 2
    return inverse


def _neumann(lower: jax.Array, matmul: Matmul) -> jax.Array:
    inverse, power, degree = _eye(lower) - lower, lower, 2
    while degree < lower.shape[-1]:
        power = matmul(power, power)
        inverse = inverse + matmul(inverse, power)
        degree *= 2
    return inverse


def _newton_schulz(lower: jax.Array, matmul: Matmul) -> jax.Array:
    unit = _eye(lower)
    inverse, degree = unit - lower, 2
    while degree < lower.shape[-1]:
        inverse = inverse + matmul(inverse, unit - matmul(unit + lower, inverse))
        degree *= 2
    return inverse


METHODS: dict[str, Callable[[jax.Array, Matmul], jax.Array]] = {
    "substitution16": _substitution16,
    "substitution": _substitution,
    "ladder": _ladder,
    "mxr": _mxr,
    "neumann": _neumann,
    "newton_schulz": _newton_schulz,
}
