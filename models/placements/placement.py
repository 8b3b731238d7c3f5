"""What every placement is: a way to join two sub-layers to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from models.layers.norm import make_norm

Sublayer = Callable[[jax.Array], jax.Array]


class Context(NamedTuple):
    """What a block reads beside the hidden state."""

    shared: Any  # what its mixer prepared for all layers of this kind
    layer: jax.Array  # int32 [], which executed layer this is
    embedding: jax.Array  # [B, T, width], the embedded tokens


class Placement(nnx.Module):
    """Base of the placements whose sub-layers add to the stream.

    A block is `ffn_sublayer` of `mixer_sublayer`, and a sub-layer is a residual plus an update. Fused execution sums the
    updates of several layers over the mean of their residuals, and corrections along depth ask for `transports`.
    """

    feeds = ("mixer", "ffn")
    """What reads the norm of the mixer and that of the feed-forward layer: before each, so the sub-layer itself."""

    def __init__(self, option: Any, model: options.Model, *, rngs: nnx.Rngs):
        del option
        self.mixer_norm = make_norm(model, self.feeds[0], rngs=rngs)
        self.ffn_norm = make_norm(model, self.feeds[1], rngs=rngs)

    def halves(self, h: jax.Array, mix: Sublayer, ffn: Sublayer, context: Context) -> tuple[jax.Array, jax.Array]:
        """The states after the mixer and after the feed-forward layer, of the shape of `h`."""
        h = self.enter(h, context)
        middle = self.mixer_residual(h) + self.mixer_update(h, mix, context)
        return middle, self.ffn_residual(middle) + self.ffn_update(middle, ffn, context)

    def enter(self, h: jax.Array, context: Context) -> jax.Array:
        """What both branch and residual of the mixer read."""
        del context
        return h

    def mixer_residual(self, h: jax.Array) -> jax.Array:
        """What is kept of the state besides the mixer's update."""
        return h

    def ffn_residual(self, h: jax.Array) -> jax.Array:
        """What is kept of the state besides the feed-forward layer's update."""
        return h

    def mixer_update(self, h: jax.Array, mix: Sublayer, context: Context) -> jax.Array:
        """What the mixer adds."""
        del context
        return mix(self.mixer_norm(h))

    def ffn_update(self, h: jax.Array, ffn: Sublayer, context: Context) -> jax.Array:
        """What the feed-forward layer adds."""
        del context
        return ffn(self.ffn_norm(h))

    def transports(self, h: jax.Array, middle: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """What carries the state past each sub-layer, d middle / d h and d out / d middle with the branches held.

        Numbers, or matrices over streams: [S, S] or [B, T, S, S].
        """
        del h, middle, context
        return jnp.ones((), jnp.float32), jnp.ones((), jnp.float32)


def enter_stream(model: options.Model, embedded: jax.Array) -> jax.Array:
    """[B, T, width] -> the state before the first block, a copy in every stream."""
    streams = model.placement.streams
    return embedded if streams is None else jnp.repeat(embedded[:, :, None], streams, axis=2)


def leave_stream(model: options.Model, h: jax.Array) -> jax.Array:
    """The state after the last block -> [B, T, width], the sum of the streams."""
    return h if model.placement.streams is None else jnp.sum(h, axis=2)
