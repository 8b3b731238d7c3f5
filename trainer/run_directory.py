"""The run directory: one process at a time, every file either old or new, nothing in it ever executed. Imports no JAX.

config.json                 resolved config, canonical, runnable
overrides.json              what the command line changed
environment.json            versions, devices, source revision and diff, command line of the first start
environment.resumed.jsonl   the same of every later start, one line each, with the step it went on from
metrics.jsonl               one row a line
status.json                 {"state", "step", "message", "updated"}
checkpoints/                see `trainer.checkpoint`
.lock                       held while a process trains here
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from strata import StrataError
from trainer.atomic_files import canonical_json, write_bytes_atomic, write_json_atomic

STATES = ("running", "finished", "preempted", "failed")

_claimed: dict[Path, IO[bytes]] = {}  # by this process; POSIX locks do not keep a process out of what it locked itself


class RunDirectory:
    """One run on disk. Making the object touches nothing; `claim` makes the directory and locks it.

    In a run of several processes, process 0 alone claims and writes.

    Args:
      path: the run directory.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def metrics(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """`checkpoints/`."""
        return self.path / "checkpoints"

    # ---- one process at a time

    def claim(self) -> None:
        """Makes the directory and locks it until `release`, or until this process ends in whatever way, `kill -9` included.

        Raises:
          StrataError: another process trains here (it is named), or the directory cannot be made or written.
        """
        try:
            str(self.path).encode()
            key = self.path.resolve()
        except (UnicodeEncodeError, OSError, RuntimeError):  # RuntimeError: links in a circle
            raise StrataError(
                f"{str(self.path)!r} cannot be a run directory: its name is not UTF-8, or its links lead nowhere"
            ) from None
        if key in _claimed:
            raise StrataError(f"{self.path} is already in use by this process")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A lock of the process, not of the open file: forked data workers that outlive a kill -9 do not hold it.
            file = open(self.path / ".lock", "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StrataError(f"the run directory {self.path} cannot be written: {error.strerror}") from error
        for attempt in range(10):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if attempt < 9:  # `running` of another process takes the lock for an instant
                    time.sleep(0.02)
            except OSError as error:
                file.close()
                raise StrataError(f"the run directory {self.path} cannot be locked: {error.strerror}") from error
        else:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            file.close()
            raise StrataError(f"{self.path} is in use by another process (id {holder} on the machine where it was started)")
        _claimed[key] = file
        with contextlib.suppress(OSError):  # the lock is what counts; a full disk has no room for the name of its holder
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Gives the lock back; does nothing without one."""
        if file := _claimed.pop(self.path.resolve(), None):
            file.close()

    def __enter__(self) -> RunDirectory:
        self.claim()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def running(self) -> bool:
        """Whether a live process holds the lock; a `status.json` that says running after a `kill -9` does not count."""
        if self.path.resolve() in _claimed:
            return True
        try:
            with open(self.path / ".lock") as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return False
        return False

    # ---- files

    def write_config(self, canonical: str, overrides: Any = None) -> None:
        """Writes `config.json` and `overrides.json`.

        Args:
          canonical: the resolved config as JSON text, stored byte for byte.
          overrides: JSON-able; None leaves `overrides.json` as it is, and where there is none says that the config came from
            no file and that nothing in it was overridden.
        """
        if overrides is None and not (self.path / "overrides.json").exists():
            overrides = {"config": None, "name": self.path.name, "overrides": []}
        with self._writing("config.json"):
            write_bytes_atomic(self.path / "config.json", canonical.encode())
        if overrides is not None:
            self.write_json("overrides.json", overrides)

    def read_config(self) -> str | None:
        """The text of `config.json`, None if there is none; what is not UTF-8 in it becomes U+FFFD."""
        try:
            return (self.path / "config.json").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StrataError(f"{self.path / 'config.json'} cannot be read: {error.strerror}") from error

    def write_environment(self, environment: dict[str, Any], step: int = 0) -> dict[str, Any] | None:
        """Keeps the environment of this start without losing that of an earlier one.

        The first goes to `environment.json`; later ones are appended to `environment.resumed.jsonl` with `step`.

        Args:
          environment: from `trainer.environment.describe_environment`.
          step: the step that a resumed run goes on from.

        Returns:
          The environment of the first start, None if this is it. `trainer.environment.differences` compares the two.
        """
        first = self.read_json("environment.json")
        if first is None:
            self.write_json("environment.json", environment)
            return None
        name = "environment.resumed.jsonl"
        with self._writing(name), open(self.path / name, "a") as file:
            file.write(canonical_json({"step": step, **environment}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return first

    def write_status(self, state: str, step: int, message: str = "") -> None:
        """Replaces `status.json` atomically.

        Args:
          state: one of `STATES`.
          step: updates done.
          message: one line for people; why, where the state is `failed`.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r} is not one of {', '.join(STATES)}")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.write_json("status.json", {"state": state, "step": step, "message": message, "updated": now})

    def read_status(self) -> dict[str, Any] | None:
        """The content of `status.json`, None if there is none."""
        status = self.read_json("status.json")
        if status is not None and not (status.get("state") in STATES and isinstance(status.get("step"), int)):
            raise StrataError(f"{self.path / 'status.json'} is damaged: it has no state, or no step")
        return status

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a JSON file of the run atomically.

        Raises:
          StrataError: it could not be written; the message names the file, and the old one is untouched.
        """
        with self._writing(name):
            write_json_atomic(self.path / name, value)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file of the run, None if it is not there.

        Raises:
          StrataError: it is not a JSON object; the message names the file.
        """
        try:
            found = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StrataError(f"{self.path / name} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise StrataError(f"{self.path / name} is damaged: {error}") from error
        if not isinstance(found, dict):
            raise StrataError(f"{self.path / name} is damaged: it holds a {type(found).__name__} where an object belongs")
        return found

    @contextlib.contextmanager
    def _writing(self, name: str):
        try:
            yield
        except OSError as error:
            raise StrataError(f"{self.path / name} could not be written: {error.strerror}") from error
