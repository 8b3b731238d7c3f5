"""A listing of every config field: what `--fields` prints."""

from __future__ import annotations

import dataclasses
import json

from strata import ConfigError, registry, to_tree
from strata.options import declaration, defined_in, describe, type_hints
from trainer.options import Config


def describe_fields(path: str = "") -> str:
    """The fields at a dotted path (the whole config when empty), one a line, with type, range, default, key class and help.

    A component's path shows every registered choice; `path.NAME` shows the fields of one.
    """
    cls, key = Config, "semantic"
    for i, step in enumerate(steps := [s for s in path.split(".") if s]):
        field = next((f for f in dataclasses.fields(cls) if f.name == step), None) if isinstance(cls, type) else None
        where = ".".join(steps[: i + 1])
        if isinstance(cls, str):
            if step not in registry.names(cls):
                raise ConfigError(f"--fields {where}: registered for {cls} are {', '.join(registry.names(cls))}")
            cls = registry.lookup(cls, step)
        elif field is None:
            raise ConfigError(f"--fields {where}: the fields are {', '.join(f.name for f in dataclasses.fields(cls))}")
        else:
            inner = declaration(field).part or type_hints(cls)[step]
            if not (isinstance(inner, str) or dataclasses.is_dataclass(inner)):
                if i < len(steps) - 1:
                    raise ConfigError(f"--fields {path}: {where} is a single field")
                return next(line for line in _lines(cls, ".".join(steps[:i]), key) if line.startswith(f"  {where}:"))
            key, cls = declaration(field).key or key, inner
    return "\n".join(_lines(cls, path, key))


def _lines(cls: type | str, path: str, key: str) -> list[str]:
    if isinstance(cls, str):
        lines = [f"{path}.name: one of {', '.join(registry.names(cls))}"]
        for name in registry.names(cls):
            option = registry.lookup(cls, name)
            lines += ["", f"{path}.{name}: {(option.__doc__ or '').strip().splitlines()[0]} ({defined_in(option)})"]
            lines += _lines(option, path, key)
        return lines
    lines = []
    for field in dataclasses.fields(cls):
        declared, where = declaration(field), f"{path}.{field.name}" if path else field.name
        own = declared.key or key
        if declared.part:
            choice = "a list of" if declared.many else f"default {field.default};"
            lines.append(f"  {where}: {choice} one of {', '.join(registry.names(declared.part))}: {declared.help}")
        elif dataclasses.is_dataclass(type_hints(cls)[field.name]):
            lines += [f"{where}: {declared.help}", *_lines(type_hints(cls)[field.name], where, own)]
        else:
            words = [
                describe(type_hints(cls)[field.name]),
                declared.expected_range,
                f"default {json.dumps(to_tree(field.default))}",
            ]
            lines.append(f"  {where}: {', '.join(filter(None, words))} [{own}]: {declared.help}")
    return lines
