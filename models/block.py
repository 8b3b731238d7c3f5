"""A block: one mixer and one feed-forward layer around the residual stream, joined by a norm placement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from models import options
from strata import implementation

Sublayer = Callable[[jax.Array], jax.Array]


class PreNorm(nnx.Module):
    """`h + mix(norm(h))`, then `h + ffn(norm(h))` (arXiv:2002.04745)."""

    def __init__(self, option: options.PreNorm, model: options.Model, *, rngs: nnx.Rngs):
        del option
        norm = implementation(model.norm)
        self.mixer_norm = norm(model.norm, model.width, rngs=rngs)
        self.ffn_norm = norm(model.norm, model.width, rngs=rngs)

    def __call__(self, h: jax.Array, mix: Sublayer, ffn: Sublayer) -> jax.Array:
        """[B, T, width] -> [B, T, width]."""
        h = h + mix(self.mixer_norm(h))
        return h + ffn(self.ffn_norm(h))


class Block(nnx.Module):
    """A function of the hidden state. `shared` is what the mixer prepared once for all layers."""

    def __init__(self, model: options.Model, *, rngs: nnx.Rngs):
        self.placement = implementation(model.placement)(model.placement, model, rngs=rngs)
        self.mixer = implementation(model.mixer)(model.mixer, model, rngs=rngs)
        self.ffn = implementation(model.ffn)(model.ffn, model, rngs=rngs)

    def __call__(self, h: jax.Array, shared: Any) -> jax.Array:
        """[B, T, width] -> [B, T, width]."""
        return self.placement(h, lambda x: self.mixer(x, shared), self.ffn)

    def step(self, h: jax.Array, shared: Any, cache: Any) -> tuple[jax.Array, Any]:
        """[B, n, width] and this layer's cache -> the same, n tokens later."""
        updated = []

        def mix(x: jax.Array) -> jax.Array:
            out, new = self.mixer.step(x, shared, cache)
            updated.append(new)
            return out

        return self.placement(h, mix, self.ffn), updated[0]
