"""Norm placements of one residual stream (Li et al. 2024, arXiv:2412.13795, compares most of them)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from models.layers.norm import make_norm
from models.placements.placement import Context, Placement, Sublayer


class PreNorm(Placement):
    """`h + mix(norm(h))`, then `h + ffn(norm(h))` (arXiv:2002.04745)."""


class PostNorm(Placement):
    """`norm(h + mix(h))`, then `norm(h + ffn(h))` (arXiv:1706.03762)."""

    residual = 1.0
    feeds = ("ffn", "mixer")  # the norm after the feed-forward layer is what the next layer's mixer reads

    def halves(self, h: jax.Array, mix: Sublayer, ffn: Sublayer, context: Context) -> tuple[jax.Array, jax.Array]:
        """The states after the mixer and after the feed-forward layer, each normalised."""
        del context
        middle = self.mixer_norm(self.residual * h + mix(h))
        return middle, self.ffn_norm(self.residual * middle + ffn(middle))


class DeepNorm(PostNorm):
    """`norm(a h + f(h))` with a = (2 L)^(1/4) over L executed layers (arXiv:2203.00555)."""

    def __init__(self, option: options.DeepNorm, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        self.residual = (2 * model.layers) ** 0.25


class Sandwich(Placement):
    """`h + norm(mix(norm(h)))`, then the same around the feed-forward layer (arXiv:2105.13290, arXiv:2502.02732)."""

    def __init__(self, option: Any, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        self.mixer_out_norm = make_norm(model, "mixer_out", rngs=rngs)
        self.ffn_out_norm = make_norm(model, "ffn_out", rngs=rngs)

    def mixer_update(self, h: jax.Array, mix: Sublayer, context: Context) -> jax.Array:
        """The normalised result of the mixer."""
        return self.mixer_out_norm(super().mixer_update(h, mix, context))

    def ffn_update(self, h: jax.Array, ffn: Sublayer, context: Context) -> jax.Array:
        """The normalised result of the feed-forward layer."""
        return self.ffn_out_norm(super().ffn_update(h, ffn, context))


class LayerNormScaling(Placement):
    """`h + f(norm(h) / sqrt(l))`, l the number of the executed layer from 1 (arXiv:2502.05795)."""

    def mixer_update(self, h: jax.Array, mix: Sublayer, context: Context) -> jax.Array:
        """The mixer of the scaled norm."""
        return mix(_scaled(self.mixer_norm(h), context))

    def ffn_update(self, h: jax.Array, ffn: Sublayer, context: Context) -> jax.Array:
        """The feed-forward layer of the scaled norm."""
        return ffn(_scaled(self.ffn_norm(h), context))


def _scaled(x: jax.Array, context: Context) -> jax.Array:
    return (x * jax.lax.rsqrt(context.layer.astype(jnp.float32) + 1)).astype(x.dtype)


class Parallel(Placement):
    """`h + mix(x) + ffn(x)` with x = norm(h): both sub-layers read one norm."""

    def __init__(self, option: options.Parallel, model: options.Model, *, rngs: nnx.Rngs):
        del option
        self.norm = make_norm(model, "mixer", rngs=rngs)

    def halves(self, h: jax.Array, mix: Sublayer, ffn: Sublayer, context: Context) -> tuple[jax.Array, jax.Array]:
        """The states with the mixer's update alone, and with both."""
        del context
        x = self.norm(h)
        middle = h + mix(x)
        return middle, middle + ffn(x)

    def mixer_update(self, h: jax.Array, mix: Sublayer, context: Context) -> jax.Array:
        """What the mixer adds."""
        del context
        return mix(self.norm(h))


class NoNorm(Placement):
    """`h + mix(h)`, then `h + ffn(h)`."""

    def __init__(self, option: options.NoNorm, model: options.Model, *, rngs: nnx.Rngs):
        del option, model, rngs

    def mixer_update(self, h: jax.Array, mix: Sublayer, context: Context) -> jax.Array:
        """What the mixer adds."""
        del context
        return mix(h)

    def ffn_update(self, h: jax.Array, ffn: Sublayer, context: Context) -> jax.Array:
        """What the feed-forward layer adds."""
        del context
        return ffn(h)
