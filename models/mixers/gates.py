"""What controls a linear-attention mixer beside queries, keys and values: decays, write strengths, narrow output gates.

Their matrices are plain, whatever `model.linear` says: a low-rank branch would not fit beside a matrix [width, heads], and
beside a bottleneck it would add nothing new. They have the role `factor`, so that Muon and what reads spectra of matrices
leave them to the rule of the rest: a matrix with one column a head has no spectrum to speak of. (The papers trained them
with AdamW, but for KDA, whose Muon as far as known took every matrix.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from models.layers.linear import normal, product
from models.layers.parameter import parameter


class HeadGate(nnx.Module):
    """Numbers for each head, linear in the input: `x @ kernel`."""

    def __init__(self, model: options.Model, heads: int, *, rngs: nnx.Rngs):
        self.kernel = parameter(rngs, (model.width, heads), normal(_std(model)), role="factor", axes=("embed", "heads"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, width] -> float32 [B, T, heads]."""
        return product(x, self.kernel[...].astype(x.dtype)).astype(jnp.float32)


class Bottleneck(nnx.Module):
    """Numbers for each channel through few units: `(x @ narrow) @ wide (+ bias)`. Both keep the variance at the start."""

    def __init__(self, model: options.Model, rank: int, units: int, *, bias: bool, rngs: nnx.Rngs):
        narrow, wide = normal(_std(model)), normal(model.init_scale * rank**-0.5)
        self.narrow = parameter(rngs, (model.width, rank), narrow, role="factor", axes=("embed", "rank"))
        self.wide = parameter(rngs, (rank, units), wide, role="factor", axes=("rank", "heads"))
        self.bias = parameter(rngs, (units,), nnx.initializers.zeros, role="vector", axes=("heads",)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, width] -> float32 [B, T, units]."""
        inner = product(x, self.narrow[...].astype(x.dtype))
        out = product(inner, self.wide[...].astype(x.dtype)).astype(jnp.float32)
        return out if self.bias is None else out + self.bias[...][None, None]


class StepDecay(nnx.Module):
    """Mamba's decay: `g = -exp(A_log) dt`, `dt = softplus(logits + dt_bias)` (Gu and Dao 2023, arXiv:2312.00752).

    At the start exp(A_log) is uniform within `A_init_range`, and dt without logits log-uniform within `dt_init_range`: as
    published a token is kept for between about one step and a thousand.
    """

    def __init__(self, option: options.StepDecayMixer, heads: int, channels: int | None = None, *, rngs: nnx.Rngs):
        """One `A_log` a head; one `dt_bias` a head, or with `channels` one a head and channel."""
        rate, step = _log_uniform_rate(option.A_init_range), _inverse_softplus(option.dt_init_range)
        self.A_log = parameter(rngs, (heads,), rate, role="scalar", axes=("heads",))
        if channels is None:
            self.dt_bias = parameter(rngs, (heads,), step, role="scalar", axes=("heads",))
        else:
            self.dt_bias = parameter(rngs, (heads, channels), step, role="vector", axes=("heads", "head_size"))

    def __call__(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 [B, T, heads] or [B, T, heads, channels] -> g, at most 0, and dt, both of that shape."""
        dt = jax.nn.softplus(logits + self.dt_bias[...][None, None])
        rate = jnp.exp(self.A_log[...])
        return -rate.reshape(1, 1, -1, *(1,) * (logits.ndim - 3)) * dt, dt


def _std(model: options.Model) -> float:
    """As inner projections; without the placement's gain, which is for what is written to the stream."""
    return model.init_scale * model.width**-0.5


def _log_uniform_rate(rates: Sequence[float]) -> nnx.Initializer:
    """The logarithm of a uniform rate; one of zero would never move, so 1e-4 is the least."""
    return lambda key, shape, dtype: jnp.log(jnp.maximum(jax.random.uniform(key, shape, dtype, *rates), 1e-4))


def _inverse_softplus(steps: Sequence[float]) -> nnx.Initializer:
    """b with softplus(b) log-uniform within `steps`, at least 1e-4."""
    low, high = (math.log(step) for step in steps)

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), 1e-4)
        return dt + jnp.log(-jnp.expm1(-dt))

    return draw
