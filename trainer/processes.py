"""Several processes: who writes, how they wait for each other, and how an error in one becomes one in all."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from strata import StrataError


def first() -> bool:
    """Whether this process writes the run directory."""
    return jax.process_index() == 0


def wait(reason: str) -> None:
    """Return when every process has come here with the same reason."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(reason)


def agree(failure: StrataError | None, what: str) -> None:
    """Raise in every process when one of them failed at `what`, so that none waits for the others for ever."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.process_allgather(np.int32(failure is not None))
        if failure is None and failed.any():
            failure = StrataError(f"{what}: see the message of another process")
    if failure is not None:
        raise failure


def from_first(choose: Callable[[int | None], int | None], step: int | None) -> int | None:
    """What `choose(step)` gives in process 0, the only one that reads every file; an error there is one everywhere."""
    if jax.process_count() == 1:
        return choose(step)
    from jax.experimental import multihost_utils

    failure, chosen = None, None
    if first():
        try:
            chosen = choose(step)
        except StrataError as error:
            failure = error
    code = -2 if failure else -1 if chosen is None else chosen
    code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
    if code == -2:
        raise failure or StrataError("no checkpoint could be chosen: see the message of process 0")
    return None if code == -1 else code
