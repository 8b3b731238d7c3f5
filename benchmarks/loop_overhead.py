"""What the training loop adds to the bare jitted step of the same model, in one process.

    python -m benchmarks.loop_overhead
    python -m benchmarks.loop_overhead --config configs/tiny.py --pairs 60 --set data.batch_size=32

The run is a real one, `trainer.loop.Loop` with its data, metrics rows, console and signal handling; evaluation and
checkpoints come only at its end, after the measurement. Every `--segment` steps it is held (inside its request for the
next batch) while the bare step takes as many steps on a state of its own and a batch that already lies on the device.
Each loop segment is compared with the mean of the bare segments before and after it, so that drift cancels.

Where the compute is synchronous (CPU), the time outside the step call is measured too: it is the overhead without the
noise of the step itself. Target: below 1 %, for steps of 50 ms or more.
"""

from __future__ import annotations

import collections
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import Neighbours, Patience, overrides, parser, quiet_only, show, shown_ratio, spread, write_result
from trainer import command, devices, loop
from trainer import config as configuration

WARM_UP = 12
"""Steps of the loop before the first segment: the first compiles, and the first row of metrics is unusual."""

WINDOW = 1.0
"""Seconds over which the CPU that others use is told; the kernel's ticks are too coarse for one segment."""


class Held:
    """The loop's batches, which hold the loop at the end of every segment and let the bare step run."""

    def __init__(self, batches: Any, owner: Measured):
        self._batches, self._owner, self._taken = batches, owner, 0

    def begin(self) -> None:
        """As `Prefetch.begin`."""
        self._batches.begin()

    def take(self) -> Any:
        """As `Prefetch.take`."""
        owner = self._owner
        if self._taken >= WARM_UP and (self._taken - WARM_UP) % owner.segment == 0:
            owner.boundary(first=self._taken == WARM_UP)
        self._taken += 1
        with owner.clock("waiting for the batch"):
            return self._batches.take()


class Measured(loop.Loop):
    """A run whose loop is timed in segments, with bare segments between them. The rest of the arguments are `Loop`'s."""

    def __init__(self, segment: int, patience: float, *arguments: Any):
        super().__init__(*arguments)
        self.segment, self._calm = segment, Patience(patience)
        self.loop_seconds: list[float] = []  # a step
        self.bare_seconds: list[float] = []  # a step; one more than loop segments
        self.others: list[float | None] = []  # cores that other processes used around a loop segment
        self.host_seconds: list[dict[str, float]] = []  # a step of each loop segment, by part of the loop
        self._spent: collections.Counter[str] = collections.Counter()
        self._latest: Any = None

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the time inside to a part of the loop."""
        begin = time.perf_counter()
        yield
        self._spent[part] += time.perf_counter() - begin

    def _steps(self, state: Any, batches: Any, *more: Any) -> Any:
        self._bare_state = jax.tree.map(lambda leaf: leaf.copy(), state)
        self._jitted, self.train_step = self.train_step, self._timed_step
        self.reporter.train = self._timed("metrics row", self.reporter.train)
        for name in dir(self.setup):
            if name == "put_wish":  # the others are called by another thread
                setattr(self.setup, name, self._timed(name, getattr(self.setup, name)))
        return super()._steps(state, Held(batches, self), *more)

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            with self.clock(part):
                return function(*arguments)

        return timed

    def _timed_step(self, state: Any, *inputs: Any) -> Any:
        if self._latest is None:
            self._inputs = inputs  # the batch and rates of the first step stay on the device for the bare ones
        with self.clock("step"):
            state, self._latest = self._jitted(state, *inputs)
        return state, self._latest

    def _bare(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            self._bare_state, metrics = self._jitted(self._bare_state, *self._inputs)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - begin) / steps

    def boundary(self, first: bool) -> None:
        """End a loop segment, run a bare one, begin the next."""
        jax.block_until_ready(self._latest)
        if first:
            self._bare(WARM_UP)
            self._calm.wait()
            self._open_window()
        else:
            self.loop_seconds.append((time.perf_counter() - self._begin) / self.segment)
            self.host_seconds.append({part: spent / self.segment for part, spent in self._spent.items()})
        self.bare_seconds.append(self._bare(self.segment))
        if time.perf_counter() - self._window >= WINDOW:
            self._close_window()
            self._calm.wait()
            self._open_window()
        self._spent.clear()
        self._begin = time.perf_counter()

    def _open_window(self) -> None:
        self._neighbours, self._cpu, self._window = Neighbours(), time.process_time(), time.perf_counter()

    def _close_window(self) -> None:
        """Note what other processes used for all segments since the last time."""
        used = self._neighbours.cores(time.perf_counter() - self._window, time.process_time() - self._cpu)
        self.others += [used] * (len(self.loop_seconds) - len(self.others))


def summary(run: Measured) -> dict[str, Any]:
    """Ratios, and where the host's time goes."""
    around = [(a + b) / 2 for a, b in zip(run.bare_seconds, run.bare_seconds[1:], strict=False)]
    ratios = [whole / bare for whole, bare in zip(run.loop_seconds, around, strict=True)]
    # Two neighbouring bare segments differ by noise alone: how far a ratio can be off.
    null = [b / a for a, b in zip(run.bare_seconds, run.bare_seconds[1:], strict=False)]
    quiet = quiet_only(ratios, run.others + [None] * (len(ratios) - len(run.others)))
    parts = sorted({part for segment in run.host_seconds for part in segment} - {"step"})
    outside = [total - segment["step"] for total, segment in zip(run.loop_seconds, run.host_seconds, strict=True)]
    # Means, since a row of metrics comes only every so many steps.
    host = {part: 1e3 * statistics.mean(segment.get(part, 0.0) for segment in run.host_seconds) for part in parts}
    host["the rest"] = 1e3 * statistics.mean(outside) - sum(host.values())
    found = {
        "bare_milliseconds": spread([1e3 * value for value in run.bare_seconds]),
        "loop_milliseconds": spread([1e3 * value for value in run.loop_seconds]),
        "loop_over_bare": spread(ratios),
        "loop_over_bare_quiet": spread(quiet) if quiet else None,
        "bare_over_bare": spread(null),
        "host_milliseconds": host,
    }
    if jax.default_backend() == "cpu":
        found["outside_step_over_step"] = spread(
            [outer / segment["step"] for outer, segment in zip(outside, run.host_seconds, strict=True)]
        )
    return found


def train(config: Any, segment: int, patience: float) -> Measured:
    """A whole run in a temporary directory; returns it for its measurements."""
    made: list[Measured] = []

    def make(*arguments: Any) -> Measured:
        made.append(Measured(segment, patience, *arguments))
        return made[0]

    usual, loop.Loop = loop.Loop, make
    try:
        with tempfile.TemporaryDirectory() as folder:
            loop.train(config, Path(folder) / "run")
    finally:
        loop.Loop = usual
    return made[0]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--config", default="configs/tiny.py", help="the run (default configs/tiny.py)")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the config")
    arguments.add_argument("--pairs", type=int, default=300, help="segments of the loop")
    arguments.add_argument("--segment", type=int, default=2, help="steps of a segment; short ones see less drift")
    chosen = arguments.parse_args(argv)
    steps = WARM_UP + chosen.pairs * chosen.segment + 1
    short = {"train.steps": steps, "evaluate.every": 0, "checkpoint.every": 0, "evaluate.batches": 1}
    short |= {"evaluate.final_batches": 1, "log.sample_tokens": 0}
    changes = [*overrides(chosen.set), *((path, str(value)) for path, value in short.items())]
    config = configuration.load(chosen.config, changes).config
    devices.start(config)
    run = train(config, chosen.segment, chosen.patience)
    found = summary(run)
    report(found)
    options = {"config": chosen.config, "set": chosen.set, "pairs": chosen.pairs, "segment": chosen.segment}
    write_result("loop_overhead", {"options": options} | found, chosen.out)


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    rows = [
        ["bare step, ms", f"{found['bare_milliseconds']['median']:.2f}", ""],
        ["loop step, ms", f"{found['loop_milliseconds']['median']:.2f}", ""],
    ]
    for name, key in (
        ("loop / bare", "loop_over_bare"),
        ("loop / bare, quiet segments", "loop_over_bare_quiet"),
        ("bare / bare (noise)", "bare_over_bare"),
        ("outside the step / step", "outside_step_over_step"),
    ):
        if found.get(key):
            quartiles = found[key]["quartiles"]
            rows.append([name, shown_ratio(found[key], 4), f"{quartiles[0]:.4f}-{quartiles[1]:.4f} n={found[key]['count']}"])
    rows += [[f"host: {part}, ms a step", f"{value:.3f}", ""] for part, value in found["host_milliseconds"].items()]
    show("training loop against the bare step", ["", "median [95 %]", "quartiles"], rows)


if __name__ == "__main__":
    command.run(main)
