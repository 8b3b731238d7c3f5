"""Launching through Slurm: one array job a sweep, its tasks requeued when their time is up. Imports no JAX.

Each task is `python -m trainer.sweep task FILE INDEX` (`trainer.sweep.slurm_task`). Slurm's commands are asked for text only,
in formats that do not change between versions: `sbatch --parsable`, `squeue -h -o`, `sacct -n -P`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from strata import ConfigError, StrataError
from trainer.atomic_files import write_bytes_atomic
from trainer.sweep.ledger import last_ends, unfinished
from trainer.sweep.outcome import outcome
from trainer.sweep.place import Place
from trainer.sweep.plan import Plan, Run

OURS = ("array", "chdir", "job-name", "open-mode", "output", "error", "parsable", "requeue", "signal", "wrap")
"""Options of sbatch that the script sets itself."""
SEVERAL = ("nodes", "ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-socket", "ntasks-per-core")
"""Options that may give a run more than one process, which srun then starts."""
WARNING = 120
"""Seconds before the time limit at which a run is told to save."""
POLL = 5.0


def launch(place: Place, plan: Plan, slots: int, options: Mapping[str, str], again: Callable[[], Plan], wait: bool) -> int:
    """Submit what is missing and not in the queue.

    Args:
      place: of the sweep; the caller holds its lock.
      slots: tasks at a time.
      options: of sbatch, such as `partition`.
      again: the plan once tuning runs have ended.
      wait: return when everything has ended; else after submitting.

    Returns:
      0; with `wait`, 1 if a run failed.

    Raises:
      ConfigError: an option is wrong, or Slurm's commands are not here.
      StrataError: Slurm refused the job.
    """
    checked = check_options(options)
    tried: set[str] = set()  # submitted here, so that what tuning adds later does not try failed runs again
    while True:
        place.write_plan(plan)
        queued = queued_runs(place)
        close_lost(place, plan, queued)
        missing = [run for run in place.to_make(plan) if run.directory not in queued]
        missing = [run for run in missing if outcome(place.directory(run), run.steps).state != "running"]
        missing = [run for run in missing if run.directory not in tried]
        held = [run for run in missing if not may_start(place, run)]
        missing = [run for run in missing if run not in held]
        if missing:
            job = submit(place, missing, slots, checked)
            tried |= {run.directory for run in missing}
            print(f"submitted job {job}: {len(missing)} runs, {min(slots, len(missing))} at a time", flush=True)
        else:
            print(f"nothing to submit: {len(queued)} runs are in the queue", flush=True)
        if not wait:
            if held:
                print(f"{len(held)} runs start from runs of these: start the same command again when they have ended")
            if plan.later:
                print(f"{plan.later} runs are chosen by these: start the same command again when they have ended")
            return 0
        while queued_runs(place):
            time.sleep(POLL)
        close_lost(place, plan, {})
        failed = [run for run in place.to_make(plan) if run not in held]
        if any(run.stage == "compare" for run in failed):
            return 1
        before, plan = plan, again()
        if any(may_start(place, run) for run in held) or (plan.runs, plan.later) != (before.runs, before.later):
            continue
        return 1 if failed or held or plan.later else 0


def may_start(place: Place, run: Run) -> bool:
    """Whether the runs that this one starts from have finished."""
    return all(outcome(place.runs / name, 0).state == "finished" for name in run.needs)


def check_options(options: Mapping[str, str]) -> dict[str, str]:
    """Names with dashes as sbatch spells them. Raises `ConfigError` for those that the script sets itself."""
    found = {}
    for name, value in options.items():
        name = name.replace("_", "-")
        if name in OURS:
            raise ConfigError(f"--slurm.{name}: the sweep sets this itself")
        if not name or not all(c.isalnum() or c == "-" for c in name) or "\n" in value:
            raise ConfigError(f"--slurm.{name}={value}: not an option of sbatch")
        found[name] = value
    return found


def job_name(place: Place) -> str:
    """The same for every job of a sweep, and for no other sweep."""
    return f"strata-{place.path.name}-{hashlib.sha256(str(place.path.absolute()).encode()).hexdigest()[:6]}"


def script(place: Place, tasks: Path, count: int, slots: int, options: Mapping[str, str]) -> str:
    """The batch script of an array of `count` tasks, `slots` at a time.

    `--signal=B:USR1@120` warns the batch process, which is the task itself by `exec`, before the time limit; `--requeue` lets
    Slurm start a task again after a preemption or the failure of a node.
    """
    settings = {
        "job-name": job_name(place),
        "array": f"0-{count - 1}%{slots}",
        "signal": f"B:USR1@{WARNING}",
        "requeue": None,
        "open-mode": "append",
        "output": str((place.path / "logs" / "slurm-%A_%a.log").absolute()),
        "chdir": os.getcwd(),
        **options,
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "") for name, value in settings.items()]
    command = [sys.executable, "-m", "trainer.sweep", "task", str(tasks.absolute())]
    lines += ["", f'exec {shlex.join(command)} "$SLURM_ARRAY_TASK_ID"', ""]
    return "\n".join(lines)


def submit(place: Place, runs: Sequence[Run], slots: int, options: Mapping[str, str]) -> str:
    """Write the tasks and the script, hand them to sbatch, and keep which run is which task. Returns the job's id."""
    directory = place.path / "slurm"
    directory.mkdir(parents=True, exist_ok=True)
    (place.path / "logs").mkdir(exist_ok=True)
    number = len(list(directory.glob("tasks-*.jsonl")))
    tasks = directory / f"tasks-{number}.jsonl"
    several = any(options.get(name, "1") != "1" for name in SEVERAL)
    lines = []
    for run in runs:
        place.write_config(run)
        command = (["srun"] if several else []) + place.command(run)
        lines.append(
            {
                "run": run.directory,
                "arm": run.arm,
                "seed": run.seed,
                "stage": run.stage,
                "steps": run.steps,
                "directory": str(place.directory(run).absolute()),
                "sweep": str(place.path.absolute()),
                "log": str(place.log(run).absolute()),
                "command": command,  # paths in it are from the directory that the script changes to
            }
        )
    write_bytes_atomic(tasks, "".join(json.dumps(line) + "\n" for line in lines).encode())
    text = script(place, tasks, len(runs), slots, options)
    path = directory / f"array-{number}.sh"
    write_bytes_atomic(path, text.encode())
    job = parse_sbatch(call("sbatch", "--parsable", str(path)))
    write_bytes_atomic(directory / f"job-{number}", job.encode())
    return job


def call(*command: str) -> str:
    """The output of one of Slurm's commands.

    Raises:
      ConfigError: it is not installed.
      StrataError: it failed; with what it said.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} is not here: --launcher slurm needs Slurm's commands, --launcher local does not"
        ) from None
    except subprocess.TimeoutExpired:
        raise StrataError(f"{command[0]} did not answer within two minutes") from None
    if done.returncode:
        raise StrataError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def parse_sbatch(text: str) -> str:
    """`123` or `123;cluster` to the id. Raises `StrataError`."""
    job = text.strip().partition(";")[0]
    if not job.isdecimal():
        raise StrataError(f"sbatch --parsable answered {text.strip()!r}, not a job id")
    return job


def parse_squeue(text: str) -> dict[tuple[str, int], str]:
    """Lines of `%F|%K|%T` (array job, index, state; one element a line by `-r`) to states by job and index."""
    found = {}
    for line in text.splitlines():
        job, _, rest = line.strip().partition("|")
        index, _, state = rest.partition("|")
        if job.isdecimal() and index.isdecimal() and state:
            found[(job, int(index))] = state
    return found


def parse_sacct(text: str) -> dict[tuple[str, int], str]:
    """Lines of `JobID|State|ExitCode` to a state in words by job and index; steps (`12_3.batch`) are left out."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition("|")
        state, _, code = rest.partition("|")
        job, _, index = name.partition("_")
        if job.isdecimal() and index.isdecimal() and state:
            found[(job, int(index))] = f"{state.split()[0]} (exit {code})" if code else state.split()[0]
    return found


def submissions(place: Place) -> dict[tuple[str, int], str]:
    """The run of every task that was ever submitted."""
    found = {}
    for path in sorted((place.path / "slurm").glob("job-*")):
        tasks = path.with_name(path.name.replace("job-", "tasks-") + ".jsonl")
        for index, line in enumerate(tasks.read_text().splitlines()):
            found[(path.read_text().strip(), index)] = json.loads(line)["run"]
    return found


def queued_runs(place: Place) -> dict[str, str]:
    """Runs of the sweep that are in Slurm's queue, with their state there."""
    known = submissions(place)
    if not known:
        return {}
    listed = parse_squeue(call("squeue", "-h", "-r", "-n", job_name(place), "-o", "%F|%K|%T"))
    return {known[task]: state for task, state in listed.items() if task in known}


def close_lost(place: Place, plan: Plan, queued: Mapping[str, str]) -> None:
    """Write an end for every start without one whose task has left the queue, with Slurm's reason where it keeps any."""
    rows = place.ledger.rows()
    gone = {name: row for name, row in unfinished(rows).items() if name not in queued and "slurm" in row.get("slot", {})}
    ends = last_ends(rows)
    runs = {run.directory: run for run in plan.distinct}
    for name, row in gone.items():
        run = runs.get(name)
        if run is None:
            continue
        found = outcome(place.directory(run), run.steps)
        state = found.state if found.ended else "lost"
        message = found.message or why_gone(row["slot"]["slurm"])
        _end(place, run, state, found.step, message)
    for run in plan.distinct:  # finished by hand or by another sweep
        found = outcome(place.directory(run), run.steps)
        if found.ended and run.directory not in ends and run.directory not in gone:
            _end(place, run, found.state, found.step, found.message)


def why_gone(task: str) -> str:
    """What accounting says of a task; a plain sentence where there is no accounting."""
    job, _, index = task.partition("_")
    try:
        listed = parse_sacct(call("sacct", "-n", "-P", "-j", job, "-o", "JobID,State,ExitCode"))
    except StrataError:
        listed = {}
    return listed.get((job, int(index) if index.isdecimal() else -1), "its task has left the queue without a word")


def _end(place: Place, run: Run, state: str, step: int, message: str) -> None:
    place.ledger.append(
        "end", run=run.directory, arm=run.arm, seed=run.seed, stage=run.stage, outcome=state, step=step, exit=None,
        message=message, seconds=None, again=False,
    )  # fmt: skip


def _quoted(value: str) -> str:
    return value if all(c.isalnum() or c in "._-+,/:%=@[]" for c in value) else f'"{value}"'
