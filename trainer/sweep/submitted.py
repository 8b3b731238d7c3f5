"""Slots in a cluster's queue, through submitit: each run is a job of its own, and the launcher stays to hand out the next.

For searches on a cluster, and for schedulers that submitit has a plugin for. A sweep on Slurm needs nobody to stay
(`trainer.sweep.slurm`). Imports no JAX.

What submitit pickles (a command line and three paths) lies in `submitit/RUN` below the sweep, and is read by the jobs and the
launcher of that sweep alone; nothing is put into run directories.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata import ConfigError
from trainer.sweep.slots import process_alive

if TYPE_CHECKING:
    import submitit

POLL = 1.0
"""Seconds between looks: of the launcher at a job, and of a job at whether it is to stop."""
SAVING = 60.0
"""Seconds that a run has to save when its job is preempted or out of time: submitit's warning is 90 seconds long."""


class Attempt:
    """What a job does: run a command until it ends or is to stop. Returns its exit code.

    Args:
      command: of the run.
      log: its output is appended to.
      control: a directory of this attempt's own: `began` is made here when the command starts, and `stop` asks it to end.
      directory: that the command runs in.
    """

    def __init__(self, command: Sequence[str], log: Path, control: Path, directory: Path):
        self.command, self.log, self.control, self.directory = list(command), log, control, directory
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        if (self.control / "stop").exists():
            return 75
        (self.control / "began").touch()
        signal.signal(signal.SIGTERM, lambda *_: self._ask())  # by which a job is cancelled; submitit would let it pass
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # signals of the scheduler are for this process, which knows what they mean
            )
        try:
            while self.process.poll() is None:
                if (self.control / "stop").exists():
                    self._ask()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(POLL)
            return self.process.returncode
        finally:
            if self.process.poll() is None:
                self.process.kill()

    def checkpoint(self) -> Any:
        """submitit calls this when the job is preempted or almost out of time: save, and go on as the next attempt."""
        from submitit.helpers import DelayedSubmission

        self._ask()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SAVING)
        return DelayedSubmission(Attempt(self.command, self.log, self.control, self.directory))

    def _ask(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()


class Job:
    """A job as the launcher sees a process."""

    def __init__(self, job: submitit.Job[int], control: Path, log: Path):
        self.job, self.control, self.log = job, control, log
        self.returncode: int | None = None
        self._looked = float("-inf")

    def poll(self) -> int | None:
        """The exit code of the run; 1, with the reason in its log, if the job ended without one."""
        if self.returncode is None and time.monotonic() - self._looked >= POLL:
            self._looked = time.monotonic()
            if self.job.done():
                self.returncode = self._result()
        return self.returncode

    def _result(self) -> int:
        import submitit

        try:
            return int(self.job.result())
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
            with open(self.log, "a") as log:
                log.write(f"error: job {self.job.job_id} ended without a word of its run: {lines[-1] if lines else error!r}\n")
            return 1

    def terminate(self) -> None:
        """Ask the run to save and end; a job that has not begun is cancelled."""
        if not (self.control / "began").exists():
            self.kill()
        (self.control / "stop").touch()

    def kill(self) -> None:
        """Cancel the job."""
        self.job.cancel(check=False)


@dataclasses.dataclass(frozen=True)
class SubmittedSlot:
    """Room for one job.

    Args:
      index: from 0.
      cluster: submitit's name of the scheduler.
      options: for `AutoExecutor.update_parameters`.
      folder: that submitit's files are kept in, one directory a run.
    """

    index: int
    cluster: str
    options: Mapping[str, Any]
    folder: Path

    def start(self, command: Sequence[str], log: Path) -> Job:
        """Submit a job that runs the command."""
        import submitit

        folder = self.folder / log.stem
        control = (folder / uuid.uuid4().hex[:8]).absolute()
        control.mkdir(parents=True)
        executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        executor.update_parameters(**{"name": log.stem, **self.options})
        return Job(executor.submit(Attempt(command, log.absolute(), control, Path.cwd())), control, log)

    def describe(self, process: Job) -> dict[str, object]:
        """For the ledger."""
        return {"slot": {"index": self.index, "cluster": self.cluster, "job": process.job.job_id}}

    def alive(self, start: Mapping[str, Any], words: str) -> bool:
        """Whether the job of a row of the ledger is running or waits in the queue."""
        from submitit.core.plugins import get_executors

        slot = start.get("slot", {})
        if slot.get("cluster") == "local":  # submitit knows only its own children; the number of a job is its process's
            return start.get("host") == socket.gethostname() and process_alive(int(slot["job"]), words)
        if slot.get("cluster") not in get_executors():
            return False
        job = get_executors()[slot["cluster"]].job_class(self.folder / words, slot["job"])
        return not job.done()


def make_submitted_slots(count: int, options: Mapping[str, str], folder: Path) -> list[SubmittedSlot]:
    """Slots of one scheduler.

    Args:
      count: jobs in the queue at a time.
      options: as typed: `cluster` (default: the one that submitit finds here), and what its `update_parameters` takes, such as
        `timeout_min` or `slurm_partition`. Values are read as JSON where they are JSON.
      folder: for submitit's files.

    Raises:
      ConfigError: submitit is missing, knows no such cluster, or refuses an option.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("--launcher submitit needs submitit: pip install -e '.[sweep]'") from None
    rest = {name: _value(text) for name, text in options.items() if name != "cluster"}
    cluster = options.get("cluster", submitit.AutoExecutor.which())
    if cluster == "debug":
        raise ConfigError("--submitit.cluster=debug runs jobs within the launcher; local makes processes of them")
    several = [name for name in rest if name.removeprefix(f"{cluster}_") in ("nodes", "tasks_per_node", "ntasks_per_node")]
    if several := [name for name in several if rest[name] != 1]:
        raise ConfigError(f"--submitit.{several[0]}: a job here is one process; --launcher slurm starts several with srun")
    try:
        submitit.AutoExecutor(folder=folder, cluster=cluster).update_parameters(**rest)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"--submitit.*: {error}") from None
    return [SubmittedSlot(index, cluster, rest, folder.absolute()) for index in range(count)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
