"""From an idea to runs: experiments and sweeps in Python, expanded, checked, launched and resumed. Imports no JAX.

python -m trainer.sweep FILE [--scale NAME] [--launcher local|slurm|submitit] [--slots N] [--dry_run] [--sweep.PATH=VALUES]
python -m trainer.sweep status FILE
python -m trainer.sweep search FILE [--trials N]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.sweep.experiment import Arm, Claim, Experiment, Metric, Rule, Scale, Tuning
    from trainer.sweep.needs import RunOf
    from trainer.sweep.search import Among, LogUniform, Search, Uniform, Whole
    from trainer.sweep.space import Space, axis, chain, product, seeds, subsample, zip

_homes = {
    **dict.fromkeys(("Arm", "Claim", "Experiment", "Metric", "Rule", "Scale", "Tuning"), "trainer.sweep.experiment"),
    "RunOf": "trainer.sweep.needs",
    **dict.fromkeys(("Among", "LogUniform", "Search", "Uniform", "Whole"), "trainer.sweep.search"),
    **dict.fromkeys(("Space", "axis", "chain", "product", "seeds", "subsample", "zip"), "trainer.sweep.space"),
}
__all__ = [
    "Among",
    "Arm",
    "Claim",
    "Experiment",
    "LogUniform",
    "Metric",
    "Rule",
    "RunOf",
    "Scale",
    "Search",
    "Space",
    "Tuning",
    "Uniform",
    "Whole",
    "axis",
    "chain",
    "product",
    "seeds",
    "subsample",
    "zip",
]


def __getattr__(name: str) -> Any:
    if name in _homes:
        return getattr(importlib.import_module(_homes[name]), name)
    raise AttributeError(f"module 'trainer.sweep' has no attribute {name!r}")
