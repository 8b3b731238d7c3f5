"""Declaring options: a frozen, keyword-only dataclass is the one home of a component's fields.

    @register("model.norm", "rms_norm", implementation="models.layers.norm:RMSNorm")
    @options
    class RMSNorm:
        "Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467)."

        epsilon: float = option(1e-6, "added to the mean square before the root", above=0)

A class may define `problems(self)`, which yields `(field, sentence)` for combinations that cannot work, and iterators of
such pairs, each of which is a check of its own. A check ends where it reads a field that has a problem by itself, or a
component or section whose combination cannot work; the other checks go on.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Key = Literal["semantic", "execution", "cosmetic"]
"""What a change of the field means for a run that exists (see `option`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """What is declared about one field beside its type and default."""

    help: str = ""
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    among: tuple[Any, ...] | None = None
    key: Key | None = None  # None: the class of the enclosing field, "semantic" at the root
    added: str | None = None  # the version that added the field, if not the first
    part: str | None = None  # the registry kind, for a component chosen by name
    many: bool = False  # a tuple of components

    @property
    def expected_range(self) -> str:
        """The bounds in words, such as `above 0, at most 1`."""
        words = [(self.above, "above"), (self.least, "at least"), (self.below, "below"), (self.most, "at most")]
        bounds = ", ".join(f"{word} {_number(bound)}" for bound, word in words if bound is not None)
        choices = f"one of {', '.join(repr(c) for c in self.among)}" if self.among else ""
        return ", ".join(filter(None, [bounds, choices]))

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type lies in the declared range."""
        if self.among is not None and value not in self.among:
            return False
        bounds = ((self.above, operator.gt), (self.least, operator.ge), (self.below, operator.lt), (self.most, operator.le))
        return all(bound is None or fine(value, bound) for bound, fine in bounds)


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def option(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    among: Sequence[Any] | None = None,
    key: Key | None = None,
    added: str | None = None,
) -> Any:
    """A leaf field.

    Args:
      default: the value when the config does not give one. Its type is the field's annotation, one of `bool`, `int`,
        `float`, `str`, `dict` (free JSON), `tuple[X, ...]` of those, and any of them `| None`.
      help: one line; the unit and the source of the default belong here.
      above, least, below, most: bounds, exclusive and inclusive; they hold for each element of a tuple.
      among: the allowed values.
      key: `"semantic"` if a change makes it another experiment (resuming is refused, the run id changes),
        `"execution"` if it changes only how the same experiment is computed (allowed, recorded, announced as not
        bit-exact), `"cosmetic"` if it changes no number (names, logging, cadences).
      added: the version that added the field. At its default, which is how older versions behaved, it stays out of the
        run id, so that runs of older versions keep theirs.
    """
    declared = Declared(
        help=help,
        above=above,
        least=least,
        below=below,
        most=most,
        among=tuple(among) if among else None,
        key=key,
        added=added,
    )
    return dataclasses.field(default=default, metadata={"declared": declared})


def part(kind: str, default: str | None, help: str, *, key: Key | None = None, added: str | None = None) -> Any:
    """A component of registry `kind`, chosen by its leaf `name`; its own options sit beside the name.

    Args:
      kind: the registry kind, such as `"model.norm"`.
      default: the name used when the config gives none; None makes the component optional and absent.
      help: one line.
      key, added: as in `option`, for the whole subtree.
    """
    declared = Declared(help=help, key=key, part=kind, added=added)
    return dataclasses.field(default=default, metadata={"declared": declared})


def parts(kind: str, help: str, *, key: Key | None = None) -> Any:
    """A list of components of registry `kind`, each a dict with a `name`. Empty by default."""
    return dataclasses.field(default=(), metadata={"declared": Declared(help=help, key=key, part=kind, many=True)})


def section(cls: type, help: str, *, key: Key | None = None, added: str | None = None) -> Any:
    """A fixed group of options, an instance of the options class `cls`."""
    return dataclasses.field(default_factory=cls, metadata={"declared": Declared(help=help, key=key, added=added)})


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, part, parts, section))
def options(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass whose absent parts are filled with their defaults."""
    from strata import registry

    def fill(self):
        for field in dataclasses.fields(self):
            declared = declaration(field)
            value = getattr(self, field.name)
            if declared.part and not declared.many and isinstance(value, str):
                object.__setattr__(self, field.name, registry.lookup(declared.part, value)())

    cls.__post_init__ = fill
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def declaration(field: dataclasses.Field) -> Declared:
    """The `Declared` of a dataclass field (empty for a field that was not made by `option` and its kin)."""
    return field.metadata.get("declared", Declared())


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """The evaluated annotations of an options class."""
    return typing.get_type_hints(cls)


def split_optional(hint: Any) -> tuple[Any, bool]:
    """`(int, True)` for `int | None`, `(int, False)` for `int`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(members) == 1:
            return members[0], True
    return hint, False


def describe(hint: Any) -> str:
    """A type in words: `an integer`, `a list of floats or None`."""
    hint, optional = split_optional(hint)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "a dict"}
    if typing.get_origin(hint) is tuple:
        inner = {int: "integers", float: "numbers", str: "strings", bool: "booleans"}.get(typing.get_args(hint)[0], "values")
        text = f"a list of {inner}"
    else:
        text = words.get(hint, getattr(hint, "__name__", str(hint)))
    return f"{text} or None" if optional else text


@functools.cache
def defined_in(cls: type, name: str | None = None) -> str:
    """`file:line` of a class, or of one of its fields, relative to the directory that holds the package."""
    try:
        lines, start = inspect.getsourcelines(cls)
        module = inspect.getmodule(cls).__name__
    except (OSError, TypeError, AttributeError):
        return ""
    path = module.replace(".", "/") + ".py"
    for offset, line in enumerate(lines):
        if name is not None and re.match(rf"\s+{re.escape(name)}\s*:", line):
            return f"{path}:{start + offset}"
    return f"{path}:{start}"
