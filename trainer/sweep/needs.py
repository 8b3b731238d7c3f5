"""Arms that start from what another arm's run left: a donor, a teacher, weights to be measured. Imports no JAX.

`Arm("looped", {"init_from.run": RunOf("donor"), "train.teacher.run": RunOf("donor")})` starts from the run of the arm "donor"
at its own seed, and learns from it; a measurement gets the directory as an argument, `{"run": RunOf("donor")}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata import ConfigError, Problem
from trainer.sweep.space import read_seeds

if TYPE_CHECKING:
    from trainer.sweep.experiment import Arm


@dataclasses.dataclass(frozen=True)
class RunOf:
    """As a value in an arm's changes: the directory of another arm's run of the same seed.

    That run is made first. Where it fails or diverges, the one that needs it fails without being started. Of a tuned arm it is
    the run at the point that was chosen. An arm that is tuned itself tries its points on the chosen tuning run, so the other
    must be tuned at the same seeds.

    Args:
      arm: its name.
    """

    arm: str

    def __str__(self) -> str:
        return f"the run of {self.arm}"


Directories = Mapping[tuple[str, int], str]
"""The run directory by arm and seed."""


def needed(arm: Arm) -> tuple[str, ...]:
    """Names of the arms that an arm starts from."""
    layers = (arm.changes, *arm.by_scale.values())
    return tuple(dict.fromkeys(value.arm for layer in layers for value in layer.values() if isinstance(value, RunOf)))


def problems(arms: Sequence[Arm]) -> Iterator[Problem]:
    """Arms that are not there, have no run of the seed, or wait for each other."""
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        for name in needed(arm):
            other, where = by_name.get(name), f"arm {arm.name!r}"
            if other is None:
                yield Problem(where, f"starts from the run of {name!r}, and the arms are {', '.join(by_name)}", has_value=False)
            elif arm.tune and not _tuned_alike(arm, other):
                message = f"is tuned and starts from the run of {name!r}, which is not tuned at the same seeds and scales"
                yield Problem(where, message, has_value=False)
            elif arm.seeds != other.seeds:
                yield Problem(where, f"starts from the run of {name!r}, which has other seeds", has_value=False)
            elif name in _all_needed(by_name, name):
                yield Problem(where, f"starts from the run of {name!r}, which in the end waits for itself", has_value=False)


def _tuned_alike(arm: Arm, other: Arm) -> bool:
    """Whether another arm has tuning runs wherever a tuned arm has them."""
    try:
        alike = other.tune is not None and set(read_seeds(arm.tune.seeds)) <= set(read_seeds(other.tune.seeds))
    except ConfigError:
        return True  # seeds that are none are said of the arm that has them
    if not alike:
        return False
    return other.tune.scales is None or (arm.tune.scales is not None and set(arm.tune.scales) <= set(other.tune.scales))


def with_needed(chosen: Sequence[str], arms: Sequence[Arm]) -> list[str]:
    """The chosen arms and those that they start from."""
    by_name = {arm.name: arm for arm in arms}
    return list(dict.fromkeys(name for one in chosen for name in (one, *sorted(_all_needed(by_name, one)))))


def in_order(arms: Sequence[Arm]) -> list[Arm]:
    """Every arm after those that it starts from, otherwise as given.

    Raises:
      ConfigError: one of those is not among `arms`.
    """
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        if missing := [name for name in needed(arm) if name not in by_name]:
            raise ConfigError(f"arm {arm.name!r} starts from the run of {missing[0]!r}, which is not run at this scale")
    return sorted(arms, key=lambda arm: _level(by_name, arm))


def resolve(changes: Mapping[str, Any], seed: int, directories: Directories) -> dict[str, Any]:
    """Changes with the directories of the runs that they name."""
    return {path: directories[value.arm, seed] if isinstance(value, RunOf) else value for path, value in changes.items()}


def taken_as_they_are(tree: Any, names: Sequence[str]) -> set[str]:
    """Of the run directories called `names`, those whose newest checkpoint a run takes: no `step` stands beside them in its
    config, or in the arguments of a measurement.
    """
    if isinstance(tree, list):
        return {name for item in tree for name in taken_as_they_are(item, names)}
    if not isinstance(tree, Mapping):
        return set()
    found = {name for item in tree.values() for name in taken_as_they_are(item, names)}
    values = [value for value in tree.values() if isinstance(value, str) and Path(value).name in names]
    return found if tree.get("step") is not None else found | {Path(value).name for value in values}


def _all_needed(by_name: Mapping[str, Arm], name: str) -> set[str]:
    found: set[str] = set()
    waiting = list(needed(by_name[name]))
    while waiting:
        if (other := waiting.pop()) not in found:
            found.add(other)
            waiting += needed(by_name[other]) if other in by_name else ()
    return found


def _level(by_name: Mapping[str, Arm], arm: Arm) -> int:
    return max((1 + _level(by_name, by_name[name]) for name in needed(arm)), default=0)
