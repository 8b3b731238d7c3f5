"""What a run ran on, and which changes of it end bit-for-bit equality. Only the list of devices imports JAX."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections", "tokenizers")
_COMPUTING = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "tokenizers")  # their code decides numbers or their order
_VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_ENABLE_X64",
    "JAX_DISABLE_JIT",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_THREEFRY_PARTITIONABLE",
    "NVIDIA_TF32_OVERRIDE",
)
_DIFF_LIMIT = 1_000_000  # characters of the source diff that are kept


def describe_environment(source: str | os.PathLike[str] | None = None, *, modules: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, devices, source and command line, as JSON; no host or user name is asked for.

    Args:
      source: a file of the source tree whose revision is recorded; default: this one. A tree that git does not track
        (an installed package, or no git at all) is recorded as None.
      modules: whose content is recorded wherever they lie: plugins, the module of a measurement.
    """
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "variables": {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
        "source": _source(Path(source or __file__).resolve()),
        "modules": {name: digest for name in modules if (digest := module_digest(name))},
        "command_line": sys.orig_argv,
    }


def differences(first: dict[str, Any], now: dict[str, Any], *, python_matters: bool = False) -> list[str]:
    """What changed between two environments that ends bit-for-bit equality, one line each; empty: nothing.

    Args:
      first: the environment of the run's first start.
      now: that of this start.
      python_matters: the data depends on the Python version (`python_source` reads its standard library).
    """
    found = []

    def compare(what: str, a: Any, b: Any) -> None:
        if a != b:
            found.append(f"{what}: {'none' if a is None else a} -> {'none' if b is None else b}")

    for name in _COMPUTING:
        compare(name, first.get("packages", {}).get(name), now.get("packages", {}).get(name))
    if python_matters:
        compare("python", first.get("python"), now.get("python"))
    compare("machine", first.get("platform"), now.get("platform"))
    for key in ("platform", "kind", "count"):
        compare(f"device {key}", first.get("devices", {}).get(key), now.get("devices", {}).get(key))
    compare("processes", first.get("processes"), now.get("processes"))
    compare("CPUs", first.get("cpus"), now.get("cpus"))
    if first.get("processor") and now.get("processor"):  # runs of earlier versions do not say
        compare("processor", first["processor"], now["processor"])
    for name in _VARIABLES:
        compare(name, first.get("variables", {}).get(name), now.get("variables", {}).get(name))
    before, after = first.get("source"), now.get("source")
    if before and after:
        compare("source revision", before.get("revision"), after.get("revision"))
        if before.get("diff") != after.get("diff") or before.get("untracked") != after.get("untracked"):
            found.append("source: uncommitted changes differ")
        elif "contents" in before and "contents" in after:  # runs of earlier versions do not say
            changed = sorted(k for k, v in after["contents"].items() if before["contents"].get(k) != v)
            found += [f"source: {name}, which git does not track, has changed" for name in changed]
    for name, digest in now.get("modules", {}).items():
        compare(f"module {name}", first.get("modules", {}).get(name, digest), digest)
    return found


def module_digest(name: str) -> str | None:
    """Of the content of a module, or of all Python files of a package; None where there is no such file.

    The module is not run, but packages that it is in are.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    files = [Path(spec.origin)]
    if spec.submodule_search_locations:
        files = sorted(Path(spec.origin).parent.rglob("*.py"))
    return _digest(*files)


def _digest(*files: Path) -> str:
    found = hashlib.sha256()
    for file in files:
        try:
            found.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError:
            found.update(b"unreadable")
    return found.hexdigest()[:16]


def _processor(description: str | os.PathLike[str] = "/proc/cpuinfo") -> str | None:
    """The name of the processor's model, such as "AMD EPYC 9B14"; None where the system does not say it.

    Args:
      description: of the processors as Linux writes it. Elsewhere Python's own answer is taken, unless it only repeats the
        architecture.
    """
    try:
        lines = Path(description).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Processor") and value.strip():
            return " ".join(value.split())
    found = platform.processor()
    return found if found and found != platform.machine() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source(file: Path) -> dict[str, Any] | None:
    """Revision, diff and untracked files of the git tree that tracks `file`; None where none does.

    `contents` holds a digest of every untracked Python file, whose names alone would not say that it was edited.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    folder = str(file.parent)
    # A virtual environment may lie inside someone else's repository: its revision says nothing about this source.
    if git("ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    folder = (git("rev-parse", "--show-toplevel") or folder).strip()
    diff = git("diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    if len(diff) > _DIFF_LIMIT:
        diff = diff[:_DIFF_LIMIT] + f"\n[cut: the diff has {len(diff)} characters]\n"
    untracked = (git("-c", "core.quotePath=false", "ls-files", "--others", "--exclude-standard") or "").splitlines()
    return {
        "revision": (git("rev-parse", "HEAD") or "").strip() or None,
        "diff": diff,
        "untracked": untracked,
        "contents": {name: _digest(Path(folder, name)) for name in untracked if name.endswith(".py")},
    }
