"""Making the C library keep what computations on a CPU free. JAX is imported by the call, not by this module."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def tune_cpu() -> None:
    """Keep the memory of a CPU step in the process between steps; call before JAX's first computation.

    XLA allocates one scratch buffer a step and frees it. The C library gives it back to the kernel, which hands it out
    again page by page, zeroed: more than half of a small model's step (`benchmarks/step_speed.py`). glibc is asked to keep
    what is freed, whatever its size; it does so for the main thread only, so steps are run there, without asynchronous
    dispatch. Other C libraries are left alone, and so is the memory of accelerators.

    The price: all that the process frees stays with it, large arrays of the host too, and what was freed is too small for
    shapes that grow, so one growing shape after another can take several times the memory of the largest.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if platform.libc_ver()[0] == "glibc":
        set_option = ctypes.CDLL(None).mallopt
        # No threshold for M_MMAP_THRESHOLD, an int, is large enough: the scratch of a step passes 2 GiB.
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, -1)
