"""One task of a Slurm array: runs one run, passes signals on, requeues itself when the run saved and asks to go on.

Imports no JAX.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from strata import ConfigError
from trainer.sweep.ledger import Ledger
from trainer.sweep.outcome import Outcome, outcome

RETRIES = 2
"""Further attempts of a run that crashed without getting further; a requeued one does not count."""


def main(argv: Sequence[str]) -> int:
    """`FILE INDEX`: run the command of that line; the exit code is the run's."""
    if len(argv) != 2 or not argv[1].isdecimal():
        raise ConfigError("usage: python -m trainer.sweep task FILE INDEX")
    lines = Path(argv[0]).read_text().splitlines()
    if int(argv[1]) >= len(lines):
        raise ConfigError(f"{argv[0]} has {len(lines)} tasks, none of number {argv[1]}")
    return Task(json.loads(lines[int(argv[1])])).run()


class Task:
    """The run of one line of the file of tasks."""

    def __init__(self, line: dict[str, Any]):
        self.line = line
        self.ledger = Ledger(line["sweep"])
        self.process: subprocess.Popen | None = None
        self.received: list[int] = []
        job, index = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
        self.name = f"{job}_{index}" if job else ""

    def run(self) -> int:
        """Until it has ended, was told to stop, or failed too often."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._pass_on)
        attempt = 0
        while True:
            before = outcome(self.line["directory"], self.line["steps"])
            if before.ended:
                self._end(before, None, None)
                return 0
            attempt += 1
            code, seconds = self._attempt(attempt)
            found = outcome(self.line["directory"], self.line["steps"])
            if found.ended:
                self._end(found, code, seconds)
                return code
            if code == 75 or self.received:
                requeue = signal.SIGTERM not in self.received
                self._end(found, code, seconds, again=requeue)
                if requeue:
                    self._requeue()
                return 75
            attempt = 0 if found.step > before.step else attempt
            again = code not in (2, 4) and attempt <= RETRIES
            self._end(Outcome("failed", found.step, found.message or f"exit {code}"), code, seconds, again=again)
            if not again:
                return code

    def _attempt(self, attempt: int) -> tuple[int, float]:
        began = time.monotonic()
        log = Path(self.line["log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self.process = subprocess.Popen(self.line["command"], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        slot = {"slurm": self.name, "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
        self._note("start", attempt=attempt, pid=self.process.pid, host=socket.gethostname(), slot=slot)
        for number in self.received:  # came before there was anybody to tell
            self.process.send_signal(number)
        return self.process.wait(), round(time.monotonic() - began, 2)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def _requeue(self) -> None:
        """Ask Slurm to run this task again, by `ARRAYJOB_TASK`: the id of the job alone would mean the whole array.

        A task that got SIGTERM is not requeued here: it was cancelled, or Slurm, which preempts it, requeues it itself.
        """
        if not self.name:
            return
        done = subprocess.run(["scontrol", "requeue", self.name], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"scontrol requeue {self.name}: {done.stderr.strip()}", file=sys.stderr, flush=True)

    def _end(self, found: Outcome, code: int | None, seconds: float | None, again: bool = False) -> None:
        fields = {"outcome": found.state, "step": found.step, "exit": code, "message": found.message}
        self._note("end", **fields, seconds=seconds, again=again)

    def _note(self, event: str, **fields: Any) -> None:
        known = {name: self.line[name] for name in ("run", "arm", "seed", "stage")}
        self.ledger.append(event, **known, **fields)
