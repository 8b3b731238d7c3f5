"""Launching: one process a run, as many at a time as there are slots, stopped cleanly and started again at will.

The slots are shares of this machine (`trainer.sweep.slots`) or places in a cluster's queue (`trainer.sweep.submitted`).
Imports no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from trainer.sweep.display import Display
from trainer.sweep.ledger import last_ends, unfinished
from trainer.sweep.outcome import Outcome, outcome
from trainer.sweep.place import Place
from trainer.sweep.plan import Plan, Run
from trainer.sweep.slots import process_alive

POLL = 0.1
"""Seconds between looks at the processes."""
GRACE = 120.0
"""Seconds that a run has to save after it was told to stop; then it is killed, and goes on from its last checkpoint."""
NEVER_AGAIN = (2, 4)
"""Exit codes that a second try cannot change: a wrong config, missing or damaged data."""


class Process(Protocol):
    """What a slot runs: a `subprocess.Popen`, or a job that behaves as one."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Slot(Protocol):
    """Room for one run at a time."""

    @property
    def index(self) -> int: ...

    @property
    def stagger(self) -> bool:
        """Whether runs of one program wait until the first has compiled it."""
        ...

    def start(self, command: Sequence[str], log: Path) -> Process:
        """Begin; standard output and error are appended to `log`."""
        ...

    def describe(self, process: Process) -> dict[str, object]:
        """Fields of the ledger's row of a start: of the slot, and what its process can be found by again."""
        ...


@dataclasses.dataclass
class Active:
    """A process at work."""

    run: Run
    slot: Slot
    process: Process
    began: float  # monotonic
    step: int  # that it went on from
    rows: int  # bytes of metrics when it began
    stopped: float | None = None  # when it was told to
    late: bool = False  # because of the time limit


class Stop:
    """The signals that end a launch: the first asks the runs to save, a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.again = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.again |= number == signal.SIGINT and self.received is not None
        self.received = self.received or signal.Signals(number).name


class Launcher:
    """Runs what is missing of a plan.

    Args:
      place: of the sweep; the caller holds its lock.
      slots: of equal size.
      display: told of everything.
      retries: further attempts of a run that crashed or ran out of time without getting further.
      timeout: seconds an attempt may take; None: any.
      stop_after: seconds after which everything is stopped as by a signal; None: never.
    """

    def __init__(
        self,
        place: Place,
        slots: Sequence[Slot],
        display: Display,
        *,
        retries: int = 2,
        timeout: float | None = None,
        stop_after: float | None = None,
    ):
        self.place, self.slots, self.display = place, slots, display
        self.retries, self.timeout = retries, timeout
        self.deadline = None if stop_after is None else time.monotonic() + stop_after
        self.active: list[Active] = []
        self.foreign: dict[str, tuple[Run, Mapping[str, Any] | None]] = {}  # of a launcher that was killed, say; with its start
        self.attempts: dict[str, int] = {}  # without getting further
        self.compiled: set[str] = set()  # groups of which a run has made its first step
        self.ready: set[str] = set()  # finished runs that others start from
        self.failed: set[str] = set()  # for good; what tuning adds later does not try them again
        self.interrupted = 0  # runs that were stopped because the launcher was
        self.stop = Stop()

    def run(self, plan: Plan, again: Callable[[], Plan]) -> int:
        """Run everything, then what `again` adds once tuning runs have ended.

        Returns:
          0 if every run has finished or diverged, 1 if one failed, 75 if it was stopped.
        """
        with self.stop, self.display, self._no_orphans():
            while True:
                self.place.write_plan(plan)
                left = self._run_all(plan)
                if left:
                    self.display.say(f"stopped by {self.stop.received or '--stop_after'}; the same command goes on")
                    return 75
                if not plan.choices:
                    return 1 if self.failed else 0
                before, plan = plan, again()
                if (plan.runs, plan.later) == (before.runs, before.later):
                    return self._chosen(plan)

    def _chosen(self, plan: Plan) -> int:
        """Nothing more can be chosen; the exit code."""
        if names := ", ".join(choice.arm for choice in plan.choices if choice.chosen is None):
            self.display.say(f"nothing could be chosen for {names}: no point of the tuning has a number on every seed")
        return 1 if self.failed or names else 0

    @contextlib.contextmanager
    def _no_orphans(self) -> Iterator[None]:
        """If the launcher itself breaks (a full disk, say), its runs are told to save and end."""
        try:
            yield
        except BaseException:
            for entry in self.active:
                with contextlib.suppress(OSError):
                    entry.process.terminate()
            raise

    # ---- one plan

    def _run_all(self, plan: Plan) -> int:
        """How many runs were left because it was stopped; `failed` has those that failed."""
        self.display.begin(plan)
        waiting = self._look(plan)
        failed = self.failed
        while waiting or self.active or self.foreign:
            stopping = self.stop.received is not None or self._out_of_time()
            for done in [entry for entry in self.active if entry.process.poll() is not None]:
                self.active.remove(done)
                if self._reap(done, failed):
                    waiting.insert(0, done.run)
            self._take_back(waiting)
            if stopping:
                if not self.active:
                    return len(waiting) + len(self.foreign) + self.interrupted
                self._stop_all()
            else:
                self._check_time()
                self._drop_orphans(plan, waiting, failed)
                self._fill(waiting)
            self.display.update([(entry.run, entry.slot.index) for entry in self.active], len(waiting), len(self.foreign))
            time.sleep(POLL)
        return self.interrupted

    def _take_back(self, waiting: list[Run]) -> list[Run]:
        """The runs that ended at another process since the last look; what it left unfinished is first in line."""
        ended = []
        for name, (run, start) in list(self.foreign.items()):
            found = outcome(self.place.directory(run), run.steps)
            if not self._at_it(run, found, start):
                del self.foreign[name]
                if found.ended:
                    self._end(run, found, None)
                    ended.append(run)
                else:
                    waiting.insert(0, run)
        return ended

    def _drop_orphans(self, plan: Plan, waiting: list[Run], failed: set[str]) -> None:
        """Note which runs others may start from by now, and end those whose own will not be there."""
        pending = {entry.run.directory for entry in self.active} | {run.directory for run in waiting} | self.foreign.keys()
        steps = {run.directory: run.steps for run in plan.distinct}
        for run in list(waiting):
            for name in [name for name in run.needs if name not in self.ready and name not in pending]:
                found = outcome(self.place.runs / name, steps.get(name, 0))
                if found.state == "finished":
                    self.ready.add(name)
                    continue
                if found.state == "running":
                    continue
                waiting.remove(run)
                failed.add(run.directory)
                self._end(run, Outcome("failed", 0, f"the run that it starts from, {name}, is {found.state}"), None)
                break

    def _look(self, plan: Plan) -> list[Run]:
        """What has to be run; what ended before is written down if the ledger does not know of it."""
        rows = self.place.ledger.rows()
        known, lost = last_ends(rows), unfinished(rows)
        waiting = []
        ahead = {run.directory for run in self.place.to_make(plan)}
        for run in [run for run in plan.distinct if run.directory not in self.failed]:
            found = outcome(self.place.directory(run), run.steps)
            start = lost.get(run.directory)
            if self._at_it(run, found, start):
                self._leave(run, start)
                continue
            if found.ended:
                end = known.get(run.directory)
                if start is not None or end is None or (end["outcome"], end["step"]) != (found.state, found.step):
                    self._end(run, found, None)
                self.compiled.add(run.group)
                continue
            if start is not None:
                self._end(run, Outcome("lost", found.step, "its process is gone without a word"), None)
            if run.directory not in ahead:  # an earlier report knows it
                continue
            if found.step:
                self.compiled.add(run.group)
            waiting.append(run)
        return waiting

    def _at_it(self, run: Run, found: Outcome, start: Mapping[str, Any] | None) -> bool:
        """Whether a process is at a run of which the ledger has a start without an end: it may not have locked it yet."""
        if found.state == "running" or found.ended or start is None:
            return found.state == "running"
        if "job" in start.get("slot", {}):
            from trainer.sweep.submitted import alive

            return alive(start, run.directory)
        here = start.get("host") == socket.gethostname()
        return here and "pid" in start and process_alive(start["pid"], run.directory)

    def _fill(self, waiting: list[Run]) -> None:
        """Start runs in the free slots; runs of one program wait until the first of them has compiled it."""
        for entry in self.active:
            if _size(self.place.directory(entry.run) / "metrics.jsonl") > entry.rows:
                self.compiled.add(entry.run.group)
        taken = {entry.slot.index for entry in self.active}
        free = [slot for slot in self.slots if slot.index not in taken][
            : max(0, len(self.slots) - len(taken) - len(self.foreign))
        ]
        for slot in free:
            training = {entry.run.group for entry in self.active if entry.run.kind == "train"}
            compiling = training - self.compiled if slot.stagger else set()
            startable = (run for run in waiting if run.group not in compiling and self.ready.issuperset(run.needs))
            run = next(startable, None)
            if run is None:
                return
            waiting.remove(run)
            if outcome(self.place.directory(run), run.steps).state == "running":  # another sweep has it in its plan, too
                self._leave(run)
            else:
                self._start(run, slot)

    def _leave(self, run: Run, start: Mapping[str, Any] | None = None) -> None:
        self.foreign[run.directory] = run, start
        self.display.say(f"{run.title}: another process is at it; waiting for that one")

    def _start(self, run: Run, slot: Slot) -> None:
        self.place.write_config(run)
        log = self.place.log(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        directory = self.place.directory(run)
        step = outcome(directory, run.steps).step
        attempt = self.attempts[run.directory] = self.attempts.get(run.directory, 0) + 1
        process = slot.start(self.place.command(run), log)
        self._note("start", run, attempt=attempt, host=socket.gethostname(), **slot.describe(process))
        self.active.append(Active(run, slot, process, time.monotonic(), step, _size(directory / "metrics.jsonl")))

    def _reap(self, entry: Active, failed: set[str]) -> bool:
        """Write down how an attempt ended; whether to try again."""
        run, code = entry.run, entry.process.returncode
        found = outcome(self.place.directory(run), run.steps)
        seconds = round(time.monotonic() - entry.began, 2)
        if found.ended:
            self._end(run, found, code, seconds)
            return False
        if entry.stopped is not None and not entry.late:  # we are stopping
            self.interrupted += 1
            self._end(run, found, code, seconds)
            return False
        if found.state == "running":  # another process was faster
            self.attempts[run.directory] -= 1
            self._end(run, Outcome("preempted", found.step, "another process is at it"), code, seconds, again=True)
            self._leave(run)
            return False
        if found.step > entry.step:
            self.attempts[run.directory] = 0  # it got further, so trying again is no endless loop
        message = "ran out of time" if entry.late else "" if code == 75 else _last_error(self.place.log(run)) or found.message
        if code < 0:
            message = f"killed by {_signal(-code)}" + (f"; {message}" if entry.late else "")
        again = code not in NEVER_AGAIN and self.attempts[run.directory] <= self.retries
        state = "preempted" if code == 75 and again else "failed"
        self._end(run, Outcome(state, found.step, message), code, seconds, again=again)
        if not again:
            failed.add(run.directory)
        return again

    def _check_time(self) -> None:
        now = time.monotonic()
        for entry in self.active:
            if self.timeout is not None and now - entry.began > self.timeout:
                entry.late = True
                self._ask(entry)

    def _stop_all(self) -> None:
        for entry in self.active:
            self._ask(entry)

    def _ask(self, entry: Active) -> None:
        """Tell a run to save and end; kill it after a while, or on a second Ctrl-C."""
        now = time.monotonic()
        if entry.stopped is None:
            entry.stopped = now
            entry.process.terminate()
        elif self.stop.again or now - entry.stopped > GRACE:
            entry.process.kill()

    def _out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _end(self, run: Run, found: Outcome, code: int | None, seconds: float | None = None, again: bool = False) -> None:
        self._note(
            "end", run, outcome=found.state, step=found.step, exit=code, message=found.message, seconds=seconds, again=again
        )

    def _note(self, event: str, run: Run, **fields: Any) -> None:
        row = self.place.ledger.append(event, run=run.directory, arm=run.arm, seed=run.seed, stage=run.stage, **fields)
        self.display.event(run, row)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_error(log: Path) -> str:
    """The last message that a command printed for people, or its last line."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16384))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if starts:
        return " ".join(line.strip() for line in lines[starts[-1] : starts[-1] + 4])[:400].removeprefix("error: ")
    return next((line.strip()[:400] for line in reversed(lines) if line.strip()), "")
