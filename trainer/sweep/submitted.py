"""Slots in a cluster's queue, through submitit: each run is a job of its own, and the launcher stays to hand out the next.

For searches on a cluster, and for schedulers that submitit has a plugin for. A sweep on Slurm needs nobody to stay
(`trainer.sweep.slurm`). Imports no JAX.

A job and its launcher speak through a directory of empty files and one number, which works wherever they share a disk:

sweeps/NAME/submitit/RUN/    submitit's own files: what it pickles is a command line and three paths, read by that job alone
    ATTEMPT/began            the job has started its command
    ATTEMPT/stop             the launcher asks it to save and end; a job that begins later ends at once
    ATTEMPT/kill             to end now
    ATTEMPT/exit             the command's exit code
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata import ConfigError, StrataError
from trainer.atomic_files import write_bytes_atomic
from trainer.sweep.slots import process_alive
from trainer.sweep.submitit_options import check_options

if TYPE_CHECKING:
    import submitit

WATCH = 1.0
"""Seconds between looks of a job at its directory."""
QUEUE = 15.0
"""Seconds between questions to a scheduler about one job."""
SAVING = 60.0
"""Seconds that a run has to save when its job is preempted or out of time: submitit's warning is 90 seconds long."""
CANCELLED = 10.0
"""Seconds after which a job that was cancelled counts as gone."""


class Attempt:
    """What a job does: run a command until it ends or is to stop. Returns its exit code.

    Args:
      command: of the run.
      log: its output is appended to.
      control: the directory of this attempt.
      directory: that the command runs in.
    """

    def __init__(self, command: Sequence[str], log: Path, control: Path, directory: Path):
        self.command, self.log, self.control, self.directory = list(command), log, control, directory
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        code = 75 if (self.control / "stop").exists() else self._run()
        write_bytes_atomic(self.control / "exit", str(code).encode())
        return code

    def _run(self) -> int:
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
                if (self.control / "kill").exists():
                    self.process.kill()
                elif (self.control / "stop").exists():
                    self._ask()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(WATCH)
            return self.process.returncode
        finally:
            if self.process.poll() is None:
                self.process.kill()

    def checkpoint(self) -> Any:
        """submitit calls this when the job is almost out of time or preempted with a warning: save, and go on in the queue."""
        from submitit.helpers import DelayedSubmission

        self._ask()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SAVING)
        (self.control / "began").unlink(missing_ok=True)
        return DelayedSubmission(Attempt(self.command, self.log, self.control, self.directory))

    def _ask(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()


class Job:
    """A job as the launcher sees a process.

    Args:
      job: submitit's.
      cluster: submitit's name of the scheduler.
      control: the directory of the attempt.
      log: of the run.
    """

    def __init__(self, job: submitit.Job[int], cluster: str, control: Path, log: Path):
        self.job, self.cluster, self.control, self.log = job, cluster, control, log
        self.returncode: int | None = None
        self._cancelled: float | None = None
        self._looked = time.monotonic()
        self._missed = 0

    def poll(self) -> int | None:
        """The exit code of the run; 1, with the reason in its log, if the job has left the queue without one."""
        if self.returncode is None:
            self.returncode = self._found()
            if self.returncode is not None:  # a scheduler may start it once more, after a failure of its node, say
                (self.control / "stop").touch()
        return self.returncode

    def _found(self) -> int | None:
        if (code := _number(self.control / "exit")) is not None:
            return code
        now = time.monotonic()
        if self._cancelled is not None and now - self._cancelled > CANCELLED:
            return -signal.SIGKILL
        if now - self._looked < QUEUE:
            return None
        self._looked = now
        self._missed = 0 if in_queue(self.cluster, self.job.job_id, self.control.parent.name) else self._missed + 1
        if self._missed < 2:  # the file may be on its way
            return None
        with open(self.log, "a") as log:
            log.write(f"error: job {self.job.job_id} has left the queue without a word of its run\n")
        return 1

    def terminate(self) -> None:
        """Ask the run to save and end; a job that has not begun is cancelled."""
        (self.control / "stop").touch()
        if not (self.control / "began").exists() and self.returncode is None:
            self._cancel()
            self.returncode = 75

    def kill(self) -> None:
        """End it now."""
        (self.control / "kill").touch()
        self._cancel()

    def _cancel(self) -> None:
        if self._cancelled is None:
            self._cancelled = time.monotonic()
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

    stagger = False
    """A job may wait in the queue for hours; runs of the same program do not wait for it to compile."""

    def start(self, command: Sequence[str], log: Path) -> Job:
        """Submit a job that runs the command. Raises `StrataError` with the scheduler's words if it refuses twice."""
        import submitit

        folder = self.folder / log.stem
        for earlier in folder.glob("*/"):  # whatever became of them: one job a run
            (earlier / "stop").touch()
        control = folder / uuid.uuid4().hex[:8]
        control.mkdir(parents=True)
        executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        executor.update_parameters(**{"name": log.stem, **self.options})
        attempt = Attempt(command, log.absolute(), control, Path.cwd())
        try:
            job = _submit(executor, attempt)
        except (RuntimeError, OSError):  # a controller that is busy is not worth a sweep
            time.sleep(5)
            try:
                job = _submit(executor, attempt)
            except (RuntimeError, OSError) as error:
                raise StrataError(f"{self.cluster} refused the job of {log.stem}: {error}") from None
        return Job(job, self.cluster, control, log)

    def describe(self, process: Job) -> dict[str, object]:
        """For the ledger."""
        return {"slot": {"index": self.index, "cluster": self.cluster, "job": process.job.job_id}}


def _submit(executor: submitit.AutoExecutor, attempt: Attempt) -> submitit.Job[int]:
    """A Ctrl-C meanwhile reaches the launcher afterwards, and neither `sbatch` nor the processes of a local job at all."""
    with _without_interrupts():
        return executor.submit(attempt)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by what is started here
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_answers: dict[tuple[str, str], tuple[float, bool]] = {}


def in_queue(cluster: str, job: str, run: str) -> bool:
    """Whether a job runs or waits, asked at most every `QUEUE` seconds; True where the scheduler does not answer.

    Args:
      cluster: submitit's name of the scheduler; Slurm is asked by `squeue`, which needs no accounting.
      job: its id.
      run: name of the run directory.
    """
    asked, answer = _answers.get((cluster, job), (float("-inf"), True))
    if time.monotonic() - asked >= QUEUE:
        answer = _ask_queue(cluster, job, run)
        _answers[cluster, job] = time.monotonic(), answer
    return answer


def _ask_queue(cluster: str, job: str, run: str) -> bool:
    from trainer.sweep.slurm import call

    if cluster == "local":  # whose number of a job is that of its process
        return process_alive(int(job), run)
    if cluster == "slurm":
        try:
            return bool(call("squeue", "-h", "-j", job, "-o", "%T").strip())
        except StrataError as error:
            return "Invalid job id" not in str(error)
    from submitit.core.plugins import get_executors

    executor = get_executors().get(cluster)
    return executor is not None and not executor.job_class(Path(tempfile.gettempdir()), job).done(force_check=True)


def alive(start: Mapping[str, Any], run: str) -> bool:
    """Whether the job of a row of the ledger, a start without an end, runs or waits."""
    slot = start["slot"]
    here = slot["cluster"] != "local" or start.get("host") == socket.gethostname()
    return here and in_queue(slot["cluster"], slot["job"], run)


def make_submitted_slots(count: int, options: Mapping[str, str], folder: Path) -> list[SubmittedSlot]:
    """Slots of one scheduler.

    Args:
      count: jobs in the queue at a time.
      options: as typed (`trainer.sweep.submitit_options`).
      folder: for submitit's files.

    Raises:
      ConfigError: submitit is missing, knows no such cluster, or refuses an option.
    """
    if count < 1:
        raise ConfigError(f"--slots {count}: expected a whole number from 1 on")
    cluster, rest = check_options(options)
    return [SubmittedSlot(index, cluster, rest, folder.absolute()) for index in range(count)]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
