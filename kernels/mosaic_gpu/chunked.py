"""The `mosaic_gpu` back-end: tokens into tiles, the kernels one after the other, and their derivative."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels.arguments import Call, Tensors
from kernels.derivatives import first_only
from kernels.mosaic_gpu import gradients, outputs, pairs, split
from kernels.mosaic_gpu.layout import Form, Size
from kernels.mosaic_gpu.limits import TILE
from kernels.reference.recurrence import per_token_gate
from kernels.sequences import boundaries
from kernels.xla.chunks import packed_chunks, to_rows
from kernels.xla.decay import FLOOR, cumulative, gate_gradient

Arrays = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    beta: jax.Array | None,
    runs: jax.Array | None,
    bounds: jax.Array | None,
    initial: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """q, k [B,T,H,K]; v [B,T,HV,V]; g [B,T,HV] or [B,T,HV,K]; beta [B,T,HV]; runs [B,T]; initial [B,HV,K,V]; whole tiles.

    Packed: bounds [sequences + 1], the first chunk of every sequence, and where the last one ends; initial [sequences,HV,K,V].

    Returns:
      o [B,T,HV,V] and the final states, as the initial ones.
    """
    return forward(form, q, k, v, g, beta, runs, bounds, initial)[0]


def by_chunk(x: jax.Array) -> jax.Array:
    """[B,T,HV] -> [B,N,HV,64]"""
    batch, length, heads = x.shape
    return x.reshape(batch, length // TILE, TILE, heads).swapaxes(2, 3)


def rows_of(form: Form, g: jax.Array | None, beta: jax.Array | None, runs: jax.Array | None, like: jax.Array) -> jax.Array:
    """`Form.rows` of every chunk, float32 [B,N,HV,.,64]; `like` is v."""
    shape = (like.shape[0], like.shape[1] // TILE, like.shape[2], TILE)
    found = {name: jnp.ones(shape, jnp.float32) for name in ("entry", "exit", "through")}
    if form.decay == "scalar":
        coarse, fine = (part[..., 0] for part in cumulative(by_chunk(jnp.maximum(g, FLOOR["float32"]))[..., None]))
        total = coarse + fine
        found |= {"coarse": coarse, "fine": fine, "entry": jnp.exp(total)}
        found["exit"] = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
        found["through"] = jnp.broadcast_to(jnp.exp(total[..., -1:]), shape)
    if form.segmented:
        run = by_chunk(runs[..., None])
        before = jnp.concatenate([jnp.zeros_like(run[:, :1, :, -1:]), run[:, :-1, :, -1:]], axis=1)
        run = run - before  # numbers from that of the entering state, which is 0
        masks = {"entry": run == 0, "exit": run == run[..., -1:], "through": run[..., -1:] == 0}
        found |= {name: jnp.where(mask, found[name], 0) for name, mask in masks.items()}
        found["run"] = jnp.broadcast_to(run.astype(jnp.float32), shape)
    if form.delta:
        found["beta"] = by_chunk(beta)
    return jnp.stack([found[name] for name in form.rows], axis=3)


def forward(form: Form, q, k, v, g, beta, runs, bounds, initial):
    """((o, final state), what `backward` needs) of the arguments of `_chunks`."""
    size = Size.of(k, v)
    arrays = {"q": q, "k": k, "v": v, "rows": rows_of(form, g, beta, runs, v), "initial": initial}
    if form.decay == "vector":
        arrays["g"] = jnp.maximum(g, FLOOR["float32"])
    if form.packed:
        arrays["bounds"] = bounds
    arrays |= {"read": q, "kept": k}
    arrays |= pairs.call(form, size, arrays)
    arrays |= split.forward(form, size, arrays)
    arrays.setdefault("written", v)
    o = outputs.call(form, size, arrays)
    final = arrays.pop("final")
    for name in ("initial", "v", "q", "k", "g"):
        arrays.pop(name, None)
    return (o, final), ((q, k, v, g, beta), arrays)


def backward(form: Form, residuals, cotangents):
    """Cotangents of the arguments of `_chunks`, of those of o and of the final state."""
    (q, k, v, g, beta), arrays = residuals
    do, dfinal = cotangents
    size = Size.of(k, v)
    arrays = arrays | {"q": q, "k": k, "do": do, "dfinal": dfinal}
    if form.decay == "vector":
        arrays["g"] = jnp.maximum(g, FLOOR["float32"])
    arrays |= split.backward(form, size, arrays)
    found = gradients.call(form, size, arrays)
    # Every value head has its own part of the gradients of q and k.
    dq, dk = (
        jnp.sum(found[name].reshape(*q.shape[:3], form.group, -1), axis=3, dtype=jnp.float32).astype(q.dtype)
        for name in ("dq", "dk")
    )
    dv, dg, dbeta = form.whole(arrays["dwritten"]), None, None
    if "sums" in found:
        sums = dict(zip(gradients.sums(form), jnp.moveaxis(jnp.sum(found["sums"], axis=3), 3, 0), strict=True))
    if form.decay == "scalar":
        through = arrays["rows"][:, :, :, form.rows.index("through")] * jnp.sum(sums["through"], axis=-1, keepdims=True)
        column = [x[..., None] for x in (by_chunk(g), sums["after"], jnp.zeros_like(sums["after"]), sums["left"])]
        dg = by_token(gate_gradient(*column, through[..., None])[..., 0])
    elif form.decay == "vector":
        dg = jnp.where(g > FLOOR["float32"], found["dg"], 0)
    if form.delta:
        dbeta = by_token(sums["beta"]) + jnp.sum(dv * v, axis=-1)
        dv = dv * beta[..., None]
    return dq, dk, dv.astype(v.dtype), dg, dbeta, None, None, arrays["dinitial"]


_chunks.defvjp(first_only(forward), first_only(backward))


def by_token(x: jax.Array) -> jax.Array:
    """[B,N,HV,64] -> [B,T,HV]"""
    batch, chunks, heads, _ = x.shape
    return x.swapaxes(2, 3).reshape(batch, chunks * TILE, heads)


def form_of(call: Call) -> Form:
    """The static choices of a call."""
    return Form(
        decay="scalar" if call.decay == "constant" else call.decay,
        delta=call.delta,
        segmented=call.segmented,
        packed=call.sequences is not None,
        scale=call.scale,
        group=call.group,
        exact=call.dtype == "float32",
        interpret=call.interpret or None,
    )


def run(call: Call, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    """The op by Hopper kernels. Returns o [B,T,HV,V] in the dtype of v, and the final state [B or sequences,HV,K,V].

    First derivatives only: the backward kernels have none of their own. On a mesh, call within `jax.shard_map`.
    """
    form = form_of(call)
    behind = -call.length % TILE
    runs = bounds = row = None
    if tensors.segment_ids is not None:
        # Rows behind the last token go on with its segment, so that its state is the one that leaves.
        runs = jnp.cumsum(boundaries(tensors.segment_ids), axis=1, dtype=jnp.int32)
        runs = jnp.pad(runs, ((0, 0), (0, behind)), mode="edge")
    if tensors.cu_seqlens is not None:
        packed, token, valid, row = packed_chunks(tensors.cu_seqlens, call.length, TILE)
        # Chunks without a token are nobody's: what is kept of them is not written, and what is made of that is not read.
        sequence = jnp.where(valid[::TILE], packed.sequence, call.sequences)
        bounds = jnp.searchsorted(sequence, jnp.arange(call.sequences + 1)).astype(jnp.int32)

    def padded(x: jax.Array, *, channels: bool) -> jax.Array:
        width = [(0, -x.shape[-1] % TILE)] if channels else []
        if row is not None:
            x = to_rows(x, token, valid)
        return jnp.pad(x, [(0, 0), (0, behind if row is None else 0), (0, 0), *width])

    q, k, v = (padded(x, channels=True) for x in (tensors.q, tensors.k, tensors.v))
    g = per_token_gate(tensors.g, call)
    if g is not None:
        g = padded(g, channels=True) if form.decay == "vector" else padded(g[..., 0], channels=False)
    beta = None if tensors.beta is None else padded(tensors.beta.astype(jnp.float32), channels=False)
    initial = tensors.initial_state
    initial = jnp.zeros(call.state_shape, jnp.float32) if initial is None else initial.astype(jnp.float32)
    initial = jnp.pad(initial, [(0, 0), (0, 0), (0, -call.key_size % TILE), (0, -call.value_size % TILE)])
    o, final = _chunks(form, q, k, v, g, beta, runs, bounds, initial)
    o = o[:, : call.length] if row is None else o[:, row]
    return o[..., : call.value_size], final[:, :, : call.key_size, : call.value_size]
