"""Running the trials of a search, and stopping those whose curve is bad. Imports no JAX."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strata import ConfigError, Problem
from trainer.atomic_files import write_bytes_atomic
from trainer.metrics.jsonl import read_metrics
from trainer.sweep import outcome as outcomes
from trainer.sweep.changes import as_text
from trainer.sweep.experiment import Arm, Experiment, Scale
from trainer.sweep.launcher import POLL, Active, Launcher
from trainer.sweep.ledger import unfinished
from trainer.sweep.outcome import last_rows, outcome
from trainer.sweep.plan import Plan, Run, make_plan
from trainer.sweep.reading import Source
from trainer.sweep.search import Search, Study, ends

SCALE = "search"
COMBINATIONS = 16
"""Of ends of the other axes, with which a value is tried before it is refused."""


def plan_of(search: Search, points: Sequence[dict[str, Any]], path: Path) -> Plan:
    """The trials as arms of an experiment, so that a search is kept and reported as any sweep is.

    Raises:
      ConfigError: a point is no valid config.
    """
    arms = [Arm(" ".join(f"{p.rsplit('.', 1)[-1]}={as_text(v)}" for p, v in point.items()), dict(point)) for point in points]
    scale = Scale(seeds=[search.seed], changes=search.changes)
    experiment = Experiment(name=search.name, config=search.config, arms=arms, scales={SCALE: scale}, metric=search.metric)
    lines = [f"        Arm({arm.name!r}, {dict(arm.changes)!r})," for arm in arms]
    text = "\n".join(
        [
            '"""The trials of a search, as they were proposed."""',
            "",
            "from trainer.sweep import Arm, Experiment, Metric, Scale",
            "",
            "",
            "def get_experiment():",
            "    arms = [",
            *lines,
            "    ]",
            f"    scale = Scale(seeds=[{search.seed}], changes={dict(search.changes)!r})",
            f"    metric = {search.metric!r}",
            f"    return Experiment(name={search.name!r}, config={search.config!r}, arms=arms, scales={{{SCALE!r}: scale}},",
            "                      metric=metric)",
            "",
        ]
    )
    return make_plan(Source(experiment, path, text, configs=search.configs), SCALE)


def check_points(search: Search, path: Path) -> None:
    """Make sure that both ends of every axis, and every choice, can be part of a config.

    Each is tried with the first end of the other axes, then with further combinations of ends: which of them go together the
    search may find out, but a value that goes with none of them is a mistake.

    Raises:
      ConfigError: with every value that is one, and why.
    """
    found = {name: ends(of) for name, of in search.space.items()}
    others = [dict(zip(found, values, strict=True)) for values in itertools.islice(itertools.product(*found.values()), 4096)]
    others = [others[0], *random.Random(0).sample(others, min(len(others), COMBINATIONS))]
    problems: dict[tuple[str, str, str], Problem] = {}
    for name, values in found.items():
        for value in values:
            errors = []
            for other in others:
                try:
                    plan_of(search, [other | {name: value}], path)
                    break
                except ConfigError as error:
                    errors.append(error)
            else:
                for problem in errors[0].problems:
                    problems.setdefault((problem.path, problem.message, repr(problem.value)), problem)
    if problems:
        raise ConfigError(list(problems.values()), f"{path}: the space")


class SearchLauncher(Launcher):
    """The launcher with runs that are proposed while it works."""

    def search(self, search: Search, study: Study) -> int:
        """Until there have been enough trials.

        Returns:
          0; 1 if no trial is complete; 75 if it was stopped.
        """
        self.file = self.place.path / "experiment.py"
        self.metric, self.study, self.options = search.metric, study, search
        self.numbers: dict[str, list[int]] = {}  # trials of each run that is under way: a point may be proposed again
        self.pruned: set[str] = set()
        self.seen: dict[str, int] = {}  # the last step of a curve that the study knows
        with self.stop, self.display, self._no_orphans():
            self._trials()
            stopped = self.stop.received or ("--stop_after" if self._out_of_time() else None)
        self._keep()
        if stopped:
            self.display.say(f"stopped by {stopped}; the same command goes on")
            return 75
        return 0 if study.best() is not None else 1

    def _trials(self) -> None:
        waiting: list[Run] = []
        failed: set[str] = set()
        while True:
            stopping = self.stop.received is not None or self._out_of_time()
            for done in [entry for entry in self.active if entry.process.poll() is not None]:
                self.active.remove(done)
                if self._reap(done, failed):
                    waiting.insert(0, done.run)
                elif done.run.directory not in self.foreign and (not stopping or done.run.directory in self.pruned):
                    self._tell(done.run)
            for entry in self.active:
                self._watch(entry)
            for run in self._take_back(waiting):
                self._tell(run)
            if stopping:
                if not self.active:
                    return
                self._stop_all()
            else:
                self._check_time()
                while sum(map(len, self.numbers.values())) < len(self.slots):
                    run = self._propose()
                    if run is None:
                        break
                    start = unfinished(self.place.ledger.rows()).get(run.directory)
                    if self._at_it(run, outcome(self.place.directory(run), run.steps), start):
                        self._leave(run, start)
                    else:
                        waiting.append(run)
                if not waiting and not self.active and not self.foreign:
                    return
                self._fill(waiting)
            self.display.update([(entry.run, entry.slot.index) for entry in self.active], len(waiting), len(self.foreign))
            time.sleep(POLL)

    def _propose(self) -> Run | None:
        """The run of the next trial that has to be run; None where there is none, or the next is at work for an earlier trial.

        Trials whose run is there already are told at once.
        """
        while (asked := self.study.ask()) is not None:
            number, point = asked
            try:
                run = plan_of(self.options, [point], self.file).runs[0]
            except ConfigError as error:
                self.display.say(f"trial {number} {point} is no valid config: {error}")
                self.study.refuse(number)
                continue
            self.numbers.setdefault(run.directory, []).append(number)
            if len(self.numbers[run.directory]) > 1:
                self.display.say(
                    f"trial {number} is at the point of trial {self.numbers[run.directory][0]}, which is under way"
                )
                return None
            if not outcome(self.place.directory(run), run.steps).ended:
                return run
            self._tell(run)
        return None

    def _watch(self, entry: Active) -> None:
        """Give new points of a curve to the study; stop the run if it says so."""
        run = entry.run
        row = last_rows(self.place.directory(run)).get(self.metric.split)
        if row is None or self.metric.name not in row or row["step"] <= self.seen.get(run.directory, 0):
            return
        self.seen[run.directory] = row["step"]
        value = float(row[self.metric.name])
        worse = [self.study.watch(number, row["step"], value) for number in self.numbers[run.directory]]
        if all(worse) and row["step"] < run.steps and entry.stopped is None:
            self.pruned.add(run.directory)
            self.display.say(f"pruned {run.title} at step {row['step']:,}")
            self._ask(entry)

    def _tell(self, run: Run) -> None:
        found, value = outcome(self.place.directory(run), run.steps), None
        if found.state == "finished":
            rows = read_metrics(self.place.directory(run) / "metrics.jsonl")
            value = outcomes.value(rows, self.metric, found.extended_from(run.steps))
        for number in self.numbers.pop(run.directory):
            self.study.tell(number, value, pruned=found.state != "finished" and run.directory in self.pruned)

    def _keep(self) -> None:
        """Write the trials down as an experiment that `trainer.report` reads."""
        points = []
        for point in self.study.points():
            try:
                plan_of(self.options, [point], self.file)
            except ConfigError:
                continue
            points.append(point)
        if points:
            plan = plan_of(self.options, points, self.file)
            write_bytes_atomic(self.file, plan.source.text.encode())
            self.place.write_plan(plan)
