"""The forward kernel: grid (batch, heads, chunks), chunks in order, the state of a few heads in VMEM.

For a chunk with entering state E and leaving state F (both kept transposed), D the decay of `kernels.tpu.algebra`:

    N = v, or T (beta (v - (k entry) E))        O = A N + (q entry) E        F = through E + (k exit)^T N
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.tpu.algebra import Grid, Products, decay_of, inverse, masks
from kernels.tpu.layout import Form, Operands, first_and_last, launch, specs


def kernel(form: Form, given: dict[str, Any], found: dict[str, Any], state_ref: Any) -> None:
    """One chunk of `form.heads` heads: inputs as `Operands`, outputs as `call` returns them, the state [heads,V,K]."""
    first, last = first_and_last(given.get("sequence"), pl.program_id(2), pl.num_programs(2))

    @pl.when(first)
    def _begin() -> None:
        state_ref[...] = given["initial"][0]

    grid = Grid.of(form.chunk)
    mask = masks(grid, given["runs"][0, 0] if "runs" in given else None)
    dots = Products(form.pieces)
    for head in range(form.heads):
        q, k, v = (given[name][0, head].astype(jnp.float32) for name in ("q", "k", "v"))
        q = q * form.scale
        g = None if form.decay == "none" else given["g"][0, head] if form.decay == "vector" else given["g"][0, head, 0]
        decay = decay_of(form.decay, grid, mask, g, form.chunk)
        state = state_ref[head]
        written = v
        if form.delta:
            beta = grid.column(given["beta"][0, head, 0])
            solved = inverse(grid, jnp.where(mask.strict, beta * decay.scores(dots, k, k), 0.0))
            written = dots.nn(solved, beta * (v - dots.nt(k * decay.entry, state)))
            if "inverses" in found:
                found["inverses"][0, head] = solved.astype(found["inverses"].dtype)
        if "states" in found:
            found["states"][0, head, 0] = state.astype(found["states"].dtype)
        scores = jnp.where(mask.causal, decay.scores(dots, q, k), 0.0)
        o = dots.nn(scores, written) + dots.nt(q * decay.entry, state)
        found["o"][0, head] = o.astype(found["o"].dtype)
        state_ref[head] = state * decay.through + dots.tn(written, k * decay.exit)

    @pl.when(last)
    def _end() -> None:
        found["final"][0] = state_ref[...]


def call(form: Form, operands: Operands, *, save: bool) -> dict[str, jax.Array]:
    """o, final, and with `save` the entering states [B,HV,N,V,K] and for delta rules inverses [B,HV,T,C].

    The final state of a packed sequence without a chunk is not written.
    """
    batch, heads, length, key_size = operands.k.shape
    value_size = operands.v.shape[-1]
    blocks = specs(form, key_size, value_size)
    outputs = {
        "o": (jax.ShapeDtypeStruct((batch, heads, length, value_size), operands.v.dtype), blocks["v"]),
        "final": (jax.ShapeDtypeStruct(operands.initial.shape, jnp.float32), blocks["initial"]),
    }
    if save:
        shape = (batch, heads, length // form.chunk, value_size, key_size)
        outputs["states"] = (jax.ShapeDtypeStruct(shape, form.stored), blocks["states"])
        if form.delta:
            shape = (batch, heads, length, form.chunk)
            outputs["inverses"] = (jax.ShapeDtypeStruct(shape, form.stored), blocks["inverses"])
    return launch(
        form,
        "forward",
        functools.partial(kernel, form),
        grid=(batch, heads // form.heads, length // form.chunk),
        inputs=operands.present(),
        blocks=blocks,
        outputs=outputs,
        state=(value_size, key_size),
        cost=form.cost(operands, backward=False),
    )
