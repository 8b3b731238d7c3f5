"""The `xla` back-end: tokens into chunks, the chunked algebra, chunks into tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels.arguments import Call, Tensors
from kernels.reference.recurrence import initial_state, per_token_gate
from kernels.tuning import tuned
from kernels.xla.additive import additive
from kernels.xla.chunks import Form, Layout, from_chunks, packed_chunks, runs_of, to_chunks, to_rows
from kernels.xla.decay import Runs
from kernels.xla.delta import delta
from kernels.xla.limits import spans_of


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

    spans = spans_of(call, size)
    count = -(-call.length // (size * spans)) * spans
    runs = packed = row = None
    inputs = (q, k, v, g, beta) if call.delta else (q, k, v, g)
    if tensors.segment_ids is not None:
        runs = runs_of(tensors.segment_ids, size, count)
    if tensors.cu_seqlens is not None:
        packed, token, valid, row = packed_chunks(tensors.cu_seqlens, call.length, size)
        inputs = jax.tree.map(lambda x: to_rows(x, token, valid), inputs)
        count = packed.sequence.shape[0]
    inputs = jax.tree.map(lambda x: to_chunks(x, size, count), inputs)
    form = Form(exact=call.delta or call.dtype != "bfloat16")
    algebra = functools.partial(delta if call.delta else additive, form)
    if spans == 1:
        o, final = algebra(*inputs, initial, Layout(runs, packed, jnp.arange(count)))
    else:
        o, final = by_spans(algebra, spans, inputs, runs, initial)
    if row is not None:
        o = from_chunks(o, o.shape[0] * size)[:, row]
    return from_chunks(o, call.length).astype(call.dtype) if row is None else o.astype(call.dtype), final


def by_spans(
    algebra: Callable[..., tuple[jax.Array, jax.Array]],
    spans: int,
    inputs: tuple[jax.Array | None, ...],
    runs: Runs | None,
    initial: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The algebra of the chunks of all inputs [N,...], N / spans of them at a time; the state goes from span to span."""
    inputs, runs = jax.tree.map(lambda x: x.reshape(spans, -1, *x.shape[1:]), (inputs, runs))
    count = jnp.arange(inputs[0].shape[1])

    def span(state: jax.Array, x: tuple[tuple[jax.Array | None, ...], Runs | None]) -> tuple[jax.Array, jax.Array]:
        inputs, runs = x
        o, state = algebra(*inputs, state, Layout(runs, None, count))
        return state, o

    final, o = lax.scan(span, initial, (inputs, runs))
    return o.reshape(-1, *o.shape[2:]), final
