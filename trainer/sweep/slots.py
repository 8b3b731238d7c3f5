"""Where runs go on one machine: equal shares of its processors, or of its GPUs. Imports no JAX."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from strata import ConfigError

USED = 0.9
"""Share of a GPU's memory that runs take together."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Room for one run.

    Args:
      index: from 0.
      cpus: processors that the run may use; None: all, and the system is not asked to pin it.
      gpus: ids for CUDA_VISIBLE_DEVICES; empty: the run decides by itself.
      share: of the memory of a GPU that several slots have in common; None: it is not shared.
    """

    index: int
    cpus: tuple[int, ...] | None = None
    gpus: tuple[str, ...] = ()
    share: float | None = None

    stagger = True
    """Runs of one program share a compilation cache, and the machine: the second waits until the first has compiled it."""

    def variables(self) -> dict[str, str]:
        """Environment variables of a run here."""
        found = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return found | ({"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{self.share:.3f}"} if self.share else {})

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen:
        """Begin a process, pinned to the slot's processors; its output is appended to `log`."""
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | self.variables() | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # a Ctrl-C reaches the launcher alone, which passes it on once
            )
        self.pin(process.pid)
        return process

    def pin(self, pid: int) -> None:
        """Keep a process that has just begun, and the threads it will start, on the slot's processors."""
        if self.cpus is not None and hasattr(os, "sched_setaffinity"):
            try:
                os.sched_setaffinity(pid, self.cpus)
            except ProcessLookupError:  # it is over already
                pass

    def describe(self, process: subprocess.Popen) -> dict[str, object]:
        """For the ledger."""
        place = {"gpus": list(self.gpus)} if self.gpus else {"cpus": list(self.cpus or ())}
        return {"pid": process.pid, "slot": {"index": self.index} | place}


def process_alive(pid: int, words: str) -> bool:
    """Whether there is a process of that number here with `words` in its command."""
    try:
        return words.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def make_slots(count: int, *, devices: int = 1, gpus: tuple[str, ...] | None = None) -> tuple[list[Slot], list[str]]:
    """Divide the machine evenly.

    Every slot is of one size: a run that is resumed with another number of processors does not go on bit for bit.

    Args:
      count: of slots.
      devices: GPUs that a run needs; -1: all.
      gpus: ids; None: those that JAX would use here.

    Returns:
      The slots, and notes for people.

    Raises:
      ConfigError: there are fewer processors or GPUs than that.
    """
    if count < 1:
        raise ConfigError(f"--slots {count}: expected a whole number from 1 on")
    gpus = visible_gpus() if gpus is None else gpus
    if gpus:
        each = len(gpus) if devices == -1 else devices
        if each == 1 and count > len(gpus) and count % len(gpus) == 0:
            together = count // len(gpus)
            notes = [f"{together} runs share a GPU and its memory: their seconds are not those of a run alone"]
            return [Slot(i, gpus=(gpus[i % len(gpus)],), share=USED / together) for i in range(count)], notes
        if each * count > len(gpus):
            raise ConfigError(
                f"--slots {count} of {each} GPU{'s' if each > 1 else ''} each: there are {len(gpus)} here; runs of one device "
                f"may share them if the slots are a multiple of {len(gpus)}"
            )
        return [Slot(i, gpus=tuple(gpus[i * each : (i + 1) * each])) for i in range(count)], []
    if devices not in (1, -1):
        flags = os.environ.get("XLA_FLAGS", "")
        if "host_platform_device_count" not in flags:
            raise ConfigError(f"a run needs a mesh of {devices} devices, and there is one CPU device here and no GPU")
    if count == 1:
        return [Slot(0)], []
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if count > len(cpus):
        raise ConfigError(f"--slots {count}: there are {len(cpus)} processors here")
    each = len(cpus) // count
    left = len(cpus) - each * count
    notes = [f"{left} of {len(cpus)} processors stay free, so that all slots are equal"] if left else []
    return [Slot(i, cpus=tuple(cpus[i * each : (i + 1) * each])) for i in range(count)], notes


def visible_gpus() -> tuple[str, ...]:
    """Ids of the GPUs that JAX would use: none without its CUDA plugin or where JAX_PLATFORMS says cpu."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugins = [f"jax_cuda{version}_plugin" for version in (12, 13, 14)]
    if (platforms and not {"cuda", "gpu"} & set(platforms.split(","))) or not any(map(importlib.util.find_spec, plugins)):
        return ()
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(name for name in chosen.split(",") if name)
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(listed.stdout.split()) if listed.returncode == 0 else ()
