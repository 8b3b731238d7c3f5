"""All nine ops as one `lax.scan` over tokens. In float64 it is the oracle; JAX differentiates through it to any order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels.arguments import Call, Tensors
from kernels.sequences import boundaries, owners
from kernels.varying import varying_alike


def token(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array | None, beta: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """One token: decay, then write, then read.

    Args:
      state: [B,HV,K,V]. q, k: [B,HV,K], q scaled. v: [B,HV,V].
      g: log decay [B,HV,K] or [B,HV,1], or None. beta: [B,HV] for the delta rule, None for plain writing of v.

    Returns:
      the new state and the output [B,HV,V].
    """
    if g is not None:
        state = jnp.exp(g)[..., None] * state
    if beta is not None:
        v = beta[..., None] * (v - _times(k, state))
    state = state + k[..., :, None] * v[..., None, :]
    return state, _times(q, state)


def _times(row: jax.Array, state: jax.Array) -> jax.Array:
    """row^T S, [B,HV,V], at full precision: left to themselves GPUs take TF32 operands and TPUs bfloat16 ones."""
    return jnp.einsum("bhk,bhkv->bhv", row, state, precision=lax.Precision.HIGHEST)


def per_token_gate(g: jax.Array | None, call: Call) -> jax.Array | None:
    """The log decay as [B,T,HV,1] or [B,T,HV,K]."""
    if g is None:
        return None
    g = g.astype(call.accumulator)
    if call.decay == "constant":
        return jnp.broadcast_to(g[None, None, :, None], (call.batch, call.length, call.value_heads, 1))
    return g[..., None] if call.decay == "scalar" else g


def initial_state(call: Call, tensors: Tensors) -> jax.Array:
    """[B or N,HV,K,V], zero unless given; in the dtype of sums."""
    if tensors.initial_state is not None:
        return tensors.initial_state.astype(call.accumulator)
    return varying_alike(jnp.zeros(call.state_shape, call.accumulator), like=tensors)


def run(call: Call, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    """The op, token after token. Returns o [B,T,HV,V] in the dtype of v, and the final state [B or N,HV,K,V]."""
    dtype = call.accumulator
    q = jnp.repeat(tensors.q.astype(dtype) * call.scale, call.group, axis=2)
    k = jnp.repeat(tensors.k.astype(dtype), call.group, axis=2)
    v, g = tensors.v.astype(dtype), per_token_gate(tensors.g, call)
    beta = None if tensors.beta is None else tensors.beta.astype(dtype)
    gates = (q, k, v, g, beta)
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), gates)
    initial = initial_state(call, tensors)
    if tensors.cu_seqlens is not None:
        return _packed(call, by_time, initial, tensors.cu_seqlens)
    reset = None if tensors.segment_ids is None else boundaries(tensors.segment_ids).T

    def advance(state: jax.Array, x: tuple) -> tuple[jax.Array, jax.Array]:
        inputs, new = x
        if new is not None:
            state = jnp.where(new[:, None, None, None], 0, state)
        return token(state, *inputs)

    final, o = lax.scan(advance, initial, (by_time, reset))
    return jnp.moveaxis(o, 0, 1).astype(call.dtype), final


def _packed(call: Call, by_time: tuple, initial: jax.Array, cu_seqlens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sequences one after the other in a single row: each begins from its own state and leaves its own."""

    def advance(carry: tuple[jax.Array, jax.Array], x: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        state, finals = carry
        inputs, sequence, first = x
        state = jnp.where(first, initial[sequence][None], state)
        state, o = token(state, *inputs)
        return (state, finals.at[sequence].set(state[0])), o

    start = (jnp.zeros_like(initial[:1]), initial)
    (_, finals), o = lax.scan(advance, start, (by_time, *owners(cu_seqlens, call.length)))
    return jnp.moveaxis(o, 0, 1).astype(call.dtype), finals
