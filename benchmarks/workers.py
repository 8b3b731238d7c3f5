"""Programs that take training steps on request, in processes of their own, so that they can be compared in alternation.

What a step costs depends on settings of the whole process (the allocator, asynchronous dispatch, thread pools), so each
contestant keeps its process for the whole comparison. The protocol is lines of JSON, and any program can speak it:

    worker -> {"ready": "a name", "tokens": 1024}         once it has compiled and warmed up; `tokens` a step
    driver -> 12                                          a number of steps
    worker -> {"seconds": 0.61, "cpu": 1.15, "loss": 5.2} wall-clock and CPU seconds of all of them together; the last loss
    driver closes the pipe                                the worker ends
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import Neighbours, Patience

WARM_UP = 4


def serve(name: str, tokens: int, step: Callable[[], float]) -> None:
    """Speak the protocol as a worker until the driver closes the pipe.

    Args:
      name: of the contestant.
      tokens: trained on in one step.
      step: takes one training step and returns its loss, which makes sure that the step is over.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not come between the answers
    for _ in range(WARM_UP):
        step()
    print(json.dumps({"ready": name, "tokens": tokens}), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            loss = step()
        found = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}
        print(json.dumps(found), file=answers, flush=True)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some consecutive steps of one worker."""

    seconds: float  # a step, wall clock
    cpu: float  # a step, CPU seconds of the worker
    others: float | None  # cores that other processes used meanwhile
    loss: float


class Worker:
    """A contestant in its own process.

    Args:
      name: how it is shown.
      command: starts it.

    Raises:
      RuntimeError: it ended before it was ready; the end of its standard error is in the message.
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1)
        self._process = subprocess.Popen(list(command), **pipes)
        self.tokens = int(self._answer()["tokens"])

    def segment(self, steps: int) -> Segment:
        """Let it take `steps` steps. Raises `RuntimeError` if it ends or its loss is not finite."""
        neighbours = Neighbours()
        self._process.stdin.write(f"{steps}\n")
        found = self._answer()
        if not math.isfinite(found["loss"]):
            raise RuntimeError(f"worker {self.name}: the loss became {found['loss']}, which says nothing about speed")
        others = neighbours.cores(found["seconds"], found["cpu"])
        return Segment(found["seconds"] / steps, found["cpu"] / steps, others, found["loss"])

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"worker {self.name} ended with code {code}:\n{self._errors.read()[-2000:]}")
        return json.loads(line)


def alternate(workers: Sequence[Worker], rounds: int, seconds: float, patience: float = 0.0) -> dict[str, list[Segment]]:
    """Segments of about `seconds` of every worker in turn, in reversed order every other round.

    Args:
      workers: whom to compare.
      rounds: segments of each.
      seconds: length of a segment.
      patience: how long to wait, in all, for moments without other load.

    Returns:
      By name of the worker, one segment a round; those of a round are neighbours in time and make the pairs.
    """
    calm = Patience(patience)
    calm.wait()
    steps = {worker.name: max(1, round(seconds / worker.segment(2).seconds)) for worker in workers}
    found: dict[str, list[Segment]] = {worker.name: [] for worker in workers}
    for number in range(rounds):
        calm.wait()
        for worker in workers if number % 2 == 0 else reversed(workers):
            found[worker.name].append(worker.segment(steps[worker.name]))
    return found
