"""Attention layers that are linear attention with something before or after it: Hedgehog and TransNormer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.arguments import refused, value_heads, wrong_array
from kernels.ops import linear_attention
from kernels.steps import linear_attention_step


def hedgehog(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Softmax over the 2K numbers [2y, -2y], y = x weight + bias: a learned positive map that imitates softmax attention.

    Zhang et al. 2024, arXiv:2402.04347; weight starts as the identity. The factor 2 is that of the fla library.

    Args:
      x: [..., H, K]. weight: [K, K] for all heads, or [H, K, K]. bias: [K] or [H, K], or None.

    Returns:
      [..., H, 2K], positive, each row sums to one; the dtype of x, computed in at least float32.

    Raises:
      ConfigError: weight or bias is not of such a shape.
    """
    if not hasattr(x, "shape") or len(x.shape) < 2:
        raise refused("hedgehog", [f"x is {_seen(x)}; expected an array [..., H, K]"])
    return _features("hedgehog", "weight", x, weight, bias)


def _features(function: str, name: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    heads, size = x.shape[-2:]
    wrong = _wrong_weight(name, weight, {"[K, K]": (size, size), "[H, K, K]": (heads, size, size)})
    if bias is not None:
        wrong += _wrong_weight("bias", bias, {"[K]": (size,), "[H, K]": (heads, size)})
    if wrong:
        raise refused(function, wrong)
    wide = jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    one_for_all = weight.ndim == 2
    product = "...hk,kl->...hl" if one_for_all else "...hk,hkl->...hl"
    y = jnp.einsum(product, wide, weight.astype(wide.dtype), precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(wide.dtype), y.shape)
    return jax.nn.softmax(jnp.concatenate([2 * y, -2 * y], axis=-1), axis=-1).astype(x.dtype)


def hedgehog_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_weight: jax.Array,
    key_weight: jax.Array,
    *,
    normalize: bool = True,
    **options: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """o_t = phi(q_t) S_t / (phi(q_t) z_t), S = sum phi(k) v^T, z = sum phi(k), phi the `hedgehog` map.

    Args:
      q, k, v and `options`: as `kernels.linear_attention`; the weights as `hedgehog`.
      normalize: divide by phi(q) z. Then v gets a column of ones, and the state is [B or N,HV,2K,V+1]; else [...,2K,V].
    """
    dtype, (q, k, v) = _prepared("hedgehog_attention", q, k, v, query_weight, key_weight)
    o, state = linear_attention(q, k, _with_ones(v, normalize), **options)
    return (averages(o) if normalize else o).astype(dtype), state


def hedgehog_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_weight: jax.Array,
    key_weight: jax.Array,
    state: jax.Array | None,
    *,
    normalize: bool = True,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `hedgehog_attention`."""
    dtype, (q, k, v) = _prepared("hedgehog_attention_step", q, k, v, query_weight, key_weight)
    o, state = linear_attention_step(q, k, _with_ones(v, normalize), state, scale=scale)
    return (averages(o) if normalize else o).astype(dtype), state


def transnormer_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, gain: jax.Array | None = None, *, epsilon: float = 1e-6, **options: Any
) -> tuple[jax.Array, jax.Array | None]:
    """o = RMSNorm(q S) gain over the V numbers of a head, S = sum k v^T: no denominator. Qin et al. 2022, arXiv:2210.10340.

    The norm undoes any scale, so `scale` only matters beside `epsilon`; it is 1 unless given.

    Args:
      q, k, v and `options`: as `kernels.linear_attention`. gain: [HV, V], or None for one.
    """
    _check_gain("transnormer_attention", q, k, v, gain)
    o, state = linear_attention(*map(_roomy, (q, k, v)), **({"scale": 1.0} | options))
    return _normed(o, gain, epsilon).astype(v.dtype), state


def transnormer_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array | None,
    gain: jax.Array | None = None,
    *,
    epsilon: float = 1e-6,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """One token of `transnormer_attention`."""
    _check_gain("transnormer_attention_step", q, k, v, gain)
    o, state = linear_attention_step(*map(_roomy, (q, k, v)), state, scale=scale)
    return _normed(o, gain, epsilon).astype(v.dtype), state


def _prepared(function: str, q: Any, k: Any, v: Any, query_weight: Any, key_weight: Any) -> tuple[Any, tuple[jax.Array, ...]]:
    """The dtype of v, and Hedgehog's features of q and k, and v."""
    value_heads(function, q, k, v, step=function.endswith("_step"))
    dtype = v.dtype
    q, k, v = map(_roomy, (q, k, v))
    query, key = (_features(function, *x) for x in (("query_weight", q, query_weight), ("key_weight", k, key_weight)))
    return dtype, (query, key, v)


def _check_gain(function: str, q: Any, k: Any, v: Any, gain: Any) -> None:
    value_heads(function, q, k, v, step=function.endswith("_step"))
    wrong = [] if gain is None else _wrong_weight("gain", gain, {"[HV, V]": tuple(v.shape[-2:])})
    if wrong:
        raise refused(function, wrong)


def _wrong_weight(name: str, array: Any, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Sentences about what is wrong with an array that may have any of some shapes, each with the names of its sizes."""
    if not hasattr(array, "shape") or tuple(array.shape) not in shapes.values():
        expected = " or ".join(f"{names} = {list(shape)}" for names, shape in shapes.items())
        return [f"{name} is {_seen(array)}; expected an array {expected}"]
    return wrong_array(name, array, tuple(array.shape))


def _seen(x: Any) -> str:
    return f"of shape {list(x.shape)}" if hasattr(x, "shape") else f"a {type(x).__name__}"


def _roomy(x: jax.Array) -> jax.Array:
    """float16 as float32: features, their sums and outputs without a denominator leave the range of float16."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _with_ones(v: jax.Array, wanted: bool) -> jax.Array:
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1) if wanted else v


@jax.custom_jvp
def averages(sums: jax.Array) -> jax.Array:
    """Weighted sums [..., V + 1], of which the last column is the sum of the weights, as averages [..., V].

    Where that is zero, or so small that it is no normal number, so are the average and its derivatives. JAX's derivative of a
    division has its square, which is zero or infinite long before.
    """
    weight, live = _weight(sums)
    return jnp.where(live, sums[..., :-1] / weight, 0)


@averages.defjvp
def _averages_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (sums,), (change,) = primals, tangents
    weight, live = _weight(sums)
    average = averages(sums)
    return average, jnp.where(live, (change[..., :-1] - average * change[..., -1:]) / weight, 0)


def _weight(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last column [..., 1], one where it is no normal number, and where it is one."""
    weight = sums[..., -1:]
    live = jnp.abs(weight) >= jnp.finfo(weight.dtype).tiny
    return jnp.where(live, weight, 1), live


def _normed(o: jax.Array, gain: jax.Array | None, epsilon: float) -> jax.Array:
    wide = o.astype(jnp.promote_types(o.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (normed if gain is None else normed * jnp.broadcast_to(gain.astype(wide.dtype), normed.shape)).astype(o.dtype)
