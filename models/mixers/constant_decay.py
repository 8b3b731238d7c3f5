"""Linear attention whose decay no token changes: none at all, RetNet's, TransNormerLLM's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernels
from kernels.feature_maps import averages
from models import options
from models.layers.parameter import parameter
from models.mixers.linear import LinearMixer, Written
from models.mixers.rotary import rotary_table, rotate


class FeatureMap(nnx.Module):
    """Hedgehog's learned map of one side, each head by itself (Zhang et al. 2024, arXiv:2402.04347).

    softmax([2 y, -2 y]) over the 2 K numbers, y = x W + b; W starts as the identity and b at zero. The factor 2 and the bias
    are those of the fla library, which has one map for all heads.
    """

    def __init__(self, heads: int, size: int, *, rngs: nnx.Rngs):
        eye = lambda key, shape, dtype: jnp.broadcast_to(jnp.eye(size, dtype=dtype), shape)  # noqa: E731
        axes = ("kv_heads", "head_size", "head_size")
        self.kernel = parameter(rngs, (heads, size, size), eye, role="factor", axes=axes)
        self.bias = parameter(rngs, (heads, size), nnx.initializers.zeros, role="vector", axes=axes[:2])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, heads, K] -> [B, T, heads, 2 K]."""
        return kernels.hedgehog(x, self.kernel[...], self.bias[...])


def elu1(x: jax.Array) -> jax.Array:
    """elu(x) + 1 in the dtype of x: x + 1 above 0, e^x below, where e^x - 1 + 1 would cancel: in bfloat16 to 0 from -6 on."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # The inner `where` keeps the exponential of a large number, and its gradient, out of the branch that is not taken.
    return jnp.where(wide > 0, wide + 1, jnp.exp(jnp.where(wide > 0, 0, wide))).astype(x.dtype)


FEATURES = {"identity": lambda x: x, "elu1": elu1, "relu": jax.nn.relu}


class LinearAttention(LinearMixer):
    """`o_t = phi(q_t) S_t / (phi(q_t) z_t)`, S and z the sums of phi(k) v^T and phi(k) (arXiv:2006.16236)."""

    op = "linear_attention"

    def __init__(self, option: options.LinearAttention, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        learned = option.feature_map == "hedgehog"
        self.query_features = FeatureMap(self.heads, self.key_size, rngs=rngs) if learned else None
        self.key_features = FeatureMap(self.heads, self.key_size, rngs=rngs) if learned else None

    @property
    def norm_over(self) -> str | None:
        """No norm unless asked for: the normaliser is one."""
        return "head" if self.option.output_norm else None

    def write(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, shared: dict[str, Any]) -> Written:
        """Features; a column of ones among the values sums the weights."""
        del x, shared
        if self.query_features is not None:
            q, k = self.query_features(q), self.key_features(k)
        else:
            q, k = FEATURES[self.option.feature_map](q), FEATURES[self.option.feature_map](k)
        if self.option.normalizer:
            v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)
        return q, k, v, ()

    def read(self, o: jax.Array, v: jax.Array) -> jax.Array:
        """Divide by the sum of the weights; where all of them are zero, so is the result."""
        del v
        return averages(o) if self.option.normalizer else o


class Retention(LinearMixer):
    """RetNet's multi-scale retention (arXiv:2307.08621).

    The rotation is the one of this framework's attention; the released code's frequencies differ a little
    (theta^(-j / (K/2 - 1))). The norm of each head has a gain, as in the fla library; the released code has none.
    """

    op = "retention"

    def prepare(self, length: int, segment_ids: jax.Array | None) -> dict[str, Any]:
        """Also the rotary table."""
        return super().prepare(length, segment_ids) | self._rotary(jnp.arange(length))

    def prepare_step(self, new: int, cache: Any, index: jax.Array, start: jax.Array) -> dict[str, Any]:
        """Also the rotary table. Only differences of positions count, so padding before a sequence does not."""
        return super().prepare_step(new, cache, index, start) | self._rotary(index + jnp.arange(new))

    def write(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, shared: dict[str, Any]) -> Written:
        """Rotate queries and keys."""
        del x
        return rotate(q, shared["rotary"]), rotate(k, shared["rotary"]), v, ()

    def constant_decay(self) -> np.ndarray:
        """log(1 - 2^(-5-h))."""
        return kernels.retention_decay(self.value_heads)

    def _rotary(self, positions: jax.Array) -> dict[str, Any]:
        return {"rotary": rotary_table(positions, self.key_size, self.option.rope_theta)}


class Lightning(LinearMixer):
    """The linear attention of TransNormerLLM (arXiv:2307.14995), as its released code has it but for LRPE, its learned phases.

    SiLU on queries and keys, an RMS norm without gain over all heads together, and a gate without activation.
    """

    op = "lightning_attention"
    activated = ("query", "key")
    norm_over = "all"
    norm_gain = False
    gate_activation = "identity"

    def constant_decay(self) -> np.ndarray:
        """Of this layer; not trained."""
        return kernels.lightning_decay(self.value_heads) * (1 - self.option.depth_fraction)
