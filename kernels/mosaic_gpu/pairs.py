"""The first kernel: chunks on their own. Scores of pairs of rows, the inverses of delta rules, and factors of decays by
channel.

    A = tril(scale scores(q, k))        T = (I + L)^-1,  L_ij = beta_i scores(k, k)_ij for j < i

The inverse is taken by merging: X <- X - X L_b X brings in the corners L_b of blocks of 2, 4 ... 64 rows, which is stable on
every key. Its products have operands of two bfloat16 pieces (relative error 2^-16), or three for float32.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.decays import Level, Masks, Rows, levels, pairs, summed, times, where
from kernels.mosaic_gpu.layout import Form, Size, columns, launch, tokens
from kernels.mosaic_gpu.limits import TILE
from kernels.mosaic_gpu.tiles import SHAPE, Operand, Pool, arrived, copy, done, dot, fetched, keep, nn, nt, put, read


def inverted(form: Form) -> int:
    """Pieces of what the inversion multiplies: with beta = 2 and equal keys two leave errors of 5e-3.

    For a decay by channel three would spill registers (80 bytes for bfloat16 inputs, compiled for sm_90a).
    """
    return form.fine if form.decay == "vector" else 3


def inverse(form: Form, pool: Pool, masks: Masks, minus: jax.Array) -> jax.Array:
    """(I - M)^-1 of the strictly lower M."""
    whole, inner, corners, product = pool.many(4, inverted(form))
    put(whole, minus)
    # Blocks of two rows need no product: their inverse is I + M.
    start = jnp.where(masks.i == masks.j, 1.0, where(Level(jnp.int32(1)).corner(masks), minus))

    def merge(level: Level, x: jax.Array) -> jax.Array:
        put(inner, x)
        put(corners, where(level.corner(masks), read(whole)))
        plgpu.commit_smem()
        put(product, dot(nn(corners, inner)))
        plgpu.commit_smem()
        return x + dot(nn(inner, product))

    return levels(merge, start, first=2)


def body(form: Form, refs: SimpleNamespace) -> None:
    """One chunk of one head."""
    pool, (barrier,) = Pool(form, refs.pool), refs.barriers
    count = refs.q.shape[-1] // TILE
    chunk, own = (refs.b, refs.n, refs.h), (refs.b, tokens(refs.n), refs.h)
    shared = (refs.b, tokens(refs.n), lax.div(refs.h, jnp.int32(form.group)))
    whole = pool.take(form.made)
    staging = whole._replace(pieces=form.pieces)
    start = pool.next
    q, k = pool.many(count), pool.many(count)
    plgpu.copy_gmem_to_smem(refs.rows.at[chunk], refs.rows_smem.at[0], barrier.at[0])
    for tile in range(count):
        copy(form, refs.q, shared, tile, q[tile], barrier.at[0])
        copy(form, refs.k, shared, tile, k[tile], barrier.at[0])
    arrived(form, barrier.at[0])
    rows = Rows(form, refs.rows_smem.at[0])
    masks = Masks(rows)
    if form.decay == "vector":
        scores, erasing = _by_channel(form, refs, pool, masks, q, k, own, staging)
    else:
        decay = pairs(rows, masks)
        scores = times(dot(*map(nt, q, k)), decay)
        erasing = times(dot(*map(nt, k, k)), decay) if form.delta else None
    keep(form, refs.scores, (*chunk, slice(None)), 0, whole, where(masks.causal(), scores * form.scale))
    if form.delta:
        minus = where(masks.strict(), erasing * (0.0 - rows.factor("beta")))
        pool.back(start)
        keep(form, refs.solved, (*chunk, slice(None)), 0, whole, inverse(form, pool, masks, minus))
    done()


def _by_channel(
    form: Form,
    refs: SimpleNamespace,
    pool: Pool,
    masks: Masks,
    q: list[Operand],
    k: list[Operand],
    own: tuple,
    staging: Operand,
) -> tuple[jax.Array, jax.Array]:
    """Scores of q and k, and of k and k, of a decay by channel; q and k with their factors go to device memory."""
    count = len(q)
    gates, chosen = pool.many(count, form.fine), pool.take(1)
    weighted_q, weighted_k = staging, pool.take()
    for tile in range(count):
        g = fetched(refs.g.at[(*own, columns(tile))])
        put(gates[tile], g)
        refs.vectors[tile] = jnp.exp(jnp.sum(g, axis=0))
    plgpu.commit_smem()
    for tile in range(count):
        target = refs.through.at[(refs.b, refs.n, refs.h, columns(tile))]
        plgpu.copy_smem_to_gmem(refs.vectors.at[tile], target)
    entry = summed(chosen, masks.j <= masks.i, gates)
    for tile in range(count):
        factor = entry(tile)
        keep(form, refs.read, own, tile, staging, read(q[tile]) * factor)
        if form.delta:
            keep(form, refs.entered, own, tile, staging, read(k[tile]) * factor)
    leaving = summed(chosen, masks.j > masks.i, gates)
    for tile in range(count):
        keep(form, refs.kept, own, tile, staging, read(k[tile]) * leaving(tile))

    done()

    def diagonal(a: list[Operand], b: list[Operand]) -> jax.Array:
        own_scores = sum(jnp.sum(read(x) * read(y), axis=1) for x, y in zip(a, b, strict=True))
        return where(masks.i == masks.j, lax.broadcast_in_dim(own_scores, SHAPE, [0]))

    def halve(level: Level, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weight = summed(chosen, level.stretches(masks), gates)
        corner = level.corner(masks)
        for tile in range(count):
            factor = weight(tile)
            put(weighted_q, read(q[tile]) * factor)
            put(weighted_k, read(k[tile]) * factor)
            plgpu.commit_smem()
            terms = [nt(weighted_q, weighted_k)] + [nt(weighted_k, weighted_k)] * form.delta
            found = tuple(x + where(corner, dot(term)) for x, term in zip(found, terms, strict=True))
        return found

    # The scores of k with k are read below the diagonal only.
    start = (diagonal(q, k), where(masks.i < 0, 0.0))[: 1 + form.delta]
    found = levels(halve, start)
    return found if form.delta else (found[0], None)


def call(form: Form, size: Size, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """From q, k [B,T,H,K], rows [B,N,HV,.,64] and for a decay by channel g [B,T,HV,K].

    Returns:
      scores, and for delta rules solved [B,N,HV,64,64], as `Form.kept`; for a decay by channel read = q e^G, kept = k
      e^{G_C - G} and for delta rules entered = k e^G [B,T,HV,K], in the stored dtype; through = e^{G_C} [B,N,HV,K] float32.
    """
    squares = form.kept(size.batch, size.chunks, size.heads, TILE, TILE)
    outputs = {"scores": squares} | ({"solved": squares} if form.delta else {})
    vector = form.decay == "vector"
    keys, tiles = size.key_tiles * TILE, size.key_tiles
    if vector:
        channels = jax.ShapeDtypeStruct((size.batch, size.chunks * TILE, size.heads, keys), form.stored)
        outputs |= {"read": channels, "kept": channels} | ({"entered": channels} if form.delta else {})
        outputs["through"] = jax.ShapeDtypeStruct((size.batch, size.chunks, size.heads, keys), jnp.float32)
    names = ("q", "k", "g", "rows") if vector else ("q", "k", "rows")
    loaded = form.made + form.pieces * 2 * tiles + (form.fine * tiles + 1 + form.pieces if vector else 0)
    return launch(
        form,
        "pairs",
        body,
        grid={"n": size.chunks, "h": size.heads, "b": size.batch},
        inputs={name: arrays[name] for name in names},
        outputs=outputs,
        pool=max(loaded, form.made + 4 * inverted(form) * form.delta),
        copies=(1 + (0 if form.exact else 2 * tiles),),
        row_slots=1,
        vectors=tiles if vector else 0,
    )
