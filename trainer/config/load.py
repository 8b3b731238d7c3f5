"""The whole way from `--config FILE` and its overrides to a checked `Config`."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strata import ConfigError, Problem, resolve
from strata.values import Mismatch, Text, plain, read_literal
from trainer.config import files, overrides
from trainer.options import Config


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A config that passed every check that needs no JAX."""

    config: Config
    name: str  # of the config, the first part of a run's directory
    notes: tuple[str, ...]  # what the user should know: leftovers dropped, defaults added
    source: str  # the file, with its argument
    overrides: tuple[tuple[str, str], ...]


def load(
    source: str, changes: Sequence[tuple[str, str]] = (), kept: dict[str, tuple[dict[str, Any], Path]] | None = None
) -> Loaded:
    """Read, override and check a config.

    Args:
      source: `FILE[:ARG]`, a `.py` file with `get_config` or a run's own `config.json`.
      changes: `(dotted path, text)` pairs from the command line.
      kept: what files held when they were first read, by source: they are read once, and that holds.

    Raises:
      ConfigError: with every mistake found.
    """
    kept = {} if kept is None else kept
    if source not in kept:
        kept[source] = files.read(source)
    tree, path = kept[source]
    archived = path.suffix == ".json"
    if archived and (path.parent / "environment.json").is_file():
        _import_nothing_from(path.parent)
    config, notes, filled = _resolve(tree, changes, source)
    # A resolved config is complete, so whatever is missing was added after it was written, or belongs to what is given here.
    chosen = tuple(f"{path.removesuffix('.name')}." for path, _ in changes)
    missing = sorted({where for where in filled if not where.startswith(chosen)}) if archived else []
    if missing:
        listed = [f"{where} = {json.dumps(_leaf(config, where))}" for where in missing]
        notes = [*notes, f"{path} is older than these fields, which take their defaults: {', '.join(listed)}"]
    return Loaded(config, _name(path, archived), tuple(notes), source, tuple(changes))


def resolve_config(tree: Mapping[str, Any] | Config) -> Config:
    """Check a config given as a `ConfigDict` or dict. Raises `ConfigError` with every mistake."""
    if isinstance(tree, Config):
        return tree
    if isinstance(tree, (str, Path)):
        raise ConfigError(f"{str(tree)!r} is no config; of a file it is trainer.config.load({str(tree)!r}).config")
    try:
        fields = plain(tree)
    except Mismatch as mismatch:
        raise ConfigError(f"the config holds something that is not data: {mismatch}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"a config is a dict or ConfigDict with the fields of a run, not {type(tree).__name__}")
    return _resolve(fields, (), "")[0]


def _resolve(tree: dict[str, Any], changes: Sequence[tuple[str, str]], source: str) -> tuple[Config, list[str], list[str]]:
    tree = copy.deepcopy(tree)
    problems = _import_plugins(tree, changes)
    notes, misplaced = overrides.apply(tree, changes, Config)
    config, found = resolve(Config, tree)
    problems += misplaced + found.problems
    if problems:
        raise ConfigError(problems, source)
    return config, notes, found.filled


def _import_nothing_from(run: Path) -> None:
    """A run directory is data. Started within it, Python would look there for the modules that its config names."""
    here = Path.cwd()
    if here.is_relative_to(run.resolve()):
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]


def _import_plugins(tree: Mapping[str, Any], changes: Sequence[tuple[str, str]]) -> list[Problem]:
    """Import the user's modules before anything is looked up by name."""
    plugins = dict(changes).get("plugins", tree.get("plugins", ()))
    if isinstance(plugins, str):
        literal = read_literal(plugins)
        plugins = [name for name in plugins.split(",") if name] if isinstance(literal, str) else literal
    problems = []
    for name in plugins if isinstance(plugins, (list, tuple)) else ():
        if not isinstance(name, str):
            continue  # reported where types are checked
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            problems.append(Problem("plugins", f"importing {name} raised {type(error).__name__}: {error}", name))
    return problems


def _name(path: Path, archived: bool) -> str:
    if not archived:
        return path.stem
    try:
        return json.loads((path.parent / "overrides.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return path.parent.name if path.name == "config.json" else path.stem


def _leaf(config: Any, path: str) -> Any:
    from strata import to_tree

    value = to_tree(config)
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


__all__ = ["Loaded", "Text", "load", "resolve_config"]
