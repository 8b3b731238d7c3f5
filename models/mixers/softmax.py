"""Masked softmax attention: the computation alone, in three implementations that must agree.

Every implementation takes q [B, T, H, D], k and v [B, S, G, D] with H a multiple of G (query head h reads key head
h // (H / G)), and `mask` bool [B or 1, 1, T, S], True where a query may look. All return [B, T, H, D] in the type of q.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models.stack import runs_at_once
from strata import ConfigError

QUERY_BLOCK = 256
"""Fewest queries of a block in causal attention by XLA; blocks of 128 made a step slower (`benchmarks/step_speed.py`)."""

MOST_BLOCKS = 8
"""Most blocks of queries, so that the program does not grow with the sequence."""


def attention_mask(
    queries: jax.Array,
    keys: jax.Array,
    *,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Causal mask with optional documents and a sliding window.

    Args:
      queries: int32 [T] positions of the queries.
      keys: int32 [S] positions of the keys.
      query_segments: int32 [B, T], or None for one document.
      key_segments: int32 [B, S]; a query sees only keys of its own document.
      window: number of latest positions a query sees, its own included.

    Returns:
      bool [B or 1, 1, T, S].
    """
    distance = queries[:, None] - keys[None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask = mask[None, None]
    if query_segments is not None:
        mask = mask & (query_segments[:, None, :, None] == key_segments[:, None, None, :])
    return mask


def reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, causal: bool = False) -> jax.Array:
    """The definition, in float32 throughout; slow, and what the others are tested against."""
    del causal  # in the mask already
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k, precision="highest") * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest").astype(q.dtype)


def xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, causal: bool = False) -> jax.Array:
    """Products in the type of q with float32 accumulation, softmax in float32.

    With `causal` (positions of queries and keys are the same 0 to T - 1) blocks of queries meet only the keys up to their
    own end, so that most of the masked half is never computed.
    """
    groups, length = q.shape[2] // k.shape[2], q.shape[1]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    if groups > 1:
        k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
    if not causal:
        return jnp.swapaxes(_weighted(q, k, v, mask), 1, 2)
    block = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        parts.append(_weighted(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask[:, :, start:end, :end]))
    mixed = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    return jnp.swapaxes(mixed, 1, 2)


@jax.custom_vjp
def _weighted(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T) v over [B, H, T, D], with the derivative written out: it keeps one array of weights, no more.

    Forward-mode differentiation (`jax.jvp`) through it is an error; `reference` has both modes.
    """
    return _weighted_forward(q, k, v, mask)[0]


def _weighted_forward(q, k, v, mask):
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    exponent = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = (exponent / jnp.sum(exponent, axis=-1, keepdims=True)).astype(q.dtype)
    mixed = jnp.einsum("bhts,bhsd->bhtd", weights, v)
    return mixed, (q, k, v, weights, mixed)


def _weighted_backward(residual, d_mixed):
    q, k, v, weights, mixed = residual
    d_weights = jnp.einsum("bhtd,bhsd->bhts", d_mixed, v, preferred_element_type=jnp.float32)
    centre = jnp.sum(d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (weights * (d_weights - centre)).astype(q.dtype)
    d_k = jnp.einsum("bhts,bhtd->bhsd", d_scores, q)
    d_v = jnp.einsum("bhts,bhtd->bhsd", weights, d_mixed)
    return jnp.einsum("bhts,bhsd->bhtd", d_scores, k), d_k, d_v, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, causal: bool = False) -> jax.Array:
    """cuDNN's fused kernel (never materialises the scores). `causal` lets it skip what the mask would hide anyway.

    Layers that run at once (`models.stack.at_once`) are more heads to it, since all have one mask.
    """

    def fused(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")

    if not runs_at_once():
        return fused(q, k, v, mask)
    # JAX's own rule under `vmap` makes the layers more sequences, of q, k and v only: the mask keeps its batch, which cuDNN
    # reads past its end. A function with a rule of its own has no derivative outside `vmap`, and so serves only here.
    layered = jax.custom_batching.custom_vmap(fused)

    @layered.def_vmap
    def layers_as_heads(layers: int, batched: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        *qkv, mask = arrays
        if batched[3]:
            raise AssertionError("layers that run at once have one mask")
        qkv = [x if own else jnp.broadcast_to(x[None], (layers, *x.shape)) for x, own in zip(qkv, batched[:3], strict=True)]
        groups = qkv[1].shape[3]  # outermost, so that every query head still reads its own key head
        mixed = fused(*(_layers_as_heads(x, groups) for x in qkv), mask)
        mixed = mixed.reshape(*mixed.shape[:2], groups, layers, -1, mixed.shape[3])
        return jnp.moveaxis(mixed, 3, 0).reshape(qkv[0].shape), True

    return layered(q, k, v, mask)


def _layers_as_heads(x: jax.Array, groups: int) -> jax.Array:
    """[layers, B, T, groups * n, D] -> [B, T, groups * layers * n, D]."""
    layers, batch, length, heads, size = x.shape
    grouped = jnp.moveaxis(x.reshape(layers, batch, length, groups, heads // groups, size), 0, 3)
    return grouped.reshape(batch, length, layers * heads, size)


IMPLEMENTATIONS = {"reference": reference, "xla": xla, "cudnn": cudnn}


def why_not_cudnn(dtype: jnp.dtype, head_size: int, length: int | None = None) -> str | None:
    """The reason why cuDNN attention cannot serve here, or None if it can."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return f"the device is {device.device_kind}, not an NVIDIA GPU"
    capability = float(device.compute_capability)
    if capability < 8:
        return f"compute capability {capability:g} is below 8.0 (Ampere)"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, and train.precision gives {jnp.dtype(dtype).name}"
    most = 256 if capability >= 9 else 128
    if head_size % 8 or head_size > most:
        return f"head size {head_size} is not a multiple of 8 up to {most}"
    if length is not None and length % 2:
        return f"with a mask it trains on even lengths only, not {length}"
    return None


NO_SECOND_DERIVATIVE = "it has no second derivative, which correction = 'exact' takes"


def choose(name: str, dtype: jnp.dtype, head_size: int, length: int | None = None, *, twice: bool = False) -> tuple[str, str]:
    """The implementation to use and why.

    Args:
      name: as asked for.
      dtype: compute type.
      head_size: units of a head.
      length: of the sequence, where it is known.
      twice: a second derivative is taken, as for products with a Jacobian by reverse mode (`corrections.exact`).

    Raises:
      ConfigError: `cudnn` was asked for by name and cannot serve; nothing is replaced in silence.
    """
    reason = why_not_cudnn(dtype, head_size, length) or (NO_SECOND_DERIVATIVE if twice else None)
    if name == "cudnn" and reason:
        raise ConfigError(f"model.mixer.implementation = 'cudnn' cannot serve: {reason}; choose auto or xla")
    if name != "auto":
        return name, "asked for by name"
    return ("xla", f"cuDNN cannot serve: {reason}") if reason else ("cudnn", "fused, honours segment masks")
