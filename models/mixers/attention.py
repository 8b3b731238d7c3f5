"""Causal softmax attention with rotary positions, grouped key-value heads and a key-value cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from models.layers.linear import projection
from models.layers.norm import RMSNorm
from models.mixers import softmax
from models.mixers.rotary import rotary_table, rotate


class Attention(nnx.Module):
    """Multi-head attention; what all layers share (positions, mask) is prepared once a forward pass."""

    rewinds = True  # positions of a cache can be written again: those from the index on are never read

    def __init__(self, option: options.Attention, model: options.Model, *, rngs: nnx.Rngs):
        heads, keys, size = model.query_heads, model.key_heads, model.head_units
        self.heads, self.key_heads, self.head_size = heads, keys, size
        self.theta, self.window, self.choice = option.rope_theta, option.window, option.implementation
        self.twice = False
        axes = {"query": ("embed", "heads"), "out": ("heads", "embed")}
        for site, shape in option.projections(model).items():
            setattr(self, site, projection(model, site, axes.get(site, ("embed", "kv_heads")), shape, rngs=rngs))
        qk = options.RMSNorm(epsilon=option.qk_norm_epsilon)
        self.query_norm = RMSNorm(qk, size, axis="head_size", rngs=rngs) if option.qk_norm else None
        self.key_norm = RMSNorm(qk, size, axis="head_size", rngs=rngs) if option.qk_norm else None

    @staticmethod
    def explain(option: options.Attention, model: options.Model, dtype: jnp.dtype, length: int, batch: int = 1) -> str:
        """Which implementation serves here, and why. Raises `ConfigError` if the one that is asked for cannot."""
        del batch
        name, why = softmax.choose(option.implementation, dtype, model.head_units, length)
        said = f"attention: {name} ({why})"
        if getattr(model.depth, "correction", None) == "exact":
            other, why = softmax.choose(option.implementation, dtype, model.head_units, length, twice=True)
            said += f"; for Jacobians {other} ({why})" if other != name else ""
        return said

    def differentiate_twice(self) -> None:
        """From here on take an implementation that has a second derivative, or refuse the one that was asked for."""
        self.twice = True

    def prepare(self, length: int, segment_ids: jax.Array | None) -> dict[str, Any]:
        """What every layer shares: rotary table and mask for positions 0 to length - 1."""
        positions = jnp.arange(length)
        mask = softmax.attention_mask(
            positions, positions, query_segments=segment_ids, key_segments=segment_ids, window=self.window
        )
        return {"rotary": rotary_table(positions, self.head_size, self.theta), "mask": mask}

    def __call__(self, x: jax.Array, shared: dict[str, Any]) -> jax.Array:
        """[B, T, width] -> [B, T, width]."""
        q, k, v = self._project(x, shared["rotary"])
        return self._attend(q, k, v, shared["mask"])

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Keys and values of one layer, [batch, length, key heads, head size] each."""
        shape = (batch, length, self.key_heads, self.head_size)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    def prepare_step(self, new: int, cache: dict[str, jax.Array], index: jax.Array, start: jax.Array) -> dict[str, Any]:
        """As `prepare`, for `new` tokens at positions index, index + 1, ... of a cache.

        Args:
          new: number of tokens in this step.
          cache: of all layers of this kind, [layers, B, length, key heads, head size].
          index: int32 [], tokens already in the cache.
          start: int32 [B], first position that belongs to each sequence; earlier ones are padding and never seen.
        """
        positions = index + jnp.arange(new)
        slots = jnp.arange(cache["key"].shape[2])
        mask = softmax.attention_mask(positions, slots, window=self.window)
        # A padding query sees itself, so that its softmax is defined; nothing reads its output.
        real = (slots[None, :] >= start[:, None])[:, None, None, :] | (positions[:, None] == slots[None, :])[None, None]
        return {"rotary": rotary_table(positions, self.head_size, self.theta), "mask": mask & real, "index": index}

    def step(self, x: jax.Array, shared: dict[str, Any], cache: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, n, width] and this layer's cache -> [B, n, width] and the cache with n more positions."""
        q, k, v = self._project(x, shared["rotary"])
        cache = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), shared["index"], axis=1)
            for name, x in (("key", k), ("value", v))
        }
        return self._attend(q, cache["key"], cache["value"], shared["mask"], decode=True), cache

    def _project(self, x: jax.Array, rotary: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, length, _ = x.shape
        q = self.query(x).reshape(batch, length, self.heads, self.head_size)
        k = self.key(x).reshape(batch, length, self.key_heads, self.head_size)
        v = self.value(x).reshape(batch, length, self.key_heads, self.head_size)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return rotate(q, rotary), rotate(k, rotary), v

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, decode: bool = False) -> jax.Array:
        length = None if decode else q.shape[1]
        name = softmax.choose(self.choice, q.dtype, self.head_size, length, twice=self.twice and not decode)[0]
        if decode and name == "cudnn":
            name = "xla"  # a decode step has a handful of queries against a cache: a fused kernel gains nothing there
        mixed = softmax.IMPLEMENTATIONS[name](q, k, v, mask, causal=not decode)
        return self.out(mixed.reshape(q.shape[0], q.shape[1], -1))
