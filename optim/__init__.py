"""Optimizers as recipes of optax transformations: direction x schedule x decay, given to parameters by their roles.

`import optim` and `import optim.options` load no JAX; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optim import roles as roles
    from optim import schedules as schedules
    from optim.directions.adamw import adamw as adamw
    from optim.directions.muon import muon as muon
    from optim.directions.muon import scale_by_muon as scale_by_muon
    from optim.directions.newton_schulz import newton_schulz as newton_schulz
    from optim.recipe import build as build
    from optim.recipe import global_norm as global_norm
    from optim.recipe import rates as rates
    from optim.rules import Assignment as Assignment
    from optim.rules import assignment as assignment
    from optim.schedules import RateTable as RateTable

# Functions live in modules of other names: importing a submodule sets an attribute of its own name on this package, and
# `optim.muon` must be the function whatever was imported before.
_homes = {
    "Assignment": "optim.rules",
    "RateTable": "optim.schedules",
    "adamw": "optim.directions.adamw",
    "assignment": "optim.rules",
    "build": "optim.recipe",
    "global_norm": "optim.recipe",
    "muon": "optim.directions.muon",
    "newton_schulz": "optim.directions.newton_schulz",
    "rates": "optim.recipe",
    "scale_by_muon": "optim.directions.muon",
}
_modules = ("options", "roles", "schedules")

__all__ = [*_homes, *_modules]


def __getattr__(name: str) -> Any:
    if name in _modules:
        return importlib.import_module(f"optim.{name}")
    if name in _homes:
        value = getattr(importlib.import_module(_homes[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
