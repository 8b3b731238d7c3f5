"""The inputs of the next steps, read and placed on the devices while the present one runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from trainer.data.dataset import TrainIterator
from trainer.setup import Setup

TOGETHER = 8
"""Steps whose inputs are prepared in one go.

Right after a step on CPU the caches hold none of what preparing needs; eight at a time cost little more than one
(`benchmarks/loop_overhead.py`)."""


class Inputs(NamedTuple):
    """What a step is called with beside the state, and where the data stands after it."""

    batch: dict[str, jax.Array]
    rates: dict[str, jax.Array]
    host_rates: Mapping[str, Any]
    position: dict[str, Any]


class Prefetch:
    """Inputs of the steps `first` to `last` in order; a context manager.

    The thread only copies rows and starts their transfer, so order and content are those of `rows`. On CPU, where a step
    occupies the main thread, this takes reading out of the time of a step.

    Args:
      setup: of the run.
      rows: this process's training batches; nobody else may read from it.
      rates: learning rates of a step, by group.
      first, last: the steps; the inputs of the first ones are begun at once.
    """

    def __init__(self, setup: Setup, rows: TrainIterator, rates: Callable[[int], Mapping[str, Any]], first: int, last: int):
        self._setup, self._rows, self._rates, self._last = setup, rows, rates, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ready: deque[Inputs] = deque()
        self._step = first  # the first one that is not begun
        self._begun: Future[list[Inputs]] | None = None
        self.begin()

    def begin(self) -> None:
        """Start on the next inputs unless they are begun. Call it right before the main thread leaves Python for a step:
        the two threads take turns there."""
        if self._begun is None and self._step <= self._last:
            steps = range(self._step, min(self._step + TOGETHER, self._last + 1))
            self._step = steps.stop
            self._begun = self._thread.submit(self._prepare, steps)

    def take(self) -> Inputs:
        """The inputs of the next step. Raises what reading raised."""
        if not self._ready:
            self.begin()
            self._ready.extend(self._begun.result())
            self._begun = None
        return self._ready.popleft()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, steps: range) -> list[Inputs]:
        rates = [self._rates(step) for step in steps]
        batches, positions = [], []
        for _ in steps:
            batches.append(next(self._rows))
            positions.append(self._rows.get_state())
        placed = self._setup.put_inputs(batches, rates)
        return [Inputs(*pair, rate, at) for pair, rate, at in zip(placed, rates, positions, strict=True)]
