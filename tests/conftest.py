"""Shared by all tests: CPU only, one compilation cache, rank promotion an error."""

import gc
import itertools
import os
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Child processes read this too, so that every test and every command it starts shares what was compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"strata-test-cache-{os.getuid()}"))

# Most of the time of the tests is XLA's. Half of that goes to passes and emitters that change no result but rounding, a tenth
# to cutting programs into pieces for threads that two processes on two cores do not have. XLA_FLAGS in the environment, even
# an empty one, is left as it is.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if version("jax").startswith("0.10."):  # gone with 0.11
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)

# A shell starts what it puts in the background with SIGINT ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

from trainer.devices import use_compilation_cache  # noqa: E402

# Tracing makes objects by the million and few cycles: looking for those rarely takes a twentieth off the time of the suite.
gc.set_threshold(200_000, 50, 100)

# A run collects garbage once, after its first step. Here that walks through what all earlier tests left, for more than a second
# and a fifth of the time of the suite; every sixteenth time keeps memory small. Runs in processes of their own collect always.
_collect, _asked = gc.collect, itertools.count()
gc.collect = lambda generation=2: 0 if next(_asked) % 16 else _collect(generation)
use_compilation_cache()
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Threads enough for the GPU interpreter where its tests are asked for. JAX reads this when it starts, afterwards."""
    asked = config.option.markexpr
    if any(mark in asked and f"not {mark}" not in asked for mark in ("hopper", "full")):
        os.environ.setdefault("NPROC", "16")


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    """The directory that holds the packages and `configs/`."""
    return ROOT
