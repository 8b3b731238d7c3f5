"""The `tpu` back-end: tokens into chunks by head, the kernels, and their derivative."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.arguments import Call, Tensors
from kernels.derivatives import first_only
from kernels.reference.recurrence import initial_state, per_token_gate
from kernels.sequences import boundaries
from kernels.tpu import backward, forward
from kernels.tpu.layout import Form, Operands
from kernels.tpu.limits import SMALLEST_CHUNK, heads_a_step
from kernels.tuning import tuned
from kernels.xla.chunks import packed_chunks, to_rows
from kernels.xla.decay import FLOOR, GRID
from kernels.xla.states import Packed


class Inputs(NamedTuple):
    """q, k [B,HV,T,K]; v [B,HV,T,V]; g [B,HV,T] or [B,HV,T,K]; beta [B,HV,T]; runs [B,T]; the chunks of packed sequences;
    initial [B,HV,K,V], or packed [sequences,HV,K,V]. Whole chunks.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array | None
    beta: jax.Array | None
    runs: jax.Array | None
    packed: Packed | None
    initial: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(form: Form, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """o [B,HV,T,V] and the final states, as the initial ones."""
    return _results(inputs, forward.call(form, _operands(form, inputs), save=False))


def _results(inputs: Inputs, found: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return found["o"], _states(inputs, inputs.initial, found["final"])


def _states(inputs: Inputs, unchanged: jax.Array, found: jax.Array) -> jax.Array:
    """States [.,HV,K,V] from those of a kernel, [.,HV,V,K]; `unchanged` where a sequence is empty: it may have no chunk."""
    found = jnp.swapaxes(found, -1, -2)
    return found if inputs.packed is None else jnp.where(inputs.packed.empty[:, None, None, None], unchanged, found)


def _operands(form: Form, inputs: Inputs) -> Operands:
    def lanes(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, 1, form.chunk)

    q, k, v, g, beta, runs, packed, initial = inputs
    if g is not None:
        g = jnp.maximum(g, FLOOR["float32"])
        if form.decay == "scalar":
            coarse = jnp.round(g * GRID) / GRID
            g = jnp.concatenate([lanes(coarse), lanes(g - coarse)], axis=-2)
    if runs is not None:
        runs = runs.reshape(runs.shape[0], -1, form.chunk)
        before = jnp.concatenate([jnp.zeros_like(runs[:, :1, -1:]), runs[:, :-1, -1:]], axis=1)
        runs = (runs - before).astype(jnp.float32)[:, :, None]
    sequence = None if packed is None else packed.sequence
    return Operands(sequence, q, k, v, g, None if beta is None else lanes(beta), runs, jnp.swapaxes(initial, -1, -2))


def _forward(form: Form, inputs: Inputs):
    found = forward.call(form, _operands(form, inputs), save=True)
    return _results(inputs, found), (inputs, {name: found[name] for name in ("states", "inverses") if name in found})


def _backward(form: Form, residuals, cotangents):
    inputs, saved = residuals
    do, dfinal = cotangents
    found = backward.call(form, _operands(form, inputs), saved, do, jnp.swapaxes(dfinal, -1, -2))
    g, beta = inputs.g, inputs.beta
    dg = dbeta = None
    if g is not None:
        dg = jnp.where(g > FLOOR["float32"], found["dg"].reshape(g.shape), 0)
    if beta is not None:
        dbeta = found["dbeta"].reshape(beta.shape)
    dinitial = _states(inputs, dfinal, found["dinitial"])
    return (Inputs(found["dq"], found["dk"], found["dv"], dg, dbeta, None, None, dinitial),)


_chunks.defvjp(first_only(_forward), first_only(_backward))


def form_of(call: Call) -> Form:
    """The static choices of a call."""
    decay = "scalar" if call.decay == "constant" else call.decay
    whole = max(SMALLEST_CHUNK, 1 << (call.length - 1).bit_length())
    return Form(
        decay=decay,
        delta=call.delta,
        scale=call.scale,
        chunk=min(tuned(call, "tpu").chunk_size, whole),
        heads=heads_a_step(decay, call.delta, call.value_heads, call.dtype, call.key_size, call.value_size),
        exact=call.dtype == "float32",
        interpret=call.interpret,
    )


def run(call: Call, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    """The op by TPU kernels. Returns o [B,T,HV,V] in the dtype of v, and the final state [B or sequences,HV,K,V].

    First derivatives only: the backward kernels have none of their own. On a mesh, call within `jax.shard_map`.
    """
    form = form_of(call)
    padding = -call.length % form.chunk
    runs = packed = row = None
    if tensors.segment_ids is not None:
        # Rows behind the last token go on with its segment, so that its state is the one that leaves.
        runs = jnp.cumsum(boundaries(tensors.segment_ids), axis=1, dtype=jnp.int32)
        runs = jnp.pad(runs, ((0, 0), (0, padding)), mode="edge")
    if tensors.cu_seqlens is not None:
        packed, token, valid, row = packed_chunks(tensors.cu_seqlens, call.length, form.chunk)

    def by_head(x: jax.Array) -> jax.Array:
        if row is None:
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        else:
            x = to_rows(x, token, valid)
        return jnp.swapaxes(x, 1, 2)

    q, k = (jnp.repeat(by_head(x), call.group, axis=1) for x in (tensors.q, tensors.k))
    g = per_token_gate(tensors.g, call)
    if g is not None:
        g = by_head(g if form.decay == "vector" else g[..., 0])
    beta = None if tensors.beta is None else by_head(tensors.beta.astype(jnp.float32))
    initial = initial_state(call, tensors)
    o, final = _chunks(form, Inputs(q, k, by_head(tensors.v), g, beta, runs, packed, initial))
    o = jnp.swapaxes(o, 1, 2)
    return o[:, : call.length] if row is None else o[:, row], final
