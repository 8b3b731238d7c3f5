"""Several processes: who writes, how they wait for each other, how they agree to stop."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from trainer.signals import StopRequest


def first() -> bool:
    """Whether this process writes the run directory."""
    return jax.process_index() == 0


def wait(reason: str) -> None:
    """Return when every process has come here with the same reason."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(reason)


def with_stop(batch: dict[str, np.ndarray], stop: StopRequest) -> dict[str, Any]:
    """Add this process's wish to stop to its rows of a batch.

    A signal may reach one process only, and all must stop after the same step. The step takes the maximum of the wishes
    and every process reads it with that step's metrics, so that no further synchronisation is needed.
    """
    if jax.process_count() == 1:
        return batch
    rows = len(batch["tokens"])
    return batch | {"stop": np.full((rows, 1), stop.received is not None, np.int32)}
