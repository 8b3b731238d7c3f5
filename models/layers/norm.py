"""Normalisations over the last axis. Statistics are float32; the result has the type of the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from models.layers.parameter import parameter
from strata import implementation


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x**2) + epsilon) * scale` (arXiv:1910.07467)."""

    def __init__(self, option: options.RMSNorm, size: int, *, axis: str = "embed", rngs: nnx.Rngs):
        self.epsilon = option.epsilon
        self.scale = parameter(rngs, (size,), nnx.initializers.ones, role="vector", axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size]."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * _row(self.scale, x.ndim)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + epsilon) * scale (+ bias)` (arXiv:1607.06450)."""

    def __init__(self, option: options.LayerNorm, size: int, *, axis: str = "embed", rngs: nnx.Rngs):
        self.epsilon = option.epsilon
        self.scale = parameter(rngs, (size,), nnx.initializers.ones, role="vector", axes=(axis,))
        self.bias = parameter(rngs, (size,), nnx.initializers.zeros, role="vector", axes=(axis,)) if option.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size]."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        out = centred * inverse * _row(self.scale, x.ndim)
        if self.bias is not None:
            out = out + _row(self.bias, x.ndim)
        return out.astype(x.dtype)


class DyT(nnx.Module):
    """`scale * tanh(alpha * x) (+ bias)`, alpha one number; elementwise, without statistics (arXiv:2503.10622)."""

    def __init__(self, option: options.DyT, size: int, *, axis: str = "embed", rngs: nnx.Rngs):
        self.alpha = parameter(rngs, (), nnx.initializers.constant(option.alpha), role="scalar", axes=())
        self.scale = parameter(rngs, (size,), nnx.initializers.ones, role="vector", axes=(axis,))
        self.bias = parameter(rngs, (size,), nnx.initializers.zeros, role="vector", axes=(axis,)) if option.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> [..., size]."""
        out = jnp.tanh(self.alpha[...] * x.astype(jnp.float32)) * _row(self.scale, x.ndim)
        if self.bias is not None:
            out = out + _row(self.bias, x.ndim)
        return out.astype(x.dtype)


def make_norm(model: options.Model, site: str, *, rngs: nnx.Rngs) -> nnx.Module:
    """The norm that a config chooses, over the width; `site` is what reads it: `"mixer"`, `"ffn"`, or another place."""
    option = model.norm.for_site(site) if hasattr(model.norm, "for_site") else model.norm
    return implementation(option)(option, model.width, axis="embed", rngs=rngs)


def _row(vector: nnx.Param, ndim: int) -> jax.Array:
    """A vector shaped for rank-`ndim` broadcasting, so that rank promotion can stay an error."""
    return vector[...].reshape((1,) * (ndim - 1) + (-1,))
