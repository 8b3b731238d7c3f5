"""Components by kind and name, each with its options class and the place of its implementation.

Options classes live in modules that import no JAX; the implementation is named as `"module:callable"` and imported
only when it is built.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from strata.errors import ConfigError

_components: dict[str, dict[str, type]] = {}
_bases: dict[str, type] = {}


def register(kind: str, name: str, *, implementation: str | None = None) -> Callable[[type], type]:
    """Class decorator that puts an options class under `kind` and `name`.

    Args:
      kind: a dotted kind such as `"model.norm"` or `"optimizer.direction"`.
      name: the value of the leaf `name` that chooses it.
      implementation: `"module:callable"`; None if the options alone say everything.

    Raises:
      ValueError: another class already has this kind and name, or a field hides what is set here.
    """

    def add(cls: type) -> type:
        taken = {"kind", "name", "implemented_by"} & set(getattr(cls, "__dataclass_fields__", ()))
        if taken:
            raise ValueError(f"{cls.__qualname__} has fields named {sorted(taken)}, which the registry sets on the class")
        known = _components.setdefault(kind, {})
        other = known.get(name)
        # A module run twice under one name (`python -m`, reload) registers the same class again: the newer one counts.
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{kind} {name!r} is registered by both {other.__module__} and {cls.__module__}")
        cls.kind, cls.name, cls.implemented_by = kind, name, implementation
        known[name] = cls
        _complete(cls)
        return cls

    return add


def base(kind: str) -> Callable[[type], type]:
    """Class decorator for what other code asks of the options of a kind, with the answer of those that do not say.

    An options class may inherit from it; of one that does not, registering fills in what it lacks. So whoever asks needs no
    answer of its own for parts that were written elsewhere.
    """

    def add(cls: type) -> type:
        _bases[kind] = cls
        for known in _components.get(kind, {}).values():  # a plugin may have been imported before the package that asks
            _complete(known)
        return cls

    return add


def _complete(cls: type) -> None:
    """Give an options class what the base of its kind has and it lacks."""
    asked = vars(_bases[cls.kind]) if cls.kind in _bases else {}
    for name, answer in asked.items():
        if not name.startswith("_") and not hasattr(cls, name) and name not in getattr(cls, "__dataclass_fields__", ()):
            setattr(cls, name, answer)


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(_components.get(kind, {}))


def lookup(kind: str, name: str) -> type:
    """The options class of a component; it carries `kind`, `name` and `implemented_by`.

    Raises:
      LookupError: nothing is registered so; the message has the nearest names.
    """
    try:
        return _components[kind][name]
    except KeyError:
        near = difflib.get_close_matches(name, names(kind), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise LookupError(f"no {kind} is named {name!r}{hint} Registered: {', '.join(names(kind))}") from None


def implementation(component: Any) -> Callable[..., Any]:
    """Import and return the implementation of an options object or class.

    Raises:
      ConfigError: `register` was told a place where there is none.
      LookupError: `register` was told no place.
    """
    if component.implemented_by is None:
        raise LookupError(f"{component.kind} {component.name!r} has no implementation to import")
    module, _, attribute = component.implemented_by.partition(":")
    wrong = f"{component.kind} {component.name!r} is registered with implementation = {component.implemented_by!r}; "
    try:
        found = importlib.import_module(module) if module and not module.startswith(".") else None
    except ModuleNotFoundError as error:
        # Another module than this or a package of it: a mistake inside, whose traceback says where.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{wrong}there is no module {error.name!r}") from None
    if found is None or not attribute:
        raise ConfigError(f"{wrong}expected 'module:callable'")
    if not hasattr(found, attribute):
        near = difflib.get_close_matches(attribute, dir(found), n=1)
        raise ConfigError(f"{wrong}{module} has no {attribute!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return getattr(found, attribute)
