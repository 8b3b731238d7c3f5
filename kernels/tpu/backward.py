"""The backward kernel: the chunks from last to first, the cotangent of the state in VMEM.

Scores and decays are computed again; the entering states, and the inverses of delta rules, were kept by the forward pass. The
equations are those of `kernels.xla.additive` and `kernels.xla.delta`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.tpu.algebra import Grid, Products, decay_of, masks
from kernels.tpu.layout import Form, Operands, first_and_last, launch, specs


def kernel(form: Form, given: dict[str, Any], found: dict[str, Any], dstate_ref: Any) -> None:
    """One chunk of `form.heads` heads: inputs and outputs as in `call`, the cotangent of the state [heads,V,K]."""
    count = pl.num_programs(2)
    first, last = first_and_last(given.get("sequence"), count - 1 - pl.program_id(2), count)

    @pl.when(last)
    def _begin() -> None:
        dstate_ref[...] = given["dfinal"][0]

    grid = Grid.of(form.chunk)
    mask = masks(grid, given["runs"][0, 0] if "runs" in given else None)
    dots = Products(form.pieces)
    for head in range(form.heads):
        q, k, v, do = (given[name][0, head].astype(jnp.float32) for name in ("q", "k", "v", "do"))
        q = q * form.scale
        g = None if form.decay == "none" else given["g"][0, head] if form.decay == "vector" else given["g"][0, head, 0]
        decay = decay_of(form.decay, grid, mask, g, form.chunk)
        entering = given["states"][0, head, 0].astype(jnp.float32)
        dleaving = dstate_ref[head]
        read, entered, kept = q * decay.entry, k * decay.entry, k * decay.exit
        scores = jnp.where(mask.causal, decay.scores(dots, q, k), 0.0)
        written = v
        if form.delta:
            beta = grid.column(given["beta"][0, head, 0])
            solved = given["inverses"][0, head].astype(jnp.float32)
            rest = v - dots.nt(entered, entering)
            written = dots.nn(solved, beta * rest)

        dwritten = dots.tn(scores, do) + dots.nt(kept, dleaving)
        dscores = jnp.where(mask.causal, dots.nt(do, written), 0.0)
        dq, dk, dpairs = decay.pull(dots, dscores, q, k, scores)
        dread, dkept = dots.nn(do, entering) * decay.entry, dots.nn(written, dleaving) * decay.exit
        dq, dk = dq + dread, dk + dkept
        dentering = dleaving * decay.through + dots.tn(do, read)
        reading = q * dread  # what reads the entering state, times its cotangent
        dv = dwritten
        if form.delta:
            dvalues = dots.tn(solved, dwritten)  # cotangent of beta (v - (k entry) E)
            erasing = jnp.where(mask.strict, decay.scores(dots, k, k), 0.0)
            derasing = jnp.where(mask.strict, -dots.nt(dvalues, written), 0.0)  # cotangent of beta erasing
            row, column, dpairs_erasing = decay.pull(dots, beta * derasing, k, k, erasing)
            dentered = -beta * dots.nn(dvalues, entering) * decay.entry
            dbeta = jnp.sum(dvalues * rest, axis=1, keepdims=True) + jnp.sum(derasing * erasing, axis=1, keepdims=True)
            found["dbeta"][0, head, 0] = grid.row(dbeta)
            dk += row + column + dentered
            dentering -= dots.tn(dvalues, beta * entered)
            reading += k * dentered
            dv = beta * dvalues
            dpairs = None if dpairs is None else dpairs + dpairs_erasing
        if form.decay != "none":
            through = decay.through * jnp.sum(entering * dleaving, axis=0, keepdims=True)
            dg = decay.gate(dpairs, reading, k * dkept, through)
            if form.decay == "vector":
                found["dg"][0, head] = dg
            else:
                found["dg"][0, head, 0] = dg
        found["dq"][0, head] = (dq * form.scale).astype(found["dq"].dtype)
        found["dk"][0, head] = dk.astype(found["dk"].dtype)
        found["dv"][0, head] = dv.astype(found["dv"].dtype)
        dstate_ref[head] = dentering

    @pl.when(first)
    def _end() -> None:
        found["dinitial"][0] = dstate_ref[...]


def call(form: Form, operands: Operands, saved: dict[str, jax.Array], do: jax.Array, dfinal: jax.Array) -> dict[str, jax.Array]:
    """Cotangents by name: dq, dk, dv, dinitial; dg [B,HV,N,1,C] or [B,HV,T,K] and dbeta [B,HV,N,1,C] where they exist.

    `dinitial` of a packed sequence without a chunk is not written.
    """
    batch, heads, length, key_size = operands.k.shape
    value_size, count = operands.v.shape[-1], length // form.chunk
    inputs = {name: x for name, x in operands.present().items() if name != "initial"}
    inputs |= saved | {"do": do, "dfinal": dfinal}
    blocks = specs(form, key_size, value_size, lambda n: count - 1 - n)
    blocks |= {"do": blocks["v"], "dfinal": blocks["initial"]}
    shapes = {
        "dq": (operands.q, "q"),
        "dk": (operands.k, "k"),
        "dv": (operands.v, "v"),
        "dinitial": (operands.initial, "initial"),
    }
    outputs = {name: (jax.ShapeDtypeStruct(like.shape, like.dtype), blocks[block]) for name, (like, block) in shapes.items()}
    row = jax.ShapeDtypeStruct((batch, heads, count, 1, form.chunk), jnp.float32)
    if form.decay == "vector":
        outputs["dg"] = (jax.ShapeDtypeStruct(operands.q.shape, jnp.float32), blocks["dg"])
    elif form.decay == "scalar":
        outputs["dg"] = (row, blocks["dg"])
    if form.delta:
        outputs["dbeta"] = (row, blocks["beta"])
    return launch(
        form,
        "backward",
        functools.partial(kernel, form),
        grid=(batch, heads // form.heads, count),
        inputs=inputs,
        blocks=blocks,
        outputs=outputs,
        state=(value_size, key_size),
        cost=form.cost(operands, backward=True),
    )
