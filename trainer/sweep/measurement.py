"""Runs of kind `measurement`: any function that fills a run directory.

    def spectra(run: Measurement, *, steps: int) -> None:
        for step in range(1, steps + 1):
            run.write(step, "val", error=...)

    python -m trainer.sweep.measurement --spec FILE_OR_JSON [--workdir DIR]

The arm's arguments are given by name, and compared with the function's before the first run of a sweep starts. A measurement
that is stopped, or dies, is done again from its beginning; its rows are dropped first.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strata import ConfigError, Diverged, Preempted
from strata.cpu import tune_cpu
from trainer.metrics.jsonl import MetricsWriter
from trainer.run_directory import RunDirectory
from trainer.signals import StopRequest


class Measurement:
    """What the function is given.

    Attributes:
      seed: of the run.
      directory: for files of its own.
    """

    def __init__(self, seed: int, directory: Path, writer: MetricsWriter, stop: StopRequest):
        self.seed, self.directory = seed, directory
        self.step = 0
        self._writer, self._stop = writer, stop

    def write(self, step: int, split: str = "val", *, timing: Mapping[str, Any] | None = None, **numbers: Any) -> None:
        """One row of `metrics.jsonl`; what may differ between two runs of one seed goes to `timing`.

        Raises:
          Preempted: the run was told to stop.
        """
        row = {"step": step, "split": split, **numbers}
        self._writer.write(row | ({"timing": dict(timing)} if timing else {}))
        self.step = max(self.step, step)
        if self._stop.received:
            raise Preempted(f"stopped by {self._stop.received}; a measurement begins again when it is started again")


def measurement_id(spec: Mapping[str, Any]) -> str:
    """`<hash>-s<seed>`, the hash over the function and its arguments."""
    known = {"measurement": spec["measurement"], "arguments": spec["arguments"]}
    return f"{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]}-s{spec['seed']}"


def check_function(target: str, arguments: Mapping[str, Any]) -> None:
    """Whether `module:function` is there and takes the arguments, from its source: the module is not run, it may import JAX.

    Raises:
      ConfigError: it is not, or does not.
    """
    module, _, function = target.partition(":")
    where = f"measure = {target!r}"
    try:
        spec = importlib.util.find_spec(module) if module else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not function:
        raise ConfigError(f"{where}: expected module:function, and there is no module {module!r}")
    if not spec.origin or not spec.origin.endswith(".py"):
        return
    defined = {
        node.name: node.args for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.FunctionDef)
    }
    if function not in defined:
        raise ConfigError(f"{where}: {spec.origin} defines {', '.join(defined) or 'no function'}")
    taken = defined[function]
    run, *positional = [each.arg for each in taken.posonlyargs + taken.args] or [""]  # the first one is the measurement
    needed = positional[: len(positional) - len(taken.defaults)]
    needed += [each.arg for each, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True) if default is None]
    known = positional + [each.arg for each in taken.kwonlyargs]
    unknown = [name for name in arguments if name == run or not (taken.kwarg or name in known)]
    if unknown:
        raise ConfigError(f"{where}: it takes {', '.join(known) or 'no arguments'}, not {', '.join(unknown)}")
    if missing := [name for name in needed if name not in arguments]:
        raise ConfigError(f"{where}: it also needs {', '.join(missing)}")


def measure(spec: Mapping[str, Any], workdir: str | Path) -> None:
    """Fill a run directory.

    Args:
      spec: `measurement` (`module:function`), `arguments`, `seed`.
      workdir: made if missing; a finished measurement of the same spec is left alone.

    Raises:
      ConfigError: the spec is wrong, or the directory belongs to another one.
      Preempted: stopped by a signal.
    """
    if set(spec) != {"measurement", "arguments", "seed"}:
        raise ConfigError(f"a measurement has measurement, arguments and seed, not {', '.join(spec) or 'nothing'}")
    check_function(spec["measurement"], spec["arguments"])
    module, _, name = spec["measurement"].partition(":")
    directory = RunDirectory(workdir)
    text = json.dumps(dict(spec), sort_keys=True, indent=2) + "\n"
    with directory, StopRequest() as stop:
        before = directory.read_config()
        if before is not None and json.loads(before) != json.loads(text):
            raise ConfigError(f"{directory.path} belongs to another measurement")
        if (directory.read_status() or {}).get("state") == "finished":
            print(f"{directory.path} is finished: nothing to do.")
            return
        from trainer import devices

        tune_cpu()
        devices.use_compilation_cache()
        from trainer.environment import describe_environment

        function = getattr(importlib.import_module(module), name)
        directory.write_config(text, {"config": spec["measurement"], "name": name, "overrides": []})
        directory.write_environment(describe_environment(modules=[module]))
        directory.write_status("running", 0)
        with MetricsWriter(directory.metrics) as writer:
            writer.truncate(0)
            run = Measurement(spec["seed"], directory.path, writer, stop)
            try:
                function(run, **spec["arguments"])
                writer.flush()
            except Preempted as error:
                directory.write_status("preempted", run.step, str(error))
                raise
            except BaseException as error:
                kind = "Diverged" if isinstance(error, Diverged | FloatingPointError) else type(error).__name__
                directory.write_status("failed", run.step, f"{kind}: {error}".splitlines()[0])
                raise
        directory.write_status("finished", run.step)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer.sweep.measurement", description=__doc__.splitlines()[0])
    parser.add_argument("--spec", required=True, help="JSON, or a file of it")
    parser.add_argument("--workdir", type=Path, default=None, help="run directory (default runs/<function>-<id>)")
    arguments = parser.parse_args(argv)
    text = Path(arguments.spec).read_text() if Path(arguments.spec).is_file() else arguments.spec
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--spec is neither a file nor JSON: {error}") from None
    if not isinstance(spec, dict):
        raise ConfigError("--spec is not a JSON object")
    if arguments.workdir is None:
        arguments.workdir = Path("runs") / f"{str(spec.get('measurement')).partition(':')[2]}-{measurement_id(spec)}"
    measure(spec, arguments.workdir)
    return 0


if __name__ == "__main__":
    from trainer.command import run

    run(main)
