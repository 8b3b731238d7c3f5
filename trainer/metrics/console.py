"""Progress for people: one live line on a terminal, plain lines at intervals elsewhere. Imports no JAX."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO


class Console:
    """Shows rows of metrics. It draws at most four times a second, from the caller's thread, and starts no other.

    Where nobody can be shown anything any more (a terminal that is gone, a pipe without a reader, a full disk under a log), it
    falls silent: no run ends for that.

    Args:
      steps: updates in the whole run.
      start: updates done before this process began (a resumed run), for the time that is left.
      file: where to; default: standard error, so that standard output stays free for results.
      terminal: whether to draw a live line; default: whether `file` is a terminal.
      interval: seconds between lines where it is not.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        steps: int,
        *,
        start: int = 0,
        file: TextIO | None = None,
        terminal: bool | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._steps = steps
        self._file = file or sys.stderr
        self._gone = self._file is None  # a process that was started without a standard error
        self._terminal = not self._gone and (self._file.isatty() if terminal is None else terminal)
        self._interval = 0.25 if self._terminal else interval
        self._clock = clock
        self._shown = -math.inf
        self._first: tuple[int, float] | None = None  # step and time when the first row came: what compiled is behind it
        self._row: Mapping[str, Any] | None = None
        self._pending = False
        self._progress = self._live(start) if self._terminal else None

    def update(self, row: Mapping[str, Any]) -> None:
        """Takes a row of training metrics; shows it if it is time to, and the last one always (see `close`)."""
        now = self._clock()
        if self._first is None:
            self._first = (row["step"], now)
        self._row, self._pending = row, True
        if now - self._shown >= self._interval or row["step"] >= self._steps:
            self._show(now)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Prints a row of evaluation metrics; it stays on the screen."""
        self.say(f"step {row['step']:,}  evaluation  {_numbers(row, skip=())}")

    def say(self, text: str) -> None:
        """Prints a line that stays on the screen, above the live one."""
        if self._progress:
            self._draw(lambda: self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True))
        else:
            self._draw(lambda: print(text, file=self._file, flush=True))

    def close(self) -> None:
        """Shows the last row if it was not shown yet, and leaves the terminal as it was; may be called twice."""
        if self._pending:
            self._show(self._clock())
        if self._progress:
            with contextlib.suppress(OSError, ValueError):  # it also gives standard output and standard error back
                self._progress.stop()
            self._progress = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self, row: Mapping[str, Any], now: float) -> str:
        """`step 120/1,000  12 %  ETA 1:05  loss 1.8120  bpb 2.6140  45.2k tok/s  MFU 41.2 %`."""
        step = row["step"]
        speed = row.get("timing", {})
        words = [f"step {step:,}/{self._steps:,}", f"{100 * step // max(1, self._steps)} %", f"ETA {self._eta(step, now)}"]
        words.append(_numbers(row, skip=("objective",)))
        if "tokens_per_second" in speed:
            words.append(f"{_short(speed['tokens_per_second'])} tok/s")
        if "mfu" in speed:
            words.append("MFU n/a" if speed["mfu"] is None else f"MFU {100 * speed['mfu']:.1f} %")
        return "  ".join(words)

    def _eta(self, step: int, now: float) -> str:
        first_step, first_time = self._first or (step, now)
        if step >= self._steps:
            return "0:00"
        if step == first_step:
            return "-:--"
        return duration((now - first_time) / (step - first_step) * (self._steps - step))

    def _show(self, now: float) -> None:
        self._shown, self._pending = now, False
        text = self.line(self._row, now)
        if self._progress:
            self._progress.update(self._task, completed=self._row["step"], description=text)
            self._draw(self._progress.refresh)
        else:
            self._draw(lambda: print(text, file=self._file, flush=True))

    def _draw(self, how: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            how()
        except (OSError, ValueError):  # ValueError: the file was closed
            self._gone = True

    def _live(self, start: int) -> Any:
        from rich.console import Console as Screen
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        screen = Screen(file=self._file, force_terminal=True)
        # No refresh thread: it would take the interpreter lock from the training loop ten times a second.
        progress = Progress(BarColumn(bar_width=20), text, console=screen, auto_refresh=False)
        self._task = progress.add_task("starting ...", total=self._steps, completed=start)
        self._draw(progress.start)
        return progress


def duration(seconds: float) -> str:
    """`1:05`, `2:03:04`, `3 d 04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _numbers(row: Mapping[str, Any], skip: tuple[str, ...]) -> str:
    """Loss, bits per byte and what else an evaluation measured; a training row has too much else."""
    wanted = ("loss", "bpb", "accuracy", "perplexity") if row["split"] == "val" else ("loss", "bpb", "accuracy")
    found = [(name, row[name]) for name in wanted if name in row and name not in skip]
    return "  ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in found)
