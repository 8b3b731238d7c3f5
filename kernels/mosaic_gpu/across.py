"""Sums over the columns of V in the gradient kernels: operands that come tile by tile, and how many copies each wait is for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.layout import Form, Size, columns, tokens
from kernels.mosaic_gpu.limits import TILE
from kernels.mosaic_gpu.tiles import Pool, copy, dot, fetched, hidden, no_rows, now, nt, zeros


class Across:
    """Sums over the columns of V. All at once would not fit the registers, so inputs come again for another sum; operands of
    several pieces come one after the other, or they would not fit shared memory.
    """

    def __init__(self, form: Form, refs: SimpleNamespace, pool: Pool):
        self.form, self.refs, self.pool, self.streams = form, refs, pool, 1

    def at(self, name: str) -> tuple:
        """Where the rows of an input lie."""
        refs = self.refs
        by_chunk = (refs.n, refs.h, columns(refs.k_tile)) if name.endswith("states") else (tokens(refs.n), refs.h)
        return (refs.b, *by_chunk)

    def fold(self, names: tuple[str, ...], step: Callable[..., Any], carry: Any) -> Any:
        """`carry` through `step(carry, *tiles)`, where `tiles` has for each name those across V: all together, or of several
        pieces one after the other, in a loop, so that a wide V takes no more registers than a narrow one.
        """
        form, refs, start = self.form, self.refs, self.pool.next
        count = refs.do.shape[-1] // TILE
        together = 1 if form.made > 1 else count
        barrier = None if form.exact else refs.barriers[self.streams].at[0]
        self.streams += 1
        operands = [self.pool.many(together, pieces(form, name)) for name in names]

        def some(first: Any, carry: Any) -> Any:
            for name, across in zip(names, operands, strict=True):
                for number, operand in enumerate(across):
                    copy(form, getattr(refs, name), self.at(name), first + number, operand, barrier)
            if form.exact:
                plgpu.commit_smem()
            else:
                plgpu.barrier_wait(barrier)
            carry = step(carry, *operands)
            plgpu.commit_smem()  # what was read has been read: the next copies may overwrite it
            return carry

        plgpu.commit_smem()
        carry = some(0, carry) if together == count else lax.fori_loop(0, count, some, carry)
        self.pool.back(start)
        return carry

    def product(self, a: str, b: str) -> jax.Array:
        """a b^T"""
        return self.fold((a, b), lambda x, *ab: now(x + dot(*map(nt, *ab)))[0], zeros())

    def inner(self, a: str, b: str) -> jax.Array:
        """Its diagonal, [64], from device memory: in float32 the tiles of three inputs at once would not fit the registers."""

        def part(name: str, tile: Any) -> jax.Array:
            batch, *rest = self.at(name)
            return fetched(getattr(self.refs, name).at[(hidden(batch), *rest, columns(tile))])

        def step(tile: Any, found: jax.Array) -> jax.Array:
            return found + jnp.sum(part(a, tile) * part(b, tile), axis=1)

        return lax.fori_loop(0, self.refs.do.shape[-1] // TILE, step, no_rows())


def pieces(form: Form, name: str) -> int:
    """Of a tile of an input: of `do`, and without the delta rule `written`, those of the call's inputs."""
    return form.pieces if name == "do" else form.made


def streams(form: Form, size: Size) -> tuple[int, ...]:
    """For every call of `Across.fold`, in order, how many copies its barrier waits for. float32 comes through registers."""
    one, made = form.pieces, form.made
    counts = (one + made * (1 + form.delta), one + made, *(2 * made,) * form.delta, (2 + (form.decay != "none")) * made)
    return () if form.exact else tuple(count * (1 if made > 1 else size.value_tiles) for count in counts)
