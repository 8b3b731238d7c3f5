"""An experiment at one scale as a list of runs, every one of them checked before the first starts. Imports no JAX."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from strata import ConfigError, Problem
from trainer import config as configuration
from trainer.sweep import needs
from trainer.sweep.changes import as_text, flat, folded, layered, quoted
from trainer.sweep.experiment import Arm, Claim, Experiment, Scale, expanded_arms
from trainer.sweep.measurement import check_function, measurement_id
from trainer.sweep.reading import Source
from trainer.sweep.space import label, read_seeds


@dataclasses.dataclass(frozen=True)
class Run:
    """One process to start: its identity is its config and seed, whatever sweep it belongs to."""

    arm: str
    seed: int
    kind: str  # train | measurement
    stage: str  # compare | tune
    point: str  # of a tuned arm; empty otherwise
    name: str  # of the config: the first part of the directory
    id: str  # <hash>-s<seed>
    config: str  # canonical JSON, for a measurement its function and arguments
    changes: tuple[tuple[str, str], ...]  # as on the command line
    source: str  # config file
    steps: int  # 0: a measurement decides by itself
    tokens: int  # trained on in the whole run
    devices: int  # of the mesh; -1: all there are
    needs: tuple[str, ...] = ()  # directories of runs that it starts from

    @property
    def directory(self) -> str:
        """Below the directory of runs; the one that `python -m trainer` would take."""
        return f"{self.name}-{self.id}"

    @property
    def group(self) -> str:
        """What differs from another run of the same group is the seed alone."""
        return self.id.rpartition("-s")[0]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.arm}{f' [{self.point}]' if self.point else ''} seed {self.seed}"

    @property
    def command(self) -> str:
        """The same run without a sweep."""
        if self.kind == "measurement":
            return f"python -m trainer.sweep.measurement --spec '{json.dumps(json.loads(self.config))}'"
        words = [f"--config.{path}={quoted(text)}" for path, text in self.changes]
        return " ".join(["python -m trainer --config", self.source, *words])


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the tuning of an arm found."""

    arm: str
    means: Mapping[str, float | None]  # of each point, None where no run of it has a number
    chosen: str | None  # None: its runs have not all ended, or none has a number
    at_edge: bool = False  # the chosen point is the first or last of its axis, so a better one may lie outside


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of an experiment at a scale, in the order in which they are started."""

    source: Source
    scale_name: str
    runs: tuple[Run, ...]
    later: int  # runs whose config is chosen by tuning runs that have not ended, those of `waiting` among them
    choices: tuple[Choice, ...]
    notes: tuple[str, ...]
    changes: tuple[tuple[str, str], ...] = ()  # from the command line, over all arms
    only: tuple[str, ...] | None = None  # names of the arms asked for; None: all
    waiting: tuple[Run, ...] = ()  # from a run that tuning is to choose, a stand-in in its place: checked and costed alone

    @property
    def distinct(self) -> list[Run]:
        """Each run once: a tuned arm may have chosen what another arm is."""
        return list({run.directory: run for run in reversed(self.runs)}.values())[::-1]

    @property
    def experiment(self) -> Experiment:
        """What the file defines."""
        return self.source.experiment

    @property
    def scale(self) -> Scale:
        """The sizes that were asked for."""
        return self.experiment.scales[self.scale_name]

    @property
    def name(self) -> str:
        """Of the sweep's directory."""
        return f"{self.experiment.name}-{self.scale_name}"

    @property
    def claims(self) -> list[Claim]:
        """Those that are tested at this scale."""
        return [claim for claim in self.experiment.claims if claim.at(self.scale_name)]

    @property
    def arms(self) -> list[Arm]:
        """Those that are run."""
        return [arm for arm in arms_at(self.experiment, self.scale_name) if self.only is None or arm.name in self.only]


Score = Callable[[Run], tuple[bool, float | None]]
"""Of a tuning run: whether it has ended, and its number."""


def arms_at(experiment: Experiment, scale: str) -> list[Arm]:
    """The arms that are run at a scale."""
    return [arm for arm in expanded_arms(experiment) if arm.scales is None or scale in arm.scales]


def make_plan(
    source: Source,
    scale_name: str,
    *,
    changes: Sequence[tuple[str, str]] = (),
    only: Sequence[str] | None = None,
    part: int | None = None,
    score: Score | None = None,
    runs_at: str | Path = "runs",
) -> Plan:
    """Expand and check everything.

    Args:
      source: from `trainer.sweep.reading.read`.
      scale_name: one of the experiment's.
      changes: `--config.PATH=VALUE` for all arms.
      only: names of the arms to run, with those that they start from; None: all.
      part: of the arms, those up to this part, likewise; None: all.
      score: for tuned arms; None: nothing has ended yet.
      runs_at: the directory of run directories, for arms that start from other runs.

    Raises:
      ConfigError: with every mistake of every run, each said once with the arms it is in.
    """
    experiment = source.experiment
    scale = experiment.scales[scale_name]
    arms = arms_at(experiment, scale_name)
    if "seed" in dict(changes):
        raise ConfigError("--config.seed would make all seeds one: give --sweep.seed=0,1,2")
    if only is not None:
        if unknown := [name for name in only if name not in [arm.name for arm in arms]]:
            raise ConfigError(f"--arms {', '.join(unknown)}: the arms are {', '.join(arm.name for arm in arms)}")
    if part is not None:
        only = [arm.name for arm in arms if arm.part <= part and (only is None or arm.name in only)]
    if only is not None:
        only = needs.with_needed(only, arms)
        arms = [arm for arm in arms if arm.name in only]
    if not arms:
        raise ConfigError(f"{experiment.name} runs no arm at scale {scale_name}, so the sweep would be empty")
    if changes and all(arm.measure is not None for arm in arms):
        raise ConfigError(f"--config.{changes[0][0]} changes the configs of runs that train, and all of these are measurements")
    missing: dict[tuple[str, str, str], tuple[Problem, list[str]]] = {}
    runs: list[tuple[tuple[int, ...], Run]] = []
    choices, notes, later, waiting = [], {}, 0, []
    order, directories = {arm.name: index for index, arm in enumerate(arms)}, {}
    undecided: set[str] = set()  # arms whose runs wait for the tuning of one; a stand-in has their place in `directories`
    wrong: set[str] = set()  # arms with mistakes, and those that start from them
    for arm in needs.in_order(arms):
        if not wrong.isdisjoint(needs.needed(arm)):
            wrong.add(arm.name)
            continue
        index = order[arm.name]
        seeds = read_seeds(arm.seeds if arm.seeds is not None else scale.seeds)
        waits = not undecided.isdisjoint(needs.needed(arm))
        make = functools.partial(_runs, source, scale_name, arm, changes=changes, notes=notes, directories=directories)
        try:
            comparing: Mapping[str, Any] = {}
            if arm.tune is not None and arm.tune.at(scale_name):
                tuning_seeds = read_seeds(arm.tune.seeds)
                tuning = [run for point in arm.tune.space for run in make(point, tuning_seeds, "tune")]
                if waits:
                    waiting += tuning
                else:
                    runs += [((arm.part, 0, i % len(tuning_seeds), index, i), run) for i, run in enumerate(tuning)]
                choice, chosen = _choose(arm, experiment, tuning, None if waits else score)
                choices.append(choice)
                if chosen is None:
                    made = [make(point, seeds[:1], "compare")[0] for point in arm.tune.space]  # any of them may be chosen
                    later += len(seeds)
                    undecided.add(arm.name)
                    directories |= {(arm.name, seed): f"{runs_at}/{made[0].directory}" for seed in [*tuning_seeds, *seeds]}
                    continue
                best = [run for run in tuning if run.point == label(chosen)]
                directories |= {(arm.name, run.seed): f"{runs_at}/{run.directory}" for run in best}
                comparing = chosen
            made = make(comparing, seeds, "compare")
            directories |= {(arm.name, run.seed): f"{runs_at}/{run.directory}" for run in made}
            if waits:
                waiting += made
                undecided.add(arm.name)
                continue
            # Seeds come before arms: whenever a sweep is stopped, its arms have been run on nearly the same seeds.
            runs += [((arm.part, 1, i, index, 0), run) for i, run in enumerate(made)]
        except ConfigError as error:
            wrong.add(arm.name)
            for problem in error.problems:
                key = (problem.path, problem.message, repr(problem.value))
                missing.setdefault(key, (problem, []))[1].append(arm.name)
    if missing:
        raise ConfigError(
            [_in_arms(problem, names, len(arms)) for problem, names in missing.values()],
            f"{source.path} at scale {scale_name}",
        )
    ordered = tuple(run for _, run in sorted(runs, key=lambda item: item[0]))
    if unseen := _unseen_steps(experiment, scale_name, [*ordered, *waiting]):
        raise ConfigError(unseen, f"{source.path} at scale {scale_name}")
    equal = _refuse_equal([*ordered, *(run for run in waiting if not run.point)])
    said = [f"{note} ({_listed(names)})" for note, names in notes.items()] + equal
    kept, later = tuple(only) if only is not None else None, later + len(waiting)
    return Plan(source, scale_name, ordered, later, tuple(choices), tuple(said), tuple(changes), kept, tuple(waiting))


def _choose(
    arm: Arm, experiment: Experiment, tuning: Sequence[Run], score: Score | None
) -> tuple[Choice, Mapping[str, Any] | None]:
    """The point with the best mean over the tuning seeds. A point of which a run has no finite number is not chosen."""
    scores = {run: score(run) if score else (False, None) for run in tuning}
    means: dict[str, float | None] = {}
    for point in arm.tune.space:
        values = [scores[run][1] for run in tuning if run.point == label(point)]
        known = [value for value in values if value is not None and math.isfinite(value)]
        means[label(point)] = statistics.fmean(known) if len(known) == len(values) else None
    usable = {name: mean for name, mean in means.items() if mean is not None}
    if not usable or not all(ended for ended, _ in scores.values()):
        return Choice(arm.name, means, None), None
    best = (min if experiment.metric.lower_is_better else max)(usable, key=lambda name: usable[name])
    point = next(point for point in arm.tune.space if label(point) == best)
    at_edge = False
    for path in arm.tune.space.paths:
        numbers = sorted({p[path] for p in arm.tune.space if isinstance(p.get(path), int | float)})
        at_edge |= len(numbers) > 1 and point.get(path) in (numbers[0], numbers[-1])
    return Choice(arm.name, means, best, at_edge), point


def _runs(
    source: Source,
    scale_name: str,
    arm: Arm,
    point: Mapping[str, Any],
    seeds: Sequence[int],
    stage: str,
    changes: Sequence[tuple[str, str]],
    notes: dict[str, list[str]],
    directories: needs.Directories,
) -> list[Run]:
    """The runs of one arm at one point, one a seed; `directories` of the arms before it."""
    scale = source.experiment.scales[scale_name]
    name = label(point) if point else ""
    chosen = layered({}, arm.changes, arm.by_scale.get(scale_name, {}), point)

    def start(seed: int) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The arm's changes at a seed, and the directories that they name."""
        used = dict.fromkeys(directories[value.arm, seed] for value in chosen.values() if isinstance(value, needs.RunOf))
        return needs.resolve(chosen, seed, directories), tuple(Path(path).name for path in used)

    if arm.measure is not None:
        return [_measurement(arm, scale.arguments, *start(seed), seed, stage, name) for seed in seeds]
    file = arm.config or scale.config or source.experiment.config
    if not file:
        raise ConfigError("names no config file: give Experiment(config=...) or Arm(config=...)")
    file = source.config_file(file)
    found, loaded = [], None
    for seed in seeds:
        own, before = start(seed)
        together = folded(layered(scale.changes, own, dict(changes)))
        texts = [(path, as_text(value)) for path, value in together.items()]
        if loaded is None or before:  # otherwise the seed alone is another
            loaded = configuration.load(file, [*texts, ("seed", str(seed))], source.configs)
        for note in loaded.notes:
            if arm.name not in (names := notes.setdefault(note, [])):
                names.append(arm.name)
        config = dataclasses.replace(loaded.config, seed=seed)
        if config.log.wandb != "disabled" and config.log.wandb_group is None:
            # A sweep is a group there; no part of the identity.
            group = dataclasses.replace(config.log, wandb_group=f"{source.experiment.name}-{scale_name}")
            config = dataclasses.replace(config, log=group)
        mesh = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        found.append(
            Run(
                arm=arm.name,
                seed=seed,
                kind="train",
                stage=stage,
                point=name,
                name=loaded.name,
                id=configuration.run_id(config),
                config=configuration.canonical_json(config),
                changes=(*loaded.overrides[:-1], ("seed", str(seed))),
                source=file,
                steps=config.train.steps,
                tokens=config.train.steps * config.data.batch_size * config.data.sequence_length,
                devices=-1 if -1 in mesh else mesh[0] * mesh[1] * mesh[2],
                needs=before,
            )
        )
    return found


def _measurement(
    arm: Arm,
    common: Mapping[str, Any],
    own: Mapping[str, Any],
    before: tuple[str, ...],
    seed: int,
    stage: str,
    point: str,
) -> Run:
    spec = {"measurement": arm.measure, "arguments": layered(common, own), "seed": seed}
    check_function(arm.measure, spec["arguments"])
    text = json.dumps(spec, sort_keys=True, indent=2) + "\n"
    identity = (arm.measure.partition(":")[2], measurement_id(spec), text, (), arm.measure)
    return Run(arm.name, seed, "measurement", stage, point, *identity, steps=0, tokens=0, devices=1, needs=before)


def _unseen_steps(experiment: Experiment, scale_name: str, runs: Sequence[Run]) -> list[Problem]:
    """Claims about the loss at a step at which a training run of theirs is not evaluated."""
    configs = {run.arm: json.loads(run.config) for run in runs if run.kind == "train" and run.stage == "compare"}
    found = []
    for claim in experiment.claims:
        metric = claim.metric or experiment.metric
        if not claim.at(scale_name) or not isinstance(metric.at, int) or metric.split != "val":
            continue
        read = (claim.arm, claim.against) if metric.kind == "value" else (metric.target,)
        for name in [name for name in read if name in configs]:
            every, steps = configs[name]["evaluate"]["every"], configs[name]["train"]["steps"]
            if metric.at != steps and (not every or metric.at % every or metric.at > steps):
                message = f"reads step {metric.at} of arm {name!r}, which is evaluated every {every} of its {steps} steps"
                found.append(Problem(f"claim {claim.statement!r}", message, has_value=False))
    return found


def _refuse_equal(runs: Sequence[Run]) -> list[str]:
    """Two arms with one run would count it twice, unless tuning led there, which is noted."""
    first: dict[str, Run] = {}
    problems, notes = {}, {}
    for run in runs:
        other = first.setdefault(run.directory, run)
        if other is run:
            continue
        arms = (other.arm, other.point, run.arm, run.point)
        if other.arm != run.arm and (other.point or run.point):
            notes[arms] = f"after tuning, arms {other.arm!r} and {run.arm!r} are the same runs"
            continue
        differing = "they are equal in every key"
        if run.config != other.config:
            differing = "they differ only in keys that make no other run: " + ", ".join(_differences(run, other))
        problems[arms] = Problem(
            f"arms {other.arm!r} and {run.arm!r}",
            f"are the same run, {run.group}: {differing}; one run must not count as two",
            has_value=False,
        )
    if problems:
        raise ConfigError(list(problems.values()))
    return list(notes.values())


def _differences(one: Run, two: Run) -> list[str]:
    a, b = flat(json.loads(one.config)), flat(json.loads(two.config))
    return [path for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)]


def _in_arms(problem: Problem, names: Sequence[str], count: int) -> Problem:
    where = "in every arm" if len(names) == count and count > 1 else f"in {_listed([f'arm {name!r}' for name in names])}"
    return dataclasses.replace(problem, path=f"{problem.path or 'config'}", message=f"{problem.message} ({where})")


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
