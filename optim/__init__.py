"""Optimizers as recipes of optax transformations: direction x layerwise rate x sampling x schedule x decay, by parameter roles.

`import optim` and `import optim.options` load no JAX; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optim import roles as roles
    from optim import schedules as schedules
    from optim.averaging import average as average
    from optim.directions.adamw import adamw as adamw
    from optim.directions.lmo import dual_norm as dual_norm
    from optim.directions.lmo import lmo as lmo
    from optim.directions.muon import muon as muon
    from optim.directions.muon import scale_by_muon as scale_by_muon
    from optim.directions.newton_schulz import newton_schulz as newton_schulz
    from optim.directions.normuon import normuon as normuon
    from optim.directions.normuon import scale_by_normuon as scale_by_normuon
    from optim.directions.sgd import sgd as sgd
    from optim.layerwise.spectrum import hill_alpha as hill_alpha
    from optim.recipe import active_rows as active_rows
    from optim.recipe import build as build
    from optim.recipe import cuts as cuts
    from optim.recipe import global_norm as global_norm
    from optim.recipe import multipliers as multipliers
    from optim.recipe import rates as rates
    from optim.recipe import spectra as spectra
    from optim.rules import Assignment as Assignment
    from optim.rules import assignment as assignment
    from optim.schedules import RateTable as RateTable

# Functions live in modules of other names: importing a submodule sets an attribute of its own name on this package, and
# `optim.muon` must be the function whatever was imported before.
_homes = {
    "Assignment": "optim.rules",
    "RateTable": "optim.schedules",
    "active_rows": "optim.recipe",
    "adamw": "optim.directions.adamw",
    "assignment": "optim.rules",
    "average": "optim.averaging",
    "build": "optim.recipe",
    "cuts": "optim.recipe",
    "dual_norm": "optim.directions.lmo",
    "global_norm": "optim.recipe",
    "hill_alpha": "optim.layerwise.spectrum",
    "lmo": "optim.directions.lmo",
    "multipliers": "optim.recipe",
    "muon": "optim.directions.muon",
    "newton_schulz": "optim.directions.newton_schulz",
    "normuon": "optim.directions.normuon",
    "rates": "optim.recipe",
    "scale_by_muon": "optim.directions.muon",
    "scale_by_normuon": "optim.directions.normuon",
    "sgd": "optim.directions.sgd",
    "spectra": "optim.recipe",
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
