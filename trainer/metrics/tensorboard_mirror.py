"""TensorBoard event files as a mirror of `metrics.jsonl`. Imports no JAX; needs the extra `tensorboard` (tensorboardX)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import ConfigError
from trainer.metrics.jsonl import read_metrics, scalars

DIRECTORY = "tensorboard"


class TensorBoardMirror:
    """Repeats rows to `tensorboard/` in the run directory.

    Args:
      directory: the run directory.
      resumed_at: the step that a resumed run goes on from; later points of the process before it are hidden.

    Raises:
      ConfigError: tensorboardX is not installed; the message names the extra.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resumed_at: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "log.tensorboard = true needs the package tensorboardX: pip install -e '.[tensorboard]'"
            ) from None
        purge = None if resumed_at is None else resumed_at + 1
        self._writer: Any = SummaryWriter(str(Path(directory) / DIRECTORY), purge_step=purge)

    def write(self, row: Mapping[str, Any]) -> None:
        """Repeats one row."""
        if self._writer is None:
            return
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, float(value), row["step"])

    def close(self) -> None:
        """Writes what is still in memory; may be called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

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
