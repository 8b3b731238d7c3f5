"""Reading an experiment from a file, and axes from the command line. Imports no JAX."""

from __future__ import annotations

import dataclasses
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strata import ConfigError
from strata.values import read_literal
from trainer.sweep.experiment import Experiment, check, expanded_arms
from trainer.sweep.search import Search
from trainer.sweep.space import Space, axis, product


@dataclasses.dataclass(frozen=True)
class Source:
    """An experiment that has no mistakes of its own, and the file that it came from."""

    experiment: Experiment
    path: Path
    text: str  # of the file
    axes: tuple[tuple[str, str], ...] = ()  # from the command line
    configs: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)  # files that were read

    def config_file(self, name: str) -> str:
        """A config file that the experiment names: from here, from beside it, or from the directory above it."""
        bare = name.rpartition(":")[0] if ":" in name and not Path(name).exists() else name
        for place in (Path(), self.path.parent, self.path.parent.parent):
            if (place / bare).is_file():
                return str(place / name)
        return name


def read(file: str, axes: Sequence[tuple[str, str]] = (), *, text: str | None = None) -> Source:
    """The experiment of a file with `get_experiment()`, or a sweep over a config with `get_config`.

    Args:
      file: an experiment, or a config, which then needs axes.
      axes: `(path, text)` pairs from `--sweep.PATH=VALUES`, crossed with each other and with every arm.
      text: what the file held earlier; None: what it holds now.

    Raises:
      ConfigError: with every mistake found in the file and the axes.
    """
    path = Path(file)
    if text is None and not path.is_file():
        raise ConfigError(f"experiment file {file} does not exist")
    if path.suffix != ".py":
        raise ConfigError(f"experiment file {file} is not a .py file with get_experiment()")
    text = _text(path) if text is None else text
    found = _load(path, text)
    spaces = [_axis(name, split_values(values)) for name, values in axes]
    if isinstance(found, Experiment):
        experiment = _crossed(found, spaces)
    else:
        if not spaces:
            raise ConfigError(
                f"{file} is a config, not an experiment: give axes, such as --sweep.seed=0,1,2, or a file with get_experiment()"
            )
        experiment = _crossed(Experiment(name=path.stem, config=file, arms=Space(({},))), spaces)
    problems = check(experiment)
    if problems:
        raise ConfigError(problems, file)
    return Source(experiment, path, text, tuple(axes))


def _axis(path: str, values: list[object]) -> Space:
    """Raises `ConfigError` for a value that is named twice: it would be one point, not two."""
    if twice := [value for i, value in enumerate(values) if repr(value) in map(repr, values[:i])]:
        raise ConfigError(f"--sweep.{path} names {', '.join(map(str, twice))} twice")
    return axis(path, values)


def split_values(text: str) -> list[object]:
    """`1e-3,3e-3`, `a,b` or a JSON list to a list of values; commas inside brackets do not split.

    Raises:
      ConfigError: there is nothing between two commas, or beside one.
    """
    literal = read_literal(text)
    if isinstance(literal, list):
        return literal
    values, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            values.append(text[start:at])
            start = at + 1
    values = [value.strip() for value in [*values, text[start:]]]
    if len(values) > 1 and "" in values:
        raise ConfigError(f"the values {text!r} have nothing where one belongs, beside a comma")
    return [value for value in values if value]


def _crossed(experiment: Experiment, spaces: Sequence[Space]) -> Experiment:
    """Every arm over every point of the axes; an axis `seed` replaces the seeds of every scale."""
    seeds = [space for space in spaces if space.paths == ("seed",)]
    rest = [space for space in spaces if space.paths != ("seed",)]
    if len(seeds) > 1:
        raise ConfigError("--sweep.seed is given twice")
    if seeds:
        values = tuple(_seed(point["seed"]) for point in seeds[0])
        scales = {name: dataclasses.replace(scale, seeds=values) for name, scale in experiment.scales.items()}
        experiment = dataclasses.replace(experiment, scales=scales)
    if not rest:
        return experiment
    space = product(*rest)
    if isinstance(experiment.arms, Space):
        return dataclasses.replace(experiment, arms=product(experiment.arms, space))
    if experiment.claims:
        raise ConfigError(
            f"{experiment.name} makes claims about its arms, and --sweep.{space.paths[0]} would split every arm: "
            "put the axis into the file, or give --config.PATH=VALUE, which changes all arms alike"
        )
    arms = [dataclasses.replace(arm, space=space) for arm in expanded_arms(experiment)]
    return dataclasses.replace(experiment, arms=arms)


def _seed(value: object) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    raise ConfigError(f"--sweep.seed: {value!r} is not a whole number")


def read_search(file: str) -> Search:
    """What `get_search` of a file returns. Raises `ConfigError`."""
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"search file {file} does not exist")
    found = _call(path, _text(path), "get_search")
    if not isinstance(found, Search):
        raise ConfigError(f"get_search in {path} returned {type(found).__name__}, not a Search")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def _load(path: Path, text: str) -> Experiment | None:
    """What `get_experiment` returns; None for a file with `get_config` alone."""
    found = _call(path, text, "get_experiment", unless="get_config")
    if found is not None and not isinstance(found, Experiment):
        raise ConfigError(f"get_experiment in {path} returned {type(found).__name__}, not an Experiment")
    return found


def _call(path: Path, text: str, name: str, unless: str | None = None) -> object:
    """What a function of a file returns; None where the file has the function `unless` in its place."""
    module = types.ModuleType(f"experiment_{path.stem}")
    module.__file__ = str(path)
    sys.path.append(str(path.resolve().parent))
    try:
        sys.modules[module.__name__] = module  # dataclasses in the file look their module up
        exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
        function = getattr(module, name, None)
        if function is None and unless and callable(getattr(module, unless, None)):
            return None
        if not callable(function):
            raise ConfigError(f"it defines no function {name}()")
        return function()
    except ConfigError as error:
        raise ConfigError(f"experiment file {path}: {error}") from None
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
        where = f"{path}:{frames[-1].lineno}" if frames else str(path)
        raise ConfigError(f"experiment file {where} raised {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(str(path.resolve().parent))
