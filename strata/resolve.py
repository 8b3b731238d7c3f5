"""A plain nested dict to options objects, with every mistake reported at once; and back to a dict."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from strata import registry
from strata.errors import Problem
from strata.options import Declared, declaration, defined_in, type_hints
from strata.values import Mismatch, Text, coerce, plain, read_literal


@dataclasses.dataclass
class Resolution:
    """What `resolve` found beside the object itself."""

    problems: list[Problem] = dataclasses.field(default_factory=list)
    filled: list[str] = dataclasses.field(default_factory=list)  # paths whose default was used


def resolve(cls: type, tree: Mapping[str, Any], path: str = "") -> tuple[Any, Resolution]:
    """Turn `tree` into an instance of the options class `cls`.

    Returns:
      The instance (None if there was any problem) and a `Resolution` with all problems and the paths of every leaf
      that was not given.
    """
    found = Resolution()
    value = _section(cls, tree, path, found)
    return (None if found.problems else value), found


def _section(cls: type, tree: Any, path: str, found: Resolution, ignore: tuple[str, ...] = ()) -> Any:
    if isinstance(tree, Text):
        tree = read_literal(tree.text)
    if not isinstance(tree, Mapping):
        words = ", ".join(f.name for f in dataclasses.fields(cls))
        found.problems.append(Problem(path, f"expected a group of fields ({words})", tree, defined_in=defined_in(cls)))
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields and key not in ignore:
            found.problems.append(_unknown(cls, key, tree[key], path, [*ignore, *fields]))
    hints, values, broken = type_hints(cls), {}, set()
    for name, field in fields.items():
        declared, where = declaration(field), f"{path}.{name}" if path else name
        given, before = name in tree, len(found.problems)
        if declared.part:
            values[name] = _parts(declared, tree.get(name), given, field, where, found, cls)
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _section(hints[name], tree.get(name, {}), where, found)
        elif not given:
            found.filled.append(where)
            values[name] = field.default
        else:
            values[name] = _leaf(cls, field, declared, hints[name], tree[name], where, found)
        # What could be built in spite of a misspelt field is still checked with its neighbours.
        missing = values[name] is None or (isinstance(values[name], tuple) and None in values[name])
        if missing and len(found.problems) > before:
            broken.add(name)
    value, before = _without(cls, values, broken), len(found.problems)
    for name, message in _checked(value.problems) if hasattr(value, "problems") else ():
        where = ".".join(filter(None, [path, name]))
        shown, known = _value_at(value, name)
        found.problems.append(Problem(where, message, shown, known, defined_in(cls, name.partition(".")[0] or None)))
    # Whoever holds these options may ask them for what such a combination cannot give.
    return value if len(found.problems) == before else None


class Waits(BaseException):
    """A check read a field that has a problem of its own: what it would say of a stand-in is about nothing that was written.

    No `Exception`, which a check may catch for reasons of its own.
    """


def _without(cls: type, values: Mapping[str, Any], broken: set[str]) -> Any:
    """An instance of `cls` whose `broken` fields raise `Waits` when they are read; it equals itself alone."""
    if not broken:
        return cls(**values)

    def read(self, name):
        if name in broken:
            raise Waits(name)
        return object.__getattribute__(self, name)

    own = {"__getattribute__": read, "__hash__": object.__hash__, "__eq__": object.__eq__, "__repr__": object.__repr__}
    value = object.__new__(type(cls.__name__, (cls,), own))
    for name in values.keys() - broken:
        object.__setattr__(value, name, values[name])
    return value


def _checked(check: Callable[[], Iterable]) -> Iterator[tuple[str, str]]:
    """What `problems` gives, each iterator in it as a check of its own; a check ends where it would have to wait."""
    try:
        for item in check():
            if isinstance(item, Iterator):
                yield from _checked(lambda item=item: item)
            else:
                yield item
    except Waits:
        return


def _value_at(value: Any, name: str) -> tuple[Any, bool]:
    """What to show of a field, and whether to: no options objects, and nothing that has a problem of its own."""
    try:
        for step in filter(None, name.split(".")):
            if not hasattr(value, step):
                return None, False
            value = getattr(value, step)
    except Waits:
        return None, False
    held = value if isinstance(value, tuple) else (value,)
    return value, bool(name) and not any(dataclasses.is_dataclass(item) for item in held)


def _leaf(cls, field, declared: Declared, hint: Any, raw: Any, where: str, found: Resolution) -> Any:
    source = defined_in(cls, field.name)
    try:
        value = coerce(raw, hint)
    except Mismatch as mismatch:
        bounds = f", {declared.expected_range}" if declared.expected_range else ""
        message = f"{mismatch}{bounds} ({declared.help}; default {field.default!r})"
        found.problems.append(Problem(where, message, raw, defined_in=source))
        return None
    for element in value if isinstance(value, tuple) else (value,):
        if element is not None and not declared.allows(element):
            message = f"expected {declared.expected_range} ({declared.help}; default {field.default!r})"
            if isinstance(element, str) and declared.among:
                message += nearest(element, [str(choice) for choice in declared.among])
            found.problems.append(Problem(where, message, value, defined_in=source))
            return None
    return value


def _parts(declared: Declared, tree: Any, given: bool, field, where: str, found: Resolution, cls: type) -> Any:
    if isinstance(tree, Text) and tree.text.strip().lower() in ("none", "null"):
        tree = None
    elif isinstance(tree, Text):
        tree = read_literal(tree.text)
    if declared.many:
        if tree is None:
            if not given:
                found.filled.append(where)
            return ()
        if isinstance(tree, (str, Mapping)) or not hasattr(tree, "__iter__"):
            message = "expected a list of dicts, each with a name"
            if isinstance(tree, str) and tree in registry.names(declared.part):
                message += f"; write {where}.0.name = {tree!r} to choose its first"
            found.problems.append(Problem(where, message, tree, defined_in=defined_in(cls, field.name)))
            return None
        return tuple(_part(declared, item, f"{where}.{i}", None, found, cls, field) for i, item in enumerate(tree))
    if tree is None and (field.default is None or not given):
        if field.default is None:
            if not given:
                found.filled.append(where)
            return None
        tree = {}
    return _part(declared, tree, where, field.default, found, cls, field)


def _part(declared: Declared, tree: Any, where: str, default: str | None, found: Resolution, cls: type, field) -> Any:
    source = defined_in(cls, field.name)
    tree = read_literal(tree.text) if isinstance(tree, Text) else tree
    if not isinstance(tree, Mapping):
        known = registry.names(declared.part)
        message = f"expected a dict with a name; write {where}.name = {str(tree)!r} to choose a component"
        if tree is None or str(tree) not in known:
            message = f"expected a dict with a name, one of {', '.join(known)}"
        found.problems.append(Problem(where, message, tree, defined_in=source))
        return None
    name = tree.get("name", default)
    if "name" not in tree:
        found.filled.append(f"{where}.name")
    name = name.text if isinstance(name, Text) else name
    known = registry.names(declared.part)
    if name not in known:
        text = "no component is chosen" if name is None else f"no {declared.part} has this name{nearest(str(name), known)}"
        message = f"{text} Registered: {', '.join(known)}."
        found.problems.append(Problem(f"{where}.name", message, name, name is not None, source))
        return None
    return _section(registry.lookup(declared.part, name), tree, where, found, ignore=("name",))


def _unknown(cls: type, key: str, value: Any, path: str, fields: list[str]) -> Problem:
    where = f"{path}.{key}" if path else key
    owners = []
    if hasattr(cls, "kind"):
        for name in registry.names(cls.kind):
            other = registry.lookup(cls.kind, name)
            if other is not cls and key in {field.name for field in dataclasses.fields(other)}:
                owners.append(name)
    prefix = f"{path}." if path else ""
    near = difflib.get_close_matches(key, fields, n=3, cutoff=0.5)
    message = "unknown field"
    if hasattr(cls, "kind"):
        message += f" of {cls.kind} {cls.name!r}"
    if near:
        message += f"; did you mean {' or '.join(prefix + name for name in near)}?"
    if owners:
        message += f" (it is a field of {', '.join(owners)})"
    if not message.endswith("?"):
        message += "."
    message += f" Fields here: {', '.join(fields) or 'none'}."
    return Problem(where, message, value, defined_in=defined_in(cls))


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean x or y?`, or a full stop when nothing is near."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else "."


def to_tree(value: Any) -> Any:
    """Options objects back to nested dicts and lists, complete: every field, every component's `name`."""
    if dataclasses.is_dataclass(value):
        tree = {"name": value.name} if hasattr(type(value), "kind") else {}
        return tree | {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_tree(item) for item in value]
    return plain(value)


def components(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every component in an options object by dotted path, itself included, at any depth; nothing for None."""
    if not dataclasses.is_dataclass(value):
        return
    if hasattr(type(value), "kind"):
        yield path, value
    hints = type_hints(type(value))
    for field in dataclasses.fields(value):
        declared, where = declaration(field), f"{path}.{field.name}" if path else field.name
        if declared.many:
            for i, element in enumerate(getattr(value, field.name)):
                yield from components(element, f"{where}.{i}")
        elif declared.part or dataclasses.is_dataclass(hints[field.name]):  # no others are read: one may be wrong
            yield from components(getattr(value, field.name), where)


def leaves(value: Any, path: str = "", key: str = "semantic", *, identity: bool = False) -> Iterator[tuple[str, Any, str]]:
    """Every leaf of an options object as `(dotted path, plain value, key class)`.

    With `identity`, fields that a later version added are left out while they have their default.
    """
    if hasattr(type(value), "kind"):
        yield f"{path}.name", value.name, key
    for field in dataclasses.fields(value):
        declared, item = declaration(field), getattr(value, field.name)
        where, own = f"{path}.{field.name}" if path else field.name, declared.key or key
        if identity and declared.added and item == getattr(type(value)(), field.name):
            continue
        if dataclasses.is_dataclass(item):
            yield from leaves(item, where, own, identity=identity)
        elif declared.many and item:
            for i, element in enumerate(item):
                yield from leaves(element, f"{where}.{i}", own, identity=identity)
        else:
            yield where, to_tree(item), own
