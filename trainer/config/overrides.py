"""`--config.path.to.key=value`: where a value goes, and what choosing another component leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from strata import Problem, registry
from strata.options import declaration, type_hints
from strata.values import Text


def apply(tree: dict[str, Any], overrides: Sequence[tuple[str, str]], root: type) -> tuple[list[str], list[Problem]]:
    """Write overrides into `tree`, in place.

    A component's `name` goes first: fields that the file gave for the former choice and that the new one does not have
    are removed, and said. Fields given on the command line are never removed; a wrong one is a problem later. In a list
    the index behind the last element adds one.

    Returns:
      Notes for the user, and problems with the paths themselves.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    given = {path for path, _ in overrides}
    for path, text in sorted(overrides, key=_order):
        steps = path.split(".")
        if steps[-1] == "name" and len(steps) > 1:
            notes += _choose(tree, steps[:-1], text, root, given)
        problem = _put(tree, steps, Text(text))
        if problem:
            problems.append(problem)
    return notes, problems


def _order(override: tuple[str, str]) -> tuple[bool, int, list[int]]:
    path, _ = override
    indices = [index for step in path.split(".") if (index := _index(step)) is not None]
    return not path.endswith(".name"), path.count("."), indices


def _index(step: str) -> int | None:
    return int(step) if step.isdecimal() and len(step) < 10 else None


def _put(tree: Any, steps: Sequence[str], value: Text) -> Problem | None:
    for i, step in enumerate(steps):
        last, where = i == len(steps) - 1, ".".join(steps[: i + 1])
        if isinstance(tree, list):
            index = _index(step)
            if index is None or index > len(tree):
                message = f"expected an index into a list of {len(tree)} (from 0 on; {len(tree)} adds an element)"
                return Problem(where, message, value)
            if index == len(tree):
                tree.append({})
            step = index
        elif not isinstance(tree, dict):
            return Problem(".".join(steps[:i]), "is a single value and has no fields", tree)
        elif not last and (step not in tree or tree[step] is None):
            tree[step] = {} if _index(steps[i + 1]) is None else []
        if last:
            tree[step] = value
        else:
            tree = tree[step]
    return None


def _choose(tree: dict[str, Any], steps: Sequence[str], name: str, root: type, overridden: Collection[str]) -> list[str]:
    """Drop what the component at `steps` does not have once it is `name`; say what was dropped and what was kept.

    What is `overridden`, dotted paths, is replaced later and not kept.
    """
    found = _component_at(tree, steps, root)
    if found is None:
        return []
    kind, default, given = found
    where = ".".join(steps)
    if not isinstance(given, dict) or name not in registry.names(kind):
        return []
    former = given.get("name", default)
    if former == name or isinstance(former, Text):
        return []
    fields = {field.name for field in dataclasses.fields(registry.lookup(kind, name))}
    leftovers = {key: given[key] for key in given if key != "name" and key not in fields}
    kept = _without({key: given[key] for key in given if key in fields}, where, overridden)
    for key in leftovers:
        del given[key]
    words = [f"{where}: {former} -> {name}"]
    if leftovers:
        words.append("no longer applies: " + ", ".join(f"{key}={value!r}" for key, value in leftovers.items()))
    if kept:
        words.append("kept from the config: " + ", ".join(f"{key}={value!r}" for key, value in kept.items()))
    return ["; ".join(words)]


def _without(tree: Any, path: str, overridden: Collection[str]) -> Any:
    """A subtree at `path` without the fields that are overridden."""
    if not isinstance(tree, dict):
        return tree
    inside = {key: f"{path}.{key}" for key in tree if f"{path}.{key}" not in overridden}
    return {key: _without(tree[key], where, overridden) for key, where in inside.items()}


def _component_at(tree: Any, steps: Sequence[str], root: type) -> tuple[str, str | None, Any] | None:
    """`(kind, default name, subtree)` of the component at a path, or None if the path is not one."""
    cls: type | None = root
    found = None
    for step in steps:
        if isinstance(tree, list):  # an element of a list of components
            index = _index(step)
            tree = tree[index] if index is not None and index < len(tree) else None
            if found and isinstance(tree, dict):
                cls = registry.lookup(found[0], tree["name"]) if tree.get("name") in registry.names(found[0]) else None
            found = (found[0], None, tree) if found else None
            continue
        if cls is None:
            return None
        field = next((f for f in dataclasses.fields(cls) if f.name == step), None)
        if field is None:
            return None
        tree = tree.get(step) if isinstance(tree, dict) else None
        kind = declaration(field).part
        if kind:
            found = (kind, field.default if isinstance(field.default, str) else None, tree)
            name = (tree or {}).get("name", found[1]) if isinstance(tree, dict) or tree is None else None
            name = name.text if isinstance(name, Text) else name
            cls = registry.lookup(kind, name) if name in registry.names(kind) else None
        else:
            hint = type_hints(cls).get(step)
            cls, found = (hint if dataclasses.is_dataclass(hint) else None), None
    return found
