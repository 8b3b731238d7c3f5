"""Setting JAX up for a run: processes, flags, compilation cache, the device mesh."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from strata import ConfigError, StrataError
from strata.cpu import tune_cpu
from trainer.options import Config, Mesh

_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL)

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def start(
    config: Config, *, coordinator: str | None = None, process_count: int | None = None, process_index: int | None = None
) -> None:
    """Configure JAX before its first use; call once a process.

    Several processes are joined when `coordinator` is given, or when Slurm started more than one task. The persistent
    compilation cache lives in `JAX_COMPILATION_CACHE_DIR`, by default in the user's cache directory; set it to the empty
    string for none.
    """
    if config.train.deterministic and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    tune_cpu()
    import jax

    if coordinator or process_count or process_index is not None:
        if not (coordinator and process_count and process_index is not None):
            raise ConfigError("--coordinator, --process_count and --process_index go together")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ConfigError(f"--coordinator = {coordinator}: expected HOST:PORT")
        if process_index >= process_count:
            raise ConfigError(f"--process_index = {process_index}: the {process_count} processes are numbered from 0")
        jax.distributed.initialize(coordinator, process_count, process_index)
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1"):  # of this srun step; a batch script is one process
        jax.distributed.initialize()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS names one that is not there
        why = f"{error}".splitlines()[0] if f"{error}" else "none of its kind is here"
        platforms = os.environ.get("JAX_PLATFORMS")
        raise StrataError(f"JAX has no device (JAX_PLATFORMS = {platforms}): {why}") from None
    use_compilation_cache()


def check_started(config: Config) -> None:
    """Make sure that what must precede JAX's first use did: for callers of `trainer.train` who start JAX themselves.

    Raises:
      ConfigError: `train.deterministic` asks for a flag that this process was started without.
    """
    import jax

    if config.train.deterministic and jax.default_backend() == "gpu" and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        raise ConfigError(
            f"train.deterministic = True needs XLA_FLAGS={DETERMINISTIC} before JAX starts; "
            "the command line sets it, a program that calls trainer.train must"
        )
    use_compilation_cache()


def use_compilation_cache() -> None:
    """Turn the persistent compilation cache on; every program is kept, since even small ones cost a start its seconds."""
    import jax

    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if directory is None:
        try:
            directory = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strata" / "xla")
        except RuntimeError:  # a user that the machine does not know, without HOME
            text = "there is no home directory, so programs are not kept; JAX_COMPILATION_CACHE_DIR gives them a place"
            print(f"note: {text}", file=sys.stderr)
            return
    if not directory:
        return
    repair(Path(directory))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def repair(directory: Path) -> None:
    """From now on, have a cached program that JAX warns it cannot read deleted and made anew.

    JAX compiles it, but never replaces a file that is there, so that one which a kill or a full disk cut short would cost
    every start a compilation. The warning names the program and not the file: all files of that name are deleted.
    """
    if getattr(warnings.showwarning, "directory", None) == directory:
        return
    before = warnings.showwarning

    def show(message: Warning | str, *where: Any, **rest: Any) -> None:
        found = _UNREADABLE.match(str(message))
        if found is None or not directory.is_dir():
            return before(message, *where, **rest)
        name, why = found.groups()
        for path in directory.glob(f"{glob.escape(name)}-*-cache"):
            with contextlib.suppress(OSError):
                path.unlink()
        print(f"note: the cached program {name} could not be read and is compiled again ({why})", file=sys.stderr)

    show.directory = directory
    warnings.showwarning = show


def make_mesh(option: Mesh):
    """The device mesh with axes (data, fsdp, tensor).

    An axis of -1 takes the devices that the others leave. One process uses the first devices it has; several processes
    must use all.

    Raises:
      ConfigError: there are too few devices, or they do not divide.
    """
    import jax
    import numpy as np

    sizes = {"data": option.data, "fsdp": option.fsdp, "tensor": option.tensor}
    count = jax.device_count()
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    for name, size in sizes.items():
        if size == -1:
            if count % fixed:
                raise ConfigError(
                    f"mesh.{name} = -1: the other axes take {fixed} devices, which do not divide the {count} here"
                )
            sizes[name] = count // fixed
    total = int(np.prod(list(sizes.values())))
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if total > count:
        raise ConfigError(f"mesh {shown} needs {total} devices and there are {count}")
    if jax.process_count() > 1 and total != count:
        raise ConfigError(f"mesh {shown} uses {total} of {count} devices; several processes must use all of them")
    shape = tuple(sizes.values())
    if total == count and jax.default_backend() == "tpu":  # neighbours on the interconnect become neighbours in the mesh
        from jax.experimental import mesh_utils

        return jax.sharding.Mesh(mesh_utils.create_device_mesh(shape), tuple(sizes))
    return jax.sharding.Mesh(np.array(jax.devices()[:total]).reshape(shape), tuple(sizes))
