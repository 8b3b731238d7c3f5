"""The outputs of the chunks, from the states that enter them: O = A W + scale entry (read E). Chunks on their own."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.decays import Rows
from kernels.mosaic_gpu.layout import Form, Size, columns, launch, tokens
from kernels.mosaic_gpu.limits import TILE
from kernels.mosaic_gpu.tiles import Pool, arrived, copy, done, dot, keep, nn


def body(form: Form, refs: SimpleNamespace) -> None:
    """64 columns of the output of one chunk of one head."""
    pool, barrier = Pool(form, refs.pool), refs.barriers[0].at[0]
    count = refs.read.shape[-1] // TILE
    chunk, own = (refs.b, refs.n, refs.h), (refs.b, tokens(refs.n), refs.h)
    shared = own if form.decay == "vector" else (refs.b, tokens(refs.n), lax.div(refs.h, jnp.int32(form.group)))
    reading, states = pool.many(count), pool.many(count, form.made)
    scores, written = pool.many(2, form.made)
    plgpu.copy_gmem_to_smem(refs.rows.at[chunk], refs.rows_smem.at[0], barrier)
    for tile in range(count):
        copy(form, refs.read, shared, tile, reading[tile], barrier)
        copy(form, refs.states, (*chunk, columns(tile)), refs.v_tile, states[tile], barrier)
    copy(form, refs.scores, (*chunk, slice(None)), 0, scores, barrier)
    copy(form, refs.written, own, refs.v_tile, written, barrier)
    arrived(form, barrier)
    entry = Rows(form, refs.rows_smem.at[0]).factor("entry")
    o = dot(nn(scores, written)) + (entry * form.scale) * dot(*map(nn, reading, states))
    keep(form, refs.o, own, refs.v_tile, scores._replace(pieces=form.pieces), o)
    done()


def call(form: Form, size: Size, arrays: dict[str, jax.Array]) -> jax.Array:
    """o [B,T,HV,V] from read [B,T,H or HV,K], written [B,T,HV,V], states [B,N,HV,K,V], scores and rows."""
    tiles = form.pieces * size.key_tiles + form.made * (size.key_tiles + 2)
    shape = (size.batch, size.chunks * TILE, size.heads, size.value_tiles * TILE)
    return launch(
        form,
        "outputs",
        body,
        grid={"v_tile": size.value_tiles, "n": size.chunks, "h": size.heads, "b": size.batch},
        inputs={name: arrays[name] for name in ("read", "written", "states", "scores", "rows")},
        outputs={"o": jax.ShapeDtypeStruct(shape, form.stored)},
        pool=tiles,
        copies=(1 + (0 if form.exact else tiles),),
        row_slots=1,
    )["o"]
