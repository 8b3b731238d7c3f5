"""Adaptive search: Optuna proposes points, the local launcher runs them, bad ones are stopped by their validation curve.

    def get_search():
        space = {"optimizer.direction.learning_rate": LogUniform(1e-3, 1e-1)}
        return Search(name="rates", config="configs/tiny.py", space=space)

    python -m trainer.sweep search FILE [--trials N] [--slots N]

A trial is a run like any other; its study is a journal file beside the ledger, so that a search that was killed goes on, with
the trials that were under way first. Imports no JAX, and Optuna only when it is used.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strata import ConfigError, StrataError
from strata.values import plain
from trainer.sweep.experiment import Metric

INVALID = 10
"""Points that are no config, for each trial that was asked for, after which a search ends."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Any number between two bounds."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """Any number between two positive bounds, evenly on a logarithmic scale."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number between two bounds, both included."""

    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Among:
    """One of these: numbers, words, booleans, None."""

    choices: Sequence[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, for what, and how long.

    Args:
      name: of the sweep's directory.
      config: the config file.
      space: by config path.
      metric: of kind `value`; its rows are the curve that pruning looks at.
      changes: over the config, the same for every trial.
      trials: in all.
      seed: of the runs; what is found on one seed is a proposal, not a verdict.
      sampler_seed: of the proposals.
      prune: stop a run whose metric is worse than the median of the earlier ones at the same step.
      startup: trials that are drawn at random and never stopped.
    """

    name: str
    config: str
    space: Mapping[str, Uniform | LogUniform | Whole | Among]
    metric: Metric = Metric(unit="nats/token")
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trials: int = 20
    seed: int = 1000
    sampler_seed: int = 0
    prune: bool = True
    startup: int = 5
    configs: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)  # as in a `Source`


def check(search: Search) -> None:
    """Raises `ConfigError` for what cannot be searched."""
    if not search.space:
        raise ConfigError("the search has no space, so there is nothing to propose")
    for path, of in search.space.items():
        if isinstance(of, Among):
            if not of.choices:
                raise ConfigError(f"space {path}: there are no choices")
        elif not (of.low < of.high and (not isinstance(of, LogUniform) or of.low > 0)):
            raise ConfigError(f"space {path} from {of.low} to {of.high}: expected low below high" + _positive(of))
    if search.metric.kind != "value" or search.trials < 1:
        raise ConfigError("a search needs a metric of kind value and at least one trial")


def ends(of: Uniform | LogUniform | Whole | Among) -> list[Any]:
    """The values of an axis that are checked before a search: both bounds, or every choice."""
    return list(of.choices) if isinstance(of, Among) else [of.low, of.high]


def _positive(of: Any) -> str:
    return ", both above 0" if isinstance(of, LogUniform) else ""


def _drop_torn_line(journal: Path) -> None:
    """A last line that a kill or a full disk cut short; the caller holds the directory."""
    if journal.is_file():
        with open(journal, "r+b") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)


class Study:
    """Optuna's side: proposes, is told, remembers in `optuna.journal`.

    Raises:
      ConfigError: Optuna is not installed; or the directory holds a study of another search, with what differs.
    """

    def __init__(self, search: Search, directory: Path):
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise ConfigError("a search needs Optuna: pip install 'strata-lm[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directory.mkdir(parents=True, exist_ok=True)
        self.search, self.states = search, optuna.trial.TrialState
        direction = "minimize" if search.metric.lower_is_better else "maximize"
        journal = directory / "optuna.journal"
        try:
            _drop_torn_line(journal)
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
            self.study = optuna.create_study(storage=storage, study_name=search.name, direction=direction, load_if_exists=True)
            known = self.study.get_trials(deepcopy=False)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise StrataError(
                f"{journal} cannot be read ({why}); without it the search begins anew, and no run that is there is made again"
            ) from None
        self._refuse_another(directory)
        # A sampler that began from the same state again would propose the same points again.
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=search.startup, seed=search.sampler_seed + len(known))
        self.study.pruner = optuna.pruners.MedianPruner(search.startup) if search.prune else optuna.pruners.NopPruner()
        self.trials: dict[int, Any] = {}
        for trial in known:
            if trial.state == self.states.RUNNING:  # of a search that was killed: the same point, so the same run, goes on
                self.study.tell(trial.number, state=self.states.FAIL)
                self.study.enqueue_trial(trial.params, user_attrs={"goes_on": trial.number})

    def _refuse_another(self, directory: Path) -> None:
        """What was found for another space, metric or config says nothing about this one."""
        now = {
            f"space {path}": {"kind": type(of).__name__} | {k: plain(v) for k, v in vars(of).items()}
            for path, of in self.search.space.items()
        }
        now |= {
            "metric": dataclasses.asdict(self.search.metric),
            "changes": {k: plain(v) for k, v in self.search.changes.items()},
        }
        now |= {"config": self.search.config, "seed": self.search.seed}
        now = json.loads(json.dumps(now))
        first = self.study.user_attrs.get("search")
        if first is None:  # new, or of an earlier version
            self.study.set_user_attr("search", now)
        elif changed := [name for name in sorted(first.keys() | now.keys()) if first.get(name) != now.get(name)]:
            shown = [f"{name}: {json.dumps(first.get(name))} there, {json.dumps(now.get(name))} now" for name in changed]
            raise ConfigError(f"{directory} holds a search with another {'; '.join(shown)}: give this one another name")

    def ask(self) -> tuple[int, dict[str, Any]] | None:
        """Number and point of the next trial; None when there have been enough.

        Points that are no config are not among those; but once there have been `INVALID` times as many, it ends.
        """
        trials = self.study.get_trials(deepcopy=False)
        waiting = any(trial.state == self.states.WAITING for trial in trials)
        invalid = sum("invalid" in trial.user_attrs for trial in trials)
        spent = sum("goes_on" not in trial.user_attrs for trial in trials) - invalid
        if not waiting and (spent >= self.search.trials or invalid >= INVALID * self.search.trials):
            return None
        trial = self.study.ask()
        self.trials[trial.number] = trial
        return trial.number, {path: _suggest(trial, path, of) for path, of in self.search.space.items()}

    def watch(self, number: int, step: int, value: float) -> bool:
        """Report a point of the curve; whether the trial should be stopped."""
        self.trials[number].report(value, step)
        return self.search.prune and self.trials[number].should_prune()

    def tell(self, number: int, value: float | None, *, pruned: bool = False) -> None:
        """How a trial ended; without a finite value it failed."""
        failed = value is None or not math.isfinite(value)
        state = self.states.PRUNED if pruned else self.states.FAIL if failed else self.states.COMPLETE
        self.study.tell(number, value if state == self.states.COMPLETE else None, state=state)

    def refuse(self, number: int) -> None:
        """The trial's point is no config: it does not count as one that was spent."""
        self.trials[number].set_user_attr("invalid", True)
        self.study.tell(number, state=self.states.FAIL)

    def points(self) -> list[dict[str, Any]]:
        """Of all trials, each once."""
        found: dict[str, dict[str, Any]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.params:
                found.setdefault(repr(sorted(trial.params.items())), trial.params)
        return list(found.values())

    def best(self) -> tuple[dict[str, Any], float] | None:
        """Point and value; None before a trial is complete."""
        if not self.study.get_trials(deepcopy=False, states=[self.states.COMPLETE]):
            return None
        return self.study.best_params, self.study.best_value

    def counts(self) -> dict[str, int]:
        """Trials by how they ended."""
        found: dict[str, int] = {}
        for trial in self.study.get_trials(deepcopy=False):
            found[trial.state.name.lower()] = found.get(trial.state.name.lower(), 0) + 1
        return found


def _suggest(trial: Any, path: str, of: Any) -> Any:
    if isinstance(of, Among):
        return trial.suggest_categorical(path, list(of.choices))
    if isinstance(of, Whole):
        return trial.suggest_int(path, of.low, of.high)
    return trial.suggest_float(path, of.low, of.high, log=isinstance(of, LogUniform))
