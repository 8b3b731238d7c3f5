"""The one place that touches what JAX keeps private: the GPU interpreter, which runs the Hopper kernels on a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from kernels.mosaic_gpu import limits
from strata.errors import ConfigError

THREADS = 8
"""Of XLA's pool, at least. Every warpgroup of a block that waits for another holds one; with two, on a machine of two cores, a
block of three waited for ever.
"""


def pool() -> int:
    """Threads of XLA's pool on the CPU, if `NPROC` is what it was when JAX started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("NPROC") or cores)


def parameters(*, detect_races: bool = True) -> Any:
    """What `interpret=` of the ops takes to run the Hopper kernels on a CPU.

    Raises:
      ConfigError: the JAX that is installed has no such interpreter, or XLA has too few threads for it.
    """
    if pool() < THREADS:
        raise ConfigError(
            f"kernels.mosaic_gpu: XLA has {pool()} threads here, and the GPU interpreter may wait for ever with fewer than "
            f"{THREADS}; set NPROC={2 * THREADS} in the environment before JAX starts"
        )
    try:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.InterpretGPUParams(detect_races=detect_races)
    except (ImportError, AttributeError) as error:
        raise _missing() from error


def _missing() -> ConfigError:
    installed = ".".join(map(str, limits.version()))
    return ConfigError(f"kernels.mosaic_gpu: jax {installed} has no GPU interpreter of the kind that jax 0.11.2 has")


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Interpret within: a kernel in which two threads come to one place without order is an error, and no state is left behind,
    not even by a kernel that failed.

    Raises:
      ConfigError: the JAX that is installed has no such interpreter, or keeps its state elsewhere.
      RuntimeError: on leaving, when an interpreted kernel had a race; what raced has been printed.
    """
    try:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        record, reset, states = gpu_callbacks.GPURaceDetectionState, gpu_callbacks.reset_gpu_interpret_mode_state, []
    except (ImportError, AttributeError) as error:
        raise _missing() from error

    def recorded(*args: Any, **options: Any) -> Any:
        states.append(record(*args, **options))
        return states[-1]

    # JAX keeps what it found for the last kernel alone, and a call of an op is several kernels.
    gpu_callbacks.GPURaceDetectionState = recorded
    reset()
    try:
        yield
    finally:
        gpu_callbacks.GPURaceDetectionState = record
        reset()
    if any(state.races_found for state in states):
        raise RuntimeError("a kernel has a race")
