"""The forward kernel: grid (batch, heads, chunks), chunks in order, the state of a few heads in VMEM.

For a chunk with entering state E and leaving state F (both kept transposed), D the decay of `kernels.tpu.algebra`:

    N = v, or T (beta (v - (k entry) E))        O = A N + (q entry) E        F = through E + (k exit)^T N
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.tpu.algebra import Grid, Products, decay_of, inverse, masks
from kernels.tpu.layout import Form, Operands, specs


def kernel(form: Form, save: bool, *refs: Any) -> None:
    """One chunk of `form.heads` heads. refs: inputs as `Operands`, outputs, then the state [heads,V,K]."""
    names = form.names()
    given = dict(zip(names, refs, strict=False))
    o_ref, final_ref, *saved, state_ref = refs[len(names) :]
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
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
            if save:
                saved[1][0, head] = solved.astype(saved[1].dtype)
        if save:
            saved[0][0, head, 0] = state.astype(saved[0].dtype)
        scores = jnp.where(mask.causal, decay.scores(dots, q, k), 0.0)
        o = dots.nn(scores, written) + dots.nt(q * decay.entry, state)
        o_ref[0, head] = o.astype(o_ref.dtype)
        state_ref[head] = state * decay.through + dots.tn(written, k * decay.exit)

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _end() -> None:
        final_ref[0] = state_ref[...]


def call(form: Form, operands: Operands, *, save: bool) -> tuple[jax.Array, ...]:
    """(o, final state), and with `save` the entering states [B,HV,N,V,K] and for delta rules the inverses [B,HV,T,C]."""
    batch, heads, length, key_size = operands.k.shape
    value_size = operands.v.shape[-1]
    inputs = operands.present()
    layout = specs(form, key_size, value_size)
    outputs = [
        (jax.ShapeDtypeStruct((batch, heads, length, value_size), operands.v.dtype), layout["v"]),
        (jax.ShapeDtypeStruct((batch, heads, value_size, key_size), jnp.float32), layout["initial"]),
    ]
    if save:
        shape = (batch, heads, length // form.chunk, value_size, key_size)
        outputs.append((jax.ShapeDtypeStruct(shape, form.stored), layout["states"]))
        if form.delta:
            outputs.append((jax.ShapeDtypeStruct((batch, heads, length, form.chunk), form.stored), layout["inverses"]))
    return pl.pallas_call(
        lambda *refs: kernel(form, save, *refs),
        grid=(batch, heads // form.heads, length // form.chunk),
        in_specs=[layout[name] for name in inputs],
        out_specs=tuple(spec for _, spec in outputs),
        out_shape=tuple(shape for shape, _ in outputs),
        scratch_shapes=[pltpu.VMEM((form.heads, value_size, key_size), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=form.cost(operands, backward=False),
        interpret=form.interpret or False,
        name=f"{form.name}_forward",
    )(*inputs.values())
