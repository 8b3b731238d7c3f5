"""What a launch shows: a live table on a terminal, plain lines elsewhere; and the table of `status`. Imports no JAX."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from trainer.sweep.ledger import last_ends
from trainer.sweep.outcome import last_rows, row_at
from trainer.sweep.place import Place
from trainer.sweep.plan import Plan, Run

INTERVAL = 60.0
"""Seconds between lines of progress where there is no terminal."""


class Display:
    """Context manager.

    Args:
      place: of the sweep.
      file: where to; default: standard error.
    """

    def __init__(self, place: Place, file: TextIO | None = None):
        self.place = place
        self.file = file or sys.stderr
        self.console = Console(file=self.file, highlight=False)
        self.live: Live | None = None
        self.plan: Plan | None = None
        self.ended = 0
        self._shown = time.monotonic()

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def begin(self, plan: Plan) -> None:
        """A plan is about to be run."""
        self.plan, self.ended = plan, 0

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def event(self, run: Run, row: Mapping[str, Any]) -> None:
        """A row of the ledger."""
        if row["event"] == "start":
            attempt = f", attempt {row['attempt']}" if row["attempt"] > 1 else ""
            self.say(f"start  {run.title}  slot {row['slot']['index']}{attempt}  {run.directory}")
            return
        self.ended += row["outcome"] in ("finished", "diverged", "failed") and not row.get("again")
        words = [f"{row['outcome']:<9}", run.title, f"step {row['step']:,}"]
        words += [f"{row['seconds']:.0f} s"] if row.get("seconds") is not None else ["before"]
        words += [row["message"]] if row.get("message") else []
        words += ["trying again"] if row.get("again") else []
        self.say("  ".join(words))

    def update(self, active: Sequence[tuple[Run, int]], waiting: int, foreign: int) -> None:
        """Called often; draws when it is time to."""
        now = time.monotonic()
        if now - self._shown < (0.5 if self.live else INTERVAL):
            return
        self._shown = now
        rest = f"{waiting} waiting" + (f", {foreign} run by other processes" if foreign else "")
        if self.live:
            table = Table(box=box.SIMPLE, title=f"{len(active)} running, {rest}", title_justify="left")
            for column in ("slot", "run", "progress", "loss", "left"):
                table.add_column(column)
            for run, slot in active:
                table.add_row(str(slot), run.title, *progress(self.place, run))
            self.live.update(table, refresh=True)
        else:
            shown = "; ".join(f"{run.title} {progress(self.place, run)[0]}" for run, _ in active)
            self.say(f"running: {shown or 'none'}; {rest}")


def progress(place: Place, run: Run) -> tuple[str, str, str]:
    """How far a run is, its newest loss, and the time that its own speed leaves it, as text."""
    rows = last_rows(place.directory(run))
    row = rows.get("train") or rows.get("val")
    if row is None:
        return "starting", "", ""
    if run.steps and max(row["step"] for row in rows.values()) > run.steps:  # extended since: what is planned here is made
        return f"step {run.steps:,}/{run.steps:,} (100%)", _loss(row_at(place.directory(run), run.steps)), ""
    step = row["step"]
    share = f"step {step:,}" + (f"/{run.steps:,} ({step / run.steps:.0%})" if run.steps else "")
    each = row.get("timing", {}).get("step_seconds")
    left = f"{minutes((run.steps - step) * each)}" if each and run.steps > step else ""
    return share, _loss(row), left


def _loss(row: Mapping[str, Any]) -> str:
    loss = row.get("loss")
    return f"{loss:.4f}" if isinstance(loss, float) else str(loss or "")


def minutes(seconds: float) -> str:
    """`45 s`, `3.2 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def status_lines(place: Place, plan: Plan) -> list[str]:
    """The state of every run, and a summary, as lines of text."""
    ends = last_ends(place.ledger.rows())
    states: dict[str, int] = {}
    lines = []
    width = max((len(run.title) for run in plan.runs), default=0)
    for run in plan.runs:
        found = place.outcome(run, ends)
        states[found.state] = states.get(found.state, 0) + 1
        known = found.ended and place.remembered(run) is not None
        share, loss, left = ("known from an earlier report", "", "") if known else ("", "", "")
        if found.state != "missing" and not known:
            share, loss, left = progress(place, run)
        words = [f"{found.state:<9}", f"{run.title:<{width}}", f"{share:<22}", f"{loss:>8}"]
        if found.state == "running" and left:
            words.append(f"{left} left")
        if found.message and found.state != "finished":
            words.append(found.message[:160])
        lines.append("  ".join(words).rstrip())
    if plan.later:
        lines.append(f"later      {plan.later} runs whose config is chosen when the tuning runs have ended")
    for choice in plan.choices:
        if choice.chosen is not None:
            edge = "; it lies at the edge of what was tried" if choice.at_edge else ""
            lines.append(f"tuned      {choice.arm}: {choice.chosen} (mean {choice.means[choice.chosen]:.4f}){edge}")
    summary = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    lines.append(f"{plan.name}: {len(plan.runs)} runs: {summary}" + (f", {plan.later} later" if plan.later else ""))
    return lines
