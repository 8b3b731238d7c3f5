"""Linear attention that writes by the delta rule: what the state already says of a key is taken out before it is written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from models.mixers.gates import Bottleneck, HeadGate, StepDecay
from models.mixers.linear import LinearMixer, Written


class DeltaNet(LinearMixer):
    """`S <- S + beta k (v - k^T S)^T` with queries and keys of length 1 and beta = sigmoid(x W) (arXiv:2406.06484).

    With keys of length 1 the state is multiplied with I - beta k k^T, whose eigenvalues are 1 and 1 - beta. SiLU on queries,
    keys and values.
    """

    op = "delta_rule"
    activated = ("query", "key", "value")

    def __init__(self, option: Any, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        self.strength = HeadGate(model, self.value_heads, rngs=rngs)
        self.most = 2.0 if option.negative_eigenvalues else 1.0

    def write(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, shared: dict[str, Any]) -> Written:
        """Unit queries and keys, the decays of a subclass, and beta."""
        del shared
        beta = self.most * jax.nn.sigmoid(self.strength(x))
        return unit_length(q), unit_length(k), v, (*self.decays(x), beta)

    def decays(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """What comes before beta among the gates of the op."""
        del x
        return ()


class GatedDeltaNet(DeltaNet):
    """The delta rule on a state that first decays by e^g, g = -A softplus(x W + b), a number a head (arXiv:2412.06464).

    A starts uniform within `A_init_range`, as published [0, 16], the step log-uniform within `dt_init_range`, [0.001, 0.1].
    """

    op = "gated_delta_rule"

    def __init__(self, option: options.GatedDeltaNet, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        self.step_gate = HeadGate(model, self.value_heads, rngs=rngs)
        self.decay = StepDecay(option, self.value_heads, rngs=rngs)

    def decays(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """[B, T, value heads]."""
        return (self.decay(self.step_gate(x))[0],)


class KDA(DeltaNet):
    """The delta rule on a state whose every key channel first decays by its own e^g (Kimi Delta Attention, arXiv:2510.26692).

    g = -A softplus(x W1 W2 + b), A a number a head that starts uniform within `A_init_range`, b one a channel such that the
    step is log-uniform within `dt_init_range`. The output gate is low-rank too, with a sigmoid. Initial values as in the fla
    library.
    """

    op = "kda"
    gate_activation = "sigmoid"

    def __init__(self, option: options.KDA, model: options.Model, *, rngs: nnx.Rngs):
        super().__init__(option, model, rngs=rngs)
        rank = option.gate_rank or self.value_size
        self.step_gate = Bottleneck(model, rank, self.value_heads * self.key_size, bias=False, rngs=rngs)
        self.decay = StepDecay(option, self.value_heads, self.key_size, rngs=rngs)
        units = self.value_heads * self.value_size
        self.gate = Bottleneck(model, rank, units, bias=True, rngs=rngs) if option.gate else None

    def decays(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """[B, T, value heads, key size]."""
        logits = self.step_gate(x)
        return (self.decay(logits.reshape(*logits.shape[:2], self.value_heads, self.key_size))[0],)


def unit_length(x: jax.Array) -> jax.Array:
    """`x / sqrt(sum(x^2) + 1e-6)` over the last axis, in float32; the type is kept."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
