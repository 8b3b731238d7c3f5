"""The passage of states in pieces of the sequence, when there are too few heads to fill the chip. Exact, up to rounding.

What leaves a piece is affine in what enters it, F = M E + F0. So all pieces run at once from E = 0, which gives F0; a short
scan over pieces gives every E; and all pieces run at once again from there. M is diagonal where nothing is erased, and else
it is what the same kernel makes of E = I and v = 0. Packed sequences are pieces already, and none is split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels.mosaic_gpu import states
from kernels.mosaic_gpu.layout import Form, Size
from kernels.mosaic_gpu.limits import TILE

WARPGROUPS = 2 * 132
"""Warpgroups that compute, each 64 columns of V, and keep an H200 busy: two on each multiprocessor."""
SHORTEST = 4
"""Chunks of a piece, at least."""
LEAST = 4
"""Pieces, at least: with fewer, running twice (three times, where rows erase) costs what it saves."""

INPUTS = ("read", "kept", "entered", "v", "do", "rows", "scores", "solved", "through")
"""What `states` reads of every chunk or token."""

Arrays = dict[str, jax.Array]


def pieces(size: Size) -> int:
    """Into how many pieces a sequence is split: a power of two; 1 when there is work enough."""
    warpgroups = size.batch * size.heads * size.value_tiles
    count = 1
    while 2 * count * warpgroups <= WARPGROUPS and size.chunks % (2 * count) == 0 and size.chunks // (2 * count) >= SHORTEST:
        count *= 2
    return count if count >= LEAST else 1


def _cut(arrays: Arrays, batch: int, count: int) -> Arrays:
    """Every piece of a row as a row of its own."""
    found = {name: arrays[name] for name in INPUTS if name in arrays}
    return {name: x.reshape(batch * count, x.shape[1] // count, *x.shape[2:]) for name, x in found.items()}


def _joined(found: Arrays, batch: int, count: int) -> Arrays:
    """The opposite."""
    return {name: x.reshape(batch, count * x.shape[1], *x.shape[2:]) for name, x in found.items()}


def _maps(form: Form, size: Size, cut: Arrays) -> jax.Array:
    """M of every piece: [B P,HV,K,K], or its diagonal [B P,HV,K,1]."""
    rows, _, heads = cut["rows"].shape[:3]
    keys = size.key_tiles * TILE
    if not form.delta:
        factor = cut["rows"][:, :, :, form.rows.index("through"), :1]
        if form.decay == "vector":
            factor = factor * cut["through"]
        return jnp.broadcast_to(jnp.prod(factor, axis=1), (rows, heads, keys))[..., None]
    nothing = jnp.zeros((*cut["kept"].shape[:2], heads, keys), cut["v"].dtype)
    identity = jnp.broadcast_to(jnp.eye(keys, dtype=jnp.float32), (rows, heads, keys, keys))
    square = size._replace(value_tiles=size.key_tiles)
    return states.forward(form, square, cut | {"v": nothing, "initial": identity})["final"]


def _apply(maps: jax.Array, x: jax.Array, *, transposed: bool = False) -> jax.Array:
    if maps.shape[-1] == 1:
        return maps * x
    maps = jnp.swapaxes(maps, -1, -2) if transposed else maps
    return jnp.matmul(maps, x, precision=lax.Precision.HIGHEST)


def _passage(maps: jax.Array, own: jax.Array, start: jax.Array, count: int, *, reverse: bool) -> jax.Array:
    """What enters every piece [B P,HV,K,V], of what each makes of nothing (`own`) and of what enters the first (`start`)."""
    maps, own = (jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for x in (maps, own))

    def piece(state: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _apply(x[0], state, transposed=reverse) + x[1], state

    _, entering = lax.scan(piece, start, (maps, own), reverse=reverse)
    return jnp.moveaxis(entering, 0, 1).reshape(-1, *start.shape[1:])


def forward(form: Form, size: Size, arrays: Arrays) -> Arrays:
    """As `states.forward`; with pieces also their `maps`, for the way back."""
    count = 1 if form.packed else pieces(size)
    if count == 1:
        return states.forward(form, size, arrays)
    part = size._replace(batch=size.batch * count, chunks=size.chunks // count)
    cut = _cut(arrays, size.batch, count)
    maps = _maps(form, part, cut)
    empty = jnp.zeros((part.batch, *arrays["initial"].shape[1:]), jnp.float32)
    own = states.forward(form, part, cut | {"initial": empty})["final"]
    entering = _passage(maps, own, arrays["initial"], count, reverse=False)
    found = states.forward(form, part, cut | {"initial": entering})
    final = found.pop("final").reshape(size.batch, count, *empty.shape[1:])[:, -1]
    return _joined(found, size.batch, count) | {"final": final, "maps": maps}


def backward(form: Form, size: Size, arrays: Arrays) -> Arrays:
    """As `states.backward`."""
    count = 1 if form.packed else pieces(size)
    if count == 1:
        return states.backward(form, size, arrays)
    part = size._replace(batch=size.batch * count, chunks=size.chunks // count)
    cut = _cut(arrays, size.batch, count)
    empty = jnp.zeros((part.batch, *arrays["dfinal"].shape[1:]), jnp.float32)
    own = states.backward(form, part, cut | {"dfinal": empty})["dinitial"]
    leaving = _passage(arrays["maps"], own, arrays["dfinal"], count, reverse=True)
    found = states.backward(form, part, cut | {"dfinal": leaving})
    dinitial = found.pop("dinitial").reshape(size.batch, count, *empty.shape[1:])[:, 0]
    return _joined(found, size.batch, count) | {"dinitial": dinitial}
