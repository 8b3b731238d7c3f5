"""One decode token of every op: `<op>_step(q, k, v, *gates, state, *, scale) -> (o, state)`.

q, k [B,H,K]; v [B,HV,V]; g [B,HV] or [B,HV,K]; beta [B,HV]; state [B,HV,K,V] as the op's final state, or None for the empty
one. Returns o [B,HV,V] in the dtype of v and the state after the token. Donate the state to `jax.jit` and it is updated in
place. Equal to the op itself at T = 1; a step reads and writes the state once, so it costs memory traffic and nothing else.

Raises `strata.ConfigError` when shapes or dtypes do not fit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import decays, ops
from kernels.arguments import Tensors, checked, value_heads
from kernels.reference.recurrence import per_token_gate, token


def linear_attention_step(
    q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array | None, *, scale: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of `kernels.linear_attention`."""
    return _step("linear_attention", q, k, v, None, None, state, scale)


def retention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array | None,
    *,
    decay: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `kernels.retention`, with the same `decay` [HV]."""
    heads = value_heads("retention_step", q, k, v, step=True)
    g = decays.retention_decay(heads) if decay is None else decay
    return _step("retention", q, k, v, g, None, state, scale)


def lightning_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array | None,
    *,
    layer: int = 0,
    layers: int = 1,
    decay: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `kernels.lightning_attention`, with the same `layer` and `layers`, or `decay` [HV]."""
    heads = value_heads("lightning_attention_step", q, k, v, step=True)
    g = decays.lightning_decay(heads, layer, layers) if decay is None else decay
    return _step("lightning_attention", q, k, v, g, None, state, scale)


def simple_gla_step(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, state: jax.Array | None, *, scale: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of `kernels.simple_gla`."""
    return _step("simple_gla", q, k, v, g, None, state, scale)


def gla_step(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, state: jax.Array | None, *, scale: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of `kernels.gla`."""
    return _step("gla", q, k, v, g, None, state, scale)


def delta_rule_step(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, state: jax.Array | None, *, scale: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of `kernels.delta_rule`."""
    return _step("delta_rule", q, k, v, None, beta, state, scale)


def gated_delta_rule_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array | None,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `kernels.gated_delta_rule`."""
    return _step("gated_delta_rule", q, k, v, g, beta, state, scale)


def kda_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array | None,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `kernels.kda`."""
    return _step("kda", q, k, v, g, beta, state, scale)


def lightnet_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One token of `kernels.lightnet`; the state is its pair (S [B,HV,K,V], z [B,H,K])."""
    ops.lightnet_call(Tensors(q, k, v, None, None, state), scale, True, None, None, step=True)
    q, k, v = (jnp.asarray(x)[:, None] for x in (q, k, v))
    with jax.named_scope("lightnet_step"):
        o, final = ops.lightnet(q, k, v, scale=scale, initial_state=state, output_final_state=True, backend="reference")
    return o[:, 0], final


def _step(
    op: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    beta: jax.Array | None,
    state: jax.Array | None,
    scale: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The step is the op's `token`."""
    decay, delta = ops.GATES[op]
    tensors = Tensors(q, k, v, g, beta, state)
    options = {"scale": scale, "output_final_state": True, "chunk_size": None, "interpret": None}
    call = checked(op, tensors, decay=decay, delta=delta, step=True, **options)
    dtype = call.accumulator
    q, k, v, g, beta, state = (None if x is None else jnp.asarray(x) for x in tensors[:6])
    gate = per_token_gate(g if g is None or decay == "constant" else g[:, None], call)
    state = jnp.zeros(call.state_shape, dtype) if state is None else state.astype(dtype)
    with jax.named_scope(f"{op}_step"):
        state, o = token(
            state,
            jnp.repeat(q.astype(dtype) * call.scale, call.group, axis=1),
            jnp.repeat(k.astype(dtype), call.group, axis=1),
            v.astype(dtype),
            None if gate is None else gate[:, 0],
            None if beta is None else beta.astype(dtype),
        )
    return o.astype(call.dtype), state
