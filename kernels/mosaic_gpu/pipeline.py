"""Steps in order through the slots of shared memory: how copies and products overlap.

On its own a warpgroup begins the copies of the next step and computes. Specialised, the block's last warpgroup does nothing but
bring tiles, with few registers, and the others compute with what it gives up; a slot is theirs until each has freed it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.limits import BRINGING, COMPUTING, WORKERS
from kernels.mosaic_gpu.tiles import hidden

Issue = Callable[[Any, Any], None]
Body = Callable[[Any, Any, Any], Any]


def alone(count: Any, slots: int, issue: Issue, body: Body, carry: Any) -> Any:
    """Steps 0 .. count - 1: `issue(step, slot)` begins the copies of one, `body(step, slot, carry)` uses them.

    With two slots the copies of the next step are under way while one is used. A slot is filled again only after a commit: what
    was read from it has been read. A count that is not known yet may be 0.
    """
    if slots == 1:

        def one(step: Any, carry: Any) -> Any:
            issue(step, 0)
            carry = body(step, 0, carry)
            plgpu.commit_smem()
            return carry

        return lax.fori_loop(0, count, one, carry)
    pl.when(count > 0)(lambda: issue(0, 0))

    def ahead(step: Any, carry: Any) -> Any:
        slot = lax.rem(step, 2)

        @pl.when(step + 1 < count)
        def _next() -> None:
            issue(step + 1, 1 - slot)

        carry = body(step, slot, carry)
        plgpu.commit_smem()
        return carry

    return lax.fori_loop(0, count, ahead, carry)


def specialised(warpgroup: Any, computing: Callable[[], None], bringing: Callable[[], None]) -> None:
    """`computing` on the workers, `bringing` on the warpgroup behind them, each with its registers from the first line on."""

    def compute() -> None:
        plgpu.set_max_registers(COMPUTING, action="increase")
        computing()

    def bring() -> None:
        plgpu.set_max_registers(BRINGING, action="decrease")
        bringing()

    lax.cond(warpgroup < WORKERS, compute, bring)


def bring(count: Any, slots: int, issue: Issue, freed: Any) -> None:
    """The copies of all steps, each as soon as `freed` [slots] says that its slot is free. Returns when every slot is."""

    def one(step: Any, carry: None) -> None:
        slot = lax.rem(step, slots)
        plgpu.barrier_wait(freed.at[hidden(slot)])  # the address of a lone slot would be kept through both branches, and spill

        @pl.when(step < count)
        def _next() -> None:
            issue(step, slot)

    lax.fori_loop(0, count + slots, one, None)


def compute(count: Any, slots: int, body: Body, freed: Any, carry: Any) -> Any:
    """The steps on a warpgroup beside one that brings."""

    def one(step: Any, carry: Any) -> Any:
        slot = lax.rem(step, slots)
        carry = body(step, slot, carry)
        plgpu.commit_smem()  # what was read has been read, by every warp
        plgpu.barrier_arrive(freed.at[slot])
        return carry

    for slot in range(slots):  # all are free at first
        plgpu.barrier_arrive(freed.at[slot])
    return lax.fori_loop(0, count, one, carry)
