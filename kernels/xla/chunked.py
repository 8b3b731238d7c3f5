"""The `xla` back-end: tokens into chunks, the chunked algebra, chunks into tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.arguments import Call, Tensors
from kernels.reference.recurrence import initial_state, per_token_gate
from kernels.tuning import tuned
from kernels.xla.additive import additive
from kernels.xla.chunks import Form, Layout, from_chunks, packed_chunks, runs_of, to_chunks, to_rows
from kernels.xla.delta import delta


def chunk_size(call: Call) -> int:
    """Tokens a chunk: what the call says, else what `kernels.tuning` has, but no more than the sequence has, rounded up."""
    return min(tuned(call, "xla").chunk_size, 1 << (call.length - 1).bit_length())


def run(call: Call, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    """The op in chunks. Returns o [B,T,HV,V] in the dtype of v, and the final state [B or N,HV,K,V]."""
    dtype, size = call.accumulator, chunk_size(call)
    q = jnp.repeat(tensors.q.astype(dtype) * call.scale, call.group, axis=2)
    k = jnp.repeat(tensors.k.astype(dtype), call.group, axis=2)
    v = tensors.v.astype(dtype)
    g = per_token_gate(tensors.g, call)
    beta = None if tensors.beta is None else tensors.beta.astype(dtype)[..., None]
    initial = initial_state(call, tensors)

    runs = packed = row = None
    if tensors.segment_ids is not None:
        runs = runs_of(tensors.segment_ids, size)
    inputs = (q, k, v, g, beta)
    if tensors.cu_seqlens is not None:
        packed, token, valid, row = packed_chunks(tensors.cu_seqlens, call.length, size)
        inputs = jax.tree.map(lambda x: to_rows(x, token, valid), inputs)
    q, k, v, g, beta = jax.tree.map(lambda x: to_chunks(x, size), inputs)
    layout = Layout(runs, packed, jnp.arange(q.shape[0]))
    form = Form(exact=call.delta or call.dtype != "bfloat16")
    if call.delta:
        o, final = delta(form, q, k, v, g, beta, initial, layout)
    else:
        o, final = additive(form, q, k, v, g, initial, layout)
    if row is not None:
        o = from_chunks(o, o.shape[0] * size)[:, row]
    return from_chunks(o, call.length).astype(call.dtype) if row is None else o.astype(call.dtype), final
