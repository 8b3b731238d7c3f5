"""Before the first start: every distinct training run is assembled once, to find what only JAX and the data can tell.

A name that optax does not have, shards that are not there, a mesh that the devices cannot give: each would otherwise end a run
when it is started. One process assembles all of them (data, mesh, abstract model, shapes of the optimizer's state) and compiles
nothing. Imports no JAX outside that process. Of measurements only the modules that they say they need are looked for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import ConfigError, Problem, StrataError
from trainer.sweep import needs
from trainer.sweep.outcome import outcome
from trainer.sweep.place import Place
from trainer.sweep.plan import Plan, Run


def check_assembly(plan: Plan, place: Place, variables: Mapping[str, str]) -> None:
    """Assemble one run of every program of which no run has begun, and find the modules that arms require.

    Args:
      plan: whose runs are about to be started.
      place: where they are kept.
      variables: of the environment of a run.

    Raises:
      ConfigError: with every module that is missing, else every run to start from that is not the planned one any more, else
        every problem of assembling, each said once with its arms.
      StrataError: the process that assembles ended without an answer.
    """
    if wrong := missing_modules(plan, place) or longer_donors(plan, place):
        raise ConfigError(wrong, f"{plan.source.path} at scale {plan.scale_name}")
    chosen = unbegun(plan, place)
    if not chosen:
        return
    began = time.monotonic()
    print(f"assembling {len(chosen)} distinct runs before the first is started ...", flush=True)
    command = [sys.executable, "-m", "trainer.sweep.assembly"]
    quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    asked = json.dumps([json.loads(run.config) for run in chosen])
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, env=os.environ | quiet | dict(variables), check=False
    )
    try:
        answers = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        raise StrataError(f"the runs could not be assembled before the first start: {last.strip()}") from None
    problems: dict[tuple[str, str], list[str]] = {}
    for run, found in zip(chosen, answers, strict=True):
        for path, message in found:
            names = problems.setdefault((path, message), [])
            names += [run.arm] if run.arm not in names else []
    if problems:
        raise ConfigError(
            [
                Problem(path or "config", f"{message} (in {', '.join(f'arm {name!r}' for name in names)})", has_value=False)
                for (path, message), names in problems.items()
            ],
            f"{plan.source.path} at scale {plan.scale_name}",
        )
    print(f"assembled in {time.monotonic() - began:.1f} s", flush=True)


def missing_modules(plan: Plan, place: Place) -> list[Problem]:
    """Modules that arms with runs to come say they need, and that are not installed: each said once."""
    names: dict[str, list[str]] = {}
    to_make = {run.directory for run in place.to_make(plan)}
    for arm in plan.arms:
        missing = [f"{module}: {how}" for module, how in arm.requires.items() if not _installed(module)]
        ahead = any(run.arm == arm.name for run in plan.waiting) or any(
            run.directory in to_make for run in plan.runs if run.arm == arm.name
        )
        for words in missing if ahead else ():
            names.setdefault(words, []).append(f"arm {arm.name!r}")
    return [Problem(f"the module {words}", f"needed by {', '.join(arms)}", has_value=False) for words, arms in names.items()]


def longer_donors(plan: Plan, place: Place) -> list[Problem]:
    """Runs that went on beyond their plan, of which runs to come would take the newest weights: those of more training."""
    steps = {run.directory: run.steps for run in plan.distinct}
    found: dict[str, list[str]] = {}
    for run in place.to_make(plan):
        for name in sorted(needs.taken_as_they_are(json.loads(run.config), run.needs)):
            planned = steps.get(name, 0)
            donor = outcome(place.runs / name, planned)
            if donor.extended_from(planned) is not None:
                words = f"{name} is to make {planned:,} updates and went on to {donor.step:,}"
                found.setdefault(words, []).append(run.title)
    how = "they would start from the newest: put a step beside RunOf(...), or move that directory away"
    return [Problem(words, f"{', '.join(titles)}: {how}", has_value=False) for words, titles in found.items()]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False


def without_devices(plan: Plan) -> dict[str, str]:
    """Variables for assembling where the devices of the runs are not: as many processors stand for them."""
    count = max((run.devices for run in plan.runs), default=1)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(1, count)}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def unbegun(plan: Plan, place: Place) -> list[Run]:
    """One run of each program that no run has begun with: what ran once can be assembled."""
    first: dict[str, Run] = {}
    begun: set[str] = set()
    for run in [run for run in plan.distinct if run.kind == "train"]:
        found = outcome(place.directory(run), run.steps)
        if found.step or found.ended or found.state == "running":
            begun.add(program(run))
    for run in [run for run in (*place.to_make(plan), *plan.waiting) if run.kind == "train"]:
        first.setdefault(program(run), run)
    return [run for name, run in first.items() if name not in begun]


def program(run: Run) -> str:
    """What two runs have in common that are assembled alike: all but seed, numbers that are no whole ones, and directories."""
    tree = {key: value for key, value in json.loads(run.config).items() if key not in ("seed", "log", "checkpoint")}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return 0.0
        return "RUN" if isinstance(value, str) and Path(value).name in run.needs else value

    return json.dumps(plain(tree), sort_keys=True)


# ---- in the process of its own


def problems_of(tree: Mapping[str, Any], read: set[str]) -> list[tuple[str, str]]:
    """Path and message of everything that keeps a config from being assembled; data is read once for all that share it."""
    from trainer import config as configuration
    from trainer.setup import assemble

    try:
        setup = assemble(configuration.resolve_config(dict(tree)))
        data = json.dumps(tree.get("data"), sort_keys=True)
        if data not in read:
            setup.dataset  # noqa: B018 (reads it)
            read.add(data)
        setup.abstract_state()
        setup.cuts  # noqa: B018 (draws them)
    except ConfigError as error:
        return [(problem.path, problem.message) for problem in error.problems] or [("", str(error))]
    except StrataError as error:
        return [("", str(error))]
    except Exception as error:
        return [("", f"{type(error).__name__}: {error}".splitlines()[0])]
    return []


def main() -> int:
    """A list of configs on standard input to a list of problems for each, as the last line of standard output."""
    trees, read = json.load(sys.stdin), set()
    print(json.dumps([problems_of(tree, read) for tree in trees]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
