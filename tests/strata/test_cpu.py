"""Memory that computations on a CPU free stays in the process."""

import platform
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import ctypes
    import resource

    # Pages of the usual size, whatever the system prefers: a fault may bring a huge one, and hundreds of them look like none.
    PR_SET_THP_DISABLE = 41
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

    import jax
    import jax.numpy as jnp

    from strata.cpu import tune_cpu

    tune_cpu()


    step = jax.jit(lambda x: jnp.full({bytes} // 4, x, jnp.float32))


    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


    for _ in range(8):
        step(1.0).block_until_ready()
    before = faults()
    for _ in range({steps}):
        step(1.0).block_until_ready()
    print((faults() - before) * resource.getpagesize() / ({steps} * {bytes}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc is left alone")
@pytest.mark.parametrize(("mebibytes", "steps"), [(48, 20), (2100, 10)])
def test_scratch_memory_is_not_asked_of_the_system_at_every_step(mebibytes, steps):
    """Where a small block has come to lie in the old memory of a step it is asked for anew: among the first ones often, later
    hardly ever."""
    program = textwrap.dedent(PROGRAM).format(bytes=mebibytes << 20, steps=steps)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 0.6
