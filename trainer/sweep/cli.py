"""`python -m trainer.sweep FILE` and `python -m trainer.sweep status FILE`."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from strata import ConfigError, StrataError
from trainer.run_directory import RunDirectory
from trainer.sweep.assembly import check_assembly, without_devices
from trainer.sweep.cost import describe_cost, describe_runs
from trainer.sweep.earlier import Earlier
from trainer.sweep.place import Place
from trainer.sweep.plan import Plan, arms_at, make_plan
from trainer.sweep.reading import Source, read, read_search

USAGE = """\
usage: python -m trainer.sweep FILE [--scale NAME] [--launcher local|slurm|submitit] [--slots N] [--dry_run]
       python -m trainer.sweep status FILE [--scale NAME] [--watch]
       python -m trainer.sweep search FILE [--trials N] [--slots N] [--launcher local|submitit]

  FILE                      an experiment (get_experiment), or a config with axes from the command line
  --scale NAME              smoke, laptop, gpu, paper, or what else the file defines (default laptop, or its first)
  --sweep.KEY=V1,V2,...     an axis over a config field; several are crossed; --sweep.seed=0,1,2 sets the seeds
  --config.KEY=VALUE        override one field in every run
  --arms A,B                only these arms
  --part N                  only the arms up to this part; part 1 is the headline
  --dry_run                 check everything, print every run and the cost, and stop
  --slots N                 runs at a time: equal shares of the processors, or GPUs
  --retries N               further attempts of a run that crashed without getting further (default 2)
  --timeout MINUTES         of one attempt; then the run is stopped and tried again
  --stop_after MINUTES      stop everything cleanly after this time and exit 75; the same command goes on
  --runs DIR                where run directories are (default runs); the sweep itself is kept in DIR/sweeps
  --earlier REPORT          report.json of runs whose directories are gone: they are not made again. The sweep keeps a copy
  --launcher slurm          one array job; --slurm.partition=NAME and other options are handed to sbatch
  --wait                    with slurm: return when everything has ended, not after submitting
  --launcher submitit       a job a run; the launcher stays. --submitit.cluster=NAME and other options of submitit's
                            AutoExecutor, of which --submitit.timeout_min=MINUTES must be given
"""

FLAGS = ("dry_run", "help", "wait", "watch")
VALUES = ("trials", "scale", "launcher", "slots", "arms", "part", "retries", "timeout", "stop_after", "runs", "earlier")
PREFIXES = ("sweep.", "config.", "slurm.", "submitit.")
LAUNCHERS = ("local", "slurm", "submitit")


@dataclasses.dataclass
class Arguments:
    """The command line, taken apart."""

    file: str
    command: str  # run, status or search
    values: dict[str, str]
    flags: set[str]
    pairs: dict[str, list[tuple[str, str]]]  # by prefix


def parse(argv: Sequence[str]) -> Arguments:
    """Take the command line apart. Raises `ConfigError` with every unknown or incomplete argument."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    pairs: dict[str, list[tuple[str, str]]] = {prefix: [] for prefix in PREFIXES}
    files, wrong, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        prefix = next((p for p in PREFIXES if name.startswith(p) and name != p), None)
        if word == "-h":
            flags.add("help")
        elif not word.startswith("--"):
            files.append(word)
        elif name in FLAGS:
            wrong += [f"--{name} takes no value"] if equals else []
            flags.add(name)
        elif name in VALUES or prefix:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    wrong.append(f"--{name} needs a value: --{name}=...")
                    continue
                value = rest.pop(0)
            if prefix:
                pairs[prefix].append((name.removeprefix(prefix), value))
            else:
                values[name] = value
        else:
            near = difflib.get_close_matches(name, [*FLAGS, *VALUES], n=1, cutoff=0.5)
            hint = (
                f"; did you mean --{near[0]}?"
                if near
                else f"; an axis is --sweep.{name}=..., a config field --config.{name}=..."
            )
            wrong.append(f"unknown flag --{name}{hint}")
    command = files[0] if files[:1] in (["status"], ["search"]) else "run"
    files = files[1:] if command != "run" else files
    if len(files) != 1 and "help" not in flags:
        wrong.append("expected one file" + (f", not {', '.join(files)}" if files else ""))
    launcher = values.get("launcher", "local")
    if launcher not in LAUNCHERS:
        wrong.append(f"--launcher {launcher}: expected {', '.join(LAUNCHERS[:-1])} or {LAUNCHERS[-1]}")
    wrong += _out_of_place(command, launcher, values.keys() | flags, {prefix for prefix in PREFIXES if pairs[prefix]})
    if wrong:
        raise ConfigError("; ".join(wrong) + "\n" + USAGE)
    return Arguments(files[0] if files else "", command, values, flags, pairs)


def _out_of_place(command: str, launcher: str, given: Set[str], prefixes: Set[str]) -> list[str]:
    """What would be read by nothing, in words. `status` takes whatever the sweep is started with."""
    if command == "status":
        return []
    found = [f"--{name}.* options need --launcher {name}" for name in LAUNCHERS if f"{name}." in prefixes and name != launcher]
    if launcher == "submitit" and "timeout" in given:
        found.append("--timeout: with submitit the limit is the job's own, --submitit.timeout_min=60")
    if launcher != "slurm":
        found += ["--wait needs --launcher slurm"] if "wait" in given else []
    elif command == "search":
        found.append("a search hands out its trials one by one: --launcher slurm submits an array; --launcher submitit stays")
    elif ours := sorted(given & {"retries", "timeout", "stop_after"}):
        found.append(f"--{', --'.join(ours)}: with Slurm the limits are its own, such as --slurm.time=60")
    if command == "search" and (other := sorted(given & {"scale", "arms", "part", "earlier"})):
        found.append(f"--{', --'.join(other)}: a search has none")
    if command != "search" and "trials" in given:
        found.append("--trials is of a search")
    return [*found, "--watch is of status"] if "watch" in given else found


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if argv[:1] == ["task"]:  # of a Slurm array
        from trainer.sweep.slurm_task import main as task

        return task(argv[1:])
    arguments = parse(argv)
    if "help" in arguments.flags:
        print(USAGE, end="")
        return 0
    if arguments.command == "search":
        return search(arguments)
    source = read(arguments.file, arguments.pairs["sweep."])
    scale = source.experiment.choose_scale(arguments.values.get("scale"))
    earlier = Earlier(arguments.values["earlier"]) if "earlier" in arguments.values else None
    if earlier is not None:
        earlier.check(source.experiment.name, scale, source.experiment.metric)
    place = Place(arguments.values.get("runs", "runs"), f"{source.experiment.name}-{scale}", earlier)

    def again() -> Plan:
        return plan_of(arguments, source, scale, place)

    plan = again()
    if arguments.command == "status":
        return show_status(arguments, place, again)
    slots = _whole(arguments, "slots", least=1) or plan.scale.slots
    limits = limits_of(arguments)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.values.get("launcher") == "submitit":
        from trainer.sweep.submitit_options import check_options

        check_options(dict(arguments.pairs["submitit."]))
    if "dry_run" in arguments.flags:
        return dry_run(plan, place, slots)
    for line in [*describe_cost(plan, place, slots), *describe_runs(plan, place)]:
        print(line, flush=True)
    if arguments.values.get("launcher", "local") == "slurm":
        from trainer.sweep.slurm import launch

        check_assembly(plan, place, without_devices(plan))
        with RunDirectory(place.path):
            place.keep_earlier()
            return launch(place, plan, slots, dict(arguments.pairs["slurm."]), again, "wait" in arguments.flags)
    return launch_here(arguments, place, plan, slots, limits, again)


def plan_of(arguments: Arguments, source: Source, scale: str, place: Place) -> Plan:
    """The plan as far as the tuning runs that have ended decide it."""
    only, part = arguments.values.get("arms"), _whole(arguments, "part", least=1)
    return make_plan(
        source,
        scale,
        changes=arguments.pairs["config."],
        only=chosen_arms(only, [arm.name for arm in arms_at(source.experiment, scale)]) if only is not None else None,
        part=part,
        score=place.score(source.experiment.metric),
        runs_at=place.runs,
    )


def chosen_arms(text: str, known: Sequence[str]) -> list[str]:
    """`--arms` as names, which may hold commas themselves: the longest name that fits is taken."""
    words, found = [word.strip() for word in text.split(",")], []
    while words:
        lengths = (n for n in range(len(words), 0, -1) if ", ".join(words[:n]) in known)
        length = next(lengths, 1)
        found.append(", ".join(words[:length]))
        del words[:length]
    return found


def slots_of(arguments: Arguments, place: Place, count: int, devices: int = 1) -> Sequence[Any]:
    """Of this machine, or of a cluster; says what there is to say of them."""
    if arguments.values.get("launcher", "local") == "submitit":
        from trainer.sweep.submitted import make_submitted_slots

        return make_submitted_slots(count, dict(arguments.pairs["submitit."]), place.path / "submitit")
    from trainer.sweep.slots import make_slots

    slots, notes = make_slots(count, devices=devices)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return slots


def limits_of(arguments: Arguments) -> dict[str, Any]:
    """What the launcher is told of retries and times, in seconds. Raises `ConfigError`."""
    retries = _whole(arguments, "retries", least=0)
    times = {name: _minutes(arguments, name) for name in ("timeout", "stop_after")}
    return {"retries": 2 if retries is None else retries, **times}


def launch_here(arguments: Arguments, place: Place, plan: Plan, count: int, limits: Mapping[str, Any], again: object) -> int:
    """Stay until every run has ended, and say how."""
    from trainer.sweep.display import Display, status_lines
    from trainer.sweep.launcher import Launcher

    devices = {run.devices for run in plan.runs}
    slots = slots_of(arguments, place, count, -1 if -1 in devices else max(devices))
    submits = arguments.values.get("launcher") == "submitit"
    check_assembly(plan, place, without_devices(plan) if submits else slots[0].variables())
    launcher = Launcher(place, slots, Display(place), **limits)
    with RunDirectory(place.path):
        place.keep_earlier()
        code = launcher.run(plan, again)
    print(status_lines(place, again())[-1])
    print(f"report: python -m trainer.report {place.path}")
    return code


def search(arguments: Arguments) -> int:
    """Let Optuna propose, run, and say the best."""
    from trainer.sweep.display import Display
    from trainer.sweep.search import Study, check
    from trainer.sweep.search_launcher import SCALE, SearchLauncher, check_points

    prefixes = [prefix for prefix in PREFIXES if prefix != "submitit."]
    if extra := [name for prefix in prefixes for name, _ in arguments.pairs[prefix]] + sorted(arguments.flags):
        raise ConfigError(f"a search takes no {', '.join(extra)}: what it tries stands in its file")
    source = read_search(arguments.file)
    check(source)
    found = dataclasses.replace(source, trials=_whole(arguments, "trials", least=1) or source.trials)
    place = Place(arguments.values.get("runs", "runs"), f"{found.name}-{SCALE}")
    slots = slots_of(arguments, place, _whole(arguments, "slots", least=1) or 1)
    limits = limits_of(arguments)
    check_points(found, Path(arguments.file))
    with RunDirectory(place.path):
        study = Study(found, place.path)
        launcher = SearchLauncher(place, slots, Display(place), **limits)
        code = launcher.search(found, study)
    print(f"{found.name}: {', '.join(f'{count} {state}' for state, count in sorted(study.counts().items()))}")
    if (best := study.best()) is not None:
        print(f"best: {best[1]:.6g} at {', '.join(f'{path} = {value}' for path, value in best[0].items())}")
        print("found on one seed: a proposal for an arm, not a verdict")
    print(f"report: python -m trainer.report {place.path}")
    return code


def dry_run(plan: Plan, place: Place, slots: int) -> int:
    """Print every run and the cost."""
    for line in describe_cost(plan, place, slots):
        print(line)
    known = place.known_alone(plan)
    for run in plan.runs:
        print(f"  {run.title}  {run.directory}  {'known from an earlier report' if run.directory in known else run.command}")
    for choice in plan.choices:
        if choice.chosen is None:
            print(f"  {choice.arm}: its comparison runs take the best of {', '.join(choice.means)}")
    for arm, count in Counter(run.arm for run in plan.waiting).items():
        print(f"  {arm}: {count} runs start from one that tuning is to choose")
    for claim in plan.claims:
        print(f"claim: {claim.statement} [{claim.source}]\n  decided by: {claim.rule}")
    if any(run.kind == "train" for run in plan.runs):
        from trainer.sweep.cost import describe_work

        for line in describe_work(plan):
            print(line)
    return 0


def show_status(arguments: Arguments, place: Place, again: object) -> int:
    """Print the state of every run, once or every two seconds."""
    from trainer.sweep.display import status_lines

    while True:
        lines = status_lines(place, again())
        if "watch" not in arguments.flags:
            print("\n".join(lines))
            for line in queue_lines(place):
                print(line)
            return 0
        print("\x1b[2J\x1b[H" + "\n".join(lines), flush=True)
        time.sleep(2)


def queue_lines(place: Place) -> list[str]:
    """What of a sweep is in Slurm's queue; nothing where none was ever submitted."""
    from trainer.sweep.slurm import queued_runs

    states: dict[str, int] = {}
    try:
        queued = queued_runs(place)
    except StrataError as error:
        return [f"Slurm: not known ({error})"]
    for state in queued.values():
        states[state] = states.get(state, 0) + 1
    return [f"Slurm: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}"] if states else []


def _whole(arguments: Arguments, name: str, least: int) -> int | None:
    text = arguments.values.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"--{name} {text}: expected a whole number from {least} on")
    return int(text)


def _minutes(arguments: Arguments, name: str) -> float | None:
    """Seconds."""
    text = arguments.values.get(name)
    if text is None:
        return None
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ConfigError(f"--{name} {text}: expected minutes above 0")
    return 60 * found
