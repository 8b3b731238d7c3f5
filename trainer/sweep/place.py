"""The directory of a sweep: its ledger, the configs that its runs are started with, their output. Imports no JAX.

runs/sweeps/<experiment>-<scale>/
    plan.json       what is run and how it is decided, as of the last start
    ledger.jsonl    `trainer.sweep.ledger`
    earlier.json    the report that `--earlier` named, if it did
    configs/RUN/    config.json and where it came from: editing a file during a sweep changes nothing in it
    logs/RUN.log    standard output and error of every attempt
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import ConfigError
from trainer.atomic_files import write_bytes_atomic, write_json_atomic
from trainer.metrics.jsonl import read_metrics
from trainer.sweep import outcome as outcomes
from trainer.sweep.earlier import Earlier
from trainer.sweep.ledger import Ledger, given_up, last_ends
from trainer.sweep.outcome import Outcome, outcome
from trainer.sweep.plan import Choice, Plan, Run, Score, arms_at, make_plan
from trainer.sweep.reading import read
from trainer.sweep.space import read_seeds


class Place:
    """Where one sweep keeps its things.

    Args:
      runs: the directory of run directories.
      name: of the sweep.
      earlier: knows runs whose directories are gone; None: what `keep_earlier` has kept, if anything.

    Raises:
      ConfigError: what was kept is damaged, or knows runs that `earlier` does not.
    """

    def __init__(self, runs: str | os.PathLike[str], name: str, earlier: Earlier | None = None):
        self.runs = Path(runs)
        self.path = self.runs / "sweeps" / name
        self.ledger = Ledger(self.path)
        kept = self.path / "earlier.json"
        self.earlier = earlier
        if kept.is_file():
            before = Earlier(kept)
            self.earlier = earlier or before
            if lost := before.unknown_to(self.earlier):
                raise ConfigError(
                    f"this sweep goes by {kept} already, which has {len(lost)} runs that {self.earlier.path} has not, such as "
                    f"{lost[0]}: make one report of what is known (python -m trainer.report) and give that, or remove {kept}"
                )

    def directory(self, run: Run) -> Path:
        """The run directory."""
        return self.runs / run.directory

    def log(self, run: Run) -> Path:
        """Output of the run's attempts."""
        return self.path / "logs" / f"{run.directory}.log"

    def command(self, run: Run) -> list[str]:
        """What is executed for a run, after `write_config`."""
        config = str(self.path / "configs" / run.directory / "config.json")
        if run.kind == "measurement":
            module, option = "trainer.sweep.measurement", "--spec"
        else:
            module, option = "trainer", "--config"
        return [sys.executable, "-m", module, option, config, "--workdir", str(self.directory(run))]

    def write_config(self, run: Run) -> None:
        """Keep the config that the run is started with."""
        directory = self.path / "configs" / run.directory
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(directory / "config.json", run.config.encode())
        origin = {"config": run.source, "name": run.name, "overrides": [list(pair) for pair in run.changes]}
        write_json_atomic(directory / "overrides.json", origin)

    def write_plan(self, plan: Plan) -> None:
        """`plan.json`, and a row in the ledger with the rules that stood when the launcher was started."""
        self.path.mkdir(parents=True, exist_ok=True)
        if plan.only is not None:  # --arms says what is started now, not what the experiment is
            metric = plan.experiment.metric
            how = {"changes": plan.changes, "score": self.score(metric), "runs_at": self.runs}
            plan = make_plan(plan.source, plan.scale_name, **how)
        rules = rules_of(plan)
        content = {
            "experiment": plan.experiment.name,
            "file": str(plan.source.path),
            "text": plan.source.text,
            "scale": plan.scale_name,
            "axes": [list(pair) for pair in plan.source.axes],
            "changes": [list(pair) for pair in plan.changes],
            "rules": rules,
            "later": plan.later,
            "choices": [dataclasses.asdict(choice) for choice in plan.choices],
            "notes": list(plan.notes),
            "runs": [describe(run) for run in plan.runs],
        }
        write_json_atomic(self.path / "plan.json", content)
        self.ledger.append(
            "plan",
            experiment=plan.experiment.name,
            scale=plan.scale_name,
            file_sha256=hashlib.sha256(plan.source.text.encode()).hexdigest(),
            rules=rules,
            runs=len(plan.runs),
            later=plan.later,
            command=sys.orig_argv,
        )

    def keep_earlier(self) -> None:
        """From now on the sweep knows the runs of its earlier report without being told."""
        if self.earlier is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.earlier.keep(self.path / "earlier.json")

    def outcome(self, run: Run, ends: Mapping[str, Mapping[str, Any]] | None = None) -> Outcome:
        """What became of a run; the ledger knows of failures before there was a directory, and of time limits, and an earlier
        report of runs whose directory is gone.
        """
        found = outcome(self.directory(run), run.steps)
        if found.state == "running":
            return found
        known = self.remembered(run, found)
        if known is not None and known.ended:
            return known
        if found.state in ("missing", "broken", "preempted"):
            end = (last_ends(self.ledger.rows()) if ends is None else ends).get(run.directory)
            if end and end["outcome"] == "failed":
                return Outcome("failed", found.step, end.get("message") or found.message)
        return known or found

    def remembered(self, run: Run, found: Outcome | None = None) -> Outcome | None:
        """What an earlier report alone knows of a run, which may have ended there and be at work here again for another that
        starts from it. None if it ended here, or failed there and there is anything of it here.

        Args:
          found: what its directory says, if that has been read.
        """
        known = None if self.earlier is None else self.earlier.find(run)
        if known is None:
            return None
        found = found or outcome(self.directory(run), run.steps)
        return None if found.ended or (found.state != "missing" and not known.found.ended) else known.found

    def to_make(self, plan: Plan) -> list[Run]:
        """The runs of a plan that have not ended, each once, failed ones among them; with those that an earlier report alone
        knows, where a run that is to be made starts from them.
        """
        ends = last_ends(self.ledger.rows())
        gone = {run.directory: run for run in plan.distinct if self.remembered(run) is not None}
        ahead = [run for run in plan.distinct if not self.outcome(run, ends).ended]
        made = {run.directory for run in ahead}
        while ahead:
            needed = [gone[name] for name in ahead.pop().needs if name in gone and name not in made]
            made |= {run.directory for run in needed}
            ahead += needed
        return [run for run in plan.distinct if run.directory in made]

    def known_alone(self, plan: Plan) -> set[str]:
        """Directories of runs that an earlier report alone knows and that are not made again."""
        ahead = {run.directory for run in self.to_make(plan)}
        return {run.directory for run in plan.distinct if run.directory not in ahead and self.remembered(run) is not None}

    def score(self, metric: outcomes.Metric) -> Score:
        """For `trainer.sweep.plan.make_plan`: reads tuning runs; one that failed for good has ended, without a number.

        Where an earlier report has a number, that one counts: a run that is made again, for others to start from, may round to
        another on another machine, and must not change what has been chosen.
        """

        ends = last_ends(self.ledger.rows())

        def score(run: Run) -> tuple[bool, float | None]:
            found = outcome(self.directory(run), run.steps)
            known = None if self.earlier is None else self.earlier.find(run)
            if known is not None and (metric.label in known.numbers or found.state == "missing"):
                return True, known.number(metric)
            if found.state != "finished":
                return found.ended or (found.state != "running" and given_up(ends.get(run.directory))), None
            rows = read_metrics(self.directory(run) / "metrics.jsonl")
            return True, outcomes.value(rows, metric, found.extended_from(run.steps))

        return score


def read_plan(path: Path) -> Plan:
    """The plan of a sweep's directory as of the last start: its runs are those that were planned then, by that code.

    Raises:
      ConfigError: it is not the `plan.json` of a sweep.
    """
    try:
        kept = json.loads((path / "plan.json").read_text())
        source = read(kept["file"], [tuple(pair) for pair in kept["axes"]], text=kept["text"])
        fields = [field.name for field in dataclasses.fields(Run)]
        runs = [
            Run(
                **{name: item[name] for name in fields}
                | {"config": json.dumps(item["config"]), "changes": _pairs(item["changes"]), "needs": tuple(item["needs"])}
            )
            for item in kept["runs"]
        ]
        return Plan(
            source,
            kept["scale"],
            tuple(runs),
            kept["later"],
            tuple(Choice(**choice) for choice in kept["choices"]),
            tuple(kept["notes"]),
            _pairs(kept["changes"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path / 'plan.json'} is damaged ({type(error).__name__}: {error})") from None


def _pairs(pairs: Any) -> tuple[tuple[str, str], ...]:
    return tuple((path, text) for path, text in pairs)


def describe(run: Run) -> dict[str, Any]:
    """A run as JSON, with its config as a tree."""
    return dataclasses.asdict(run) | {
        "directory": run.directory,
        "config": json.loads(run.config),
        "changes": [list(pair) for pair in run.changes],
        "command": run.command,
    }


def rules_of(plan: Plan) -> list[dict[str, Any]]:
    """Every claim with its decision rule, its seeds and the tuning of its arms, as JSON: what must not change after the runs.

    `claim` has every field of the claim and of its rule, `metrics` those of its metric and of the experiment's, which tuning
    goes by; `seeds` and `tuning` are of the two arms.
    """
    arms = {arm.name: arm for arm in arms_at(plan.experiment, plan.scale_name)}
    found = []
    for claim in plan.claims:
        own = [arms[name] for name in (claim.arm, claim.against) if name in arms]
        metrics = {"own": dataclasses.asdict(claim.metric or plan.experiment.metric)}
        tuned = [arm for arm in own if arm.tune is not None and arm.tune.at(plan.scale_name)]
        tuning = {arm.name: {"points": list(arm.tune.space), "seeds": read_seeds(arm.tune.seeds)} for arm in tuned}
        found.append(
            {
                "statement": claim.statement,
                "arm": claim.arm,
                "against": claim.against,
                "metric": (claim.metric or plan.experiment.metric).label,
                "rule": str(claim.rule),
                "paper_effect": "unknown" if claim.paper_effect is None else f"{claim.paper_effect:g}",
                "claim": {name: value for name, value in dataclasses.asdict(claim).items() if name != "metric"},
                "metrics": metrics | ({"tuning": dataclasses.asdict(plan.experiment.metric)} if tuned else {}),
                "seeds": {arm.name: read_seeds(plan.scale.seeds if arm.seeds is None else arm.seeds) for arm in own},
                "tuning": tuning,
            }
        )
    return json.loads(json.dumps(found))
