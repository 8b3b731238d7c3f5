"""TensorBoard event files as a mirror of `metrics.jsonl`. Imports no JAX; needs the extra `tensorboard` (tensorboardX)."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import ConfigError, StrataError
from trainer.metrics.jsonl import read_metrics, scalars

DIRECTORY = "tensorboard"

FLUSH = 10.0
"""Seconds for which rows may stay in memory while others come."""


class TensorBoardMirror:
    """Repeats rows to `tensorboard/` in the run directory.

    Args:
      directory: the run directory.
      resumed_at: the step that a resumed run goes on from; later points of the process before it are hidden.

    Raises:
      ConfigError: tensorboardX is not installed; the message names the extra.
      StrataError: the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resumed_at: int | None = None):
        try:
            from tensorboardX.event_file_writer import EventsWriter
        except ImportError:
            raise ConfigError(
                "log.tensorboard = true needs the package tensorboardX: pip install -e '.[tensorboard]'"
            ) from None
        files = Path(directory) / DIRECTORY
        try:
            files.mkdir(parents=True, exist_ok=True)
            # Not its SummaryWriter: that one's thread dies of a full disk in silence, and a run would wait for it for ever.
            self._writer: Any = EventsWriter(str(files / "events"))
        except OSError as error:
            raise StrataError(f"{files} cannot be written: {error.strerror}") from error
        self._flushed = time.monotonic()
        if resumed_at is not None:
            from tensorboardX.proto.event_pb2 import SessionLog

            self._put(resumed_at + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Mapping[str, Any]) -> None:
        """Repeats one row; none after one that could not be written.

        Raises:
          OSError: it could not be written.
        """
        if self._writer is None:
            return
        from tensorboardX.summary import scalar

        try:
            for name, value in scalars(row).items():
                self._put(row["step"], summary=scalar(name, float(value)))
            if time.monotonic() - self._flushed >= FLUSH:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError:
            self._writer = None
            raise

    def _put(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Writes what is still in memory; may be called twice."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __enter__(self) -> TensorBoardMirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rebuild(metrics: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Replaces `tensorboard/` in the run directory by a mirror of all of `metrics.jsonl`."""
    rows = read_metrics(metrics)
    shutil.rmtree(Path(directory) / DIRECTORY, ignore_errors=True)
    with TensorBoardMirror(directory) as mirror:
        for row in rows:
            mirror.write(row)
