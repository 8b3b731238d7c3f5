"""Several processes: who writes, and how they wait for each other."""

from __future__ import annotations

import jax


def first() -> bool:
    """Whether this process writes the run directory."""
    return jax.process_index() == 0


def wait(reason: str) -> None:
    """Return when every process has come here with the same reason."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(reason)
