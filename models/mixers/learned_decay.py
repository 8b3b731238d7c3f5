"""Linear attention with a decay that each token sets: Mamba-2's, GLA's, LightNet's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from models.layers.parameter import parameter
from models.mixers.gates import Bottleneck, HeadGate, StepDecay
from models.mixers.linear import LinearMixer, Written


class SimpleGLA(LinearMixer):
    """The core of Mamba-2: `S <- e^g S + k (dt v)^T`, `o = q S + D v`, g = -A dt, dt = softplus(x W + b) (arXiv:2405.21060).

    q, k, v are the paper's C, B and X. A starts uniform within `A_init_range`, dt log-uniform within `dt_init_range`, D at 1.
    """

    op = "simple_gla"
    activated = ("query", "key", "value")
    convolution_biased = True
    norm_over = "all"
    gate_first = True

    def __init__(self, option: options.SimpleGLA, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        self.step_gate = HeadGate(model, self.value_heads, rngs=rngs)
        self.decay = StepDecay(option, self.value_heads, rngs=rngs)
        ones = nnx.initializers.ones
        self.skip = parameter(rngs, (self.value_heads,), ones, role="scalar", axes=("heads",)) if option.skip else None

    def write(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, shared: dict[str, Any]) -> Written:
        """The longer a step, the more of the state decays and the more is written."""
        del shared
        g, dt = self.decay(self.step_gate(x))
        return q, k, (v.astype(jnp.float32) * dt[..., None]).astype(v.dtype), (g,)

    def read(self, o: jax.Array, v: jax.Array) -> jax.Array:
        """Add the values themselves."""
        if self.skip is None:
            return o
        return o + (self.skip[...][None, None, :, None] * v.astype(jnp.float32)).astype(o.dtype)

    def settings(self) -> dict[str, Any]:
        """State-space models do not scale their queries."""
        return {"scale": 1.0}


class GLA(LinearMixer):
    """`S <- Diag(e^g) S + k v^T`, g = log sigmoid(x W1 W2 + b) / tau for every key channel (arXiv:2312.06635)."""

    op = "gla"

    def __init__(self, option: options.GLA, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        self.decay = Bottleneck(model, option.gate_rank, self.value_heads * self.key_size, bias=True, rngs=rngs)

    def write(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, shared: dict[str, Any]) -> Written:
        """The decay of every channel, kept near 1 by tau."""
        del shared
        logits = self.decay(x).reshape(*v.shape[:3], self.key_size)
        return q, k, v, (jax.nn.log_sigmoid(logits) / self.option.gate_normalizer,)


class LightNet(LinearMixer):
    """`S_t = sum_{s<=t} e^{k_s} v_s^T / sum_{s<=t} e^{k_s}` for every key channel (arXiv:2405.21022).

    SiLU on queries only, and none in convolutions; a low-rank SiLU gate after an RMS norm over all heads together, as in the
    fla library. The state holds an average and the logarithm of its weight.
    """

    op = "lightnet"
    activated = ("query",)
    convolution_activated = False
    empty_key = -1e30  # weighs nothing beside any other key, and is finite, unlike its difference to minus infinity
    norm_over = "all"

    def __init__(self, option: options.LightNet, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        units, rank = self.value_heads * self.value_size, option.gate_rank or self.value_size
        self.gate = Bottleneck(model, rank, units, bias=False, rngs=rngs) if option.gate else None

    def empty_state(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """An average of zero with no weight."""
        return super().empty_state(batch), jnp.full((batch, self.heads, self.key_size), -jnp.inf, jnp.float32)
