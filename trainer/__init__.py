"""Config in, run directory out.

trainer.train(config, workdir) -> Result      trains, or resumes what is in the directory
trainer.load(run_dir, step=None) -> Run       the model, config, tokenizer and parameters of a run
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.loop import Result, train
    from trainer.runs import Run, load

_homes = {"train": "trainer.loop", "Result": "trainer.loop", "load": "trainer.runs", "Run": "trainer.runs"}
__all__ = ["Result", "Run", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in _homes:
        from trainer.collision import check_packages

        check_packages()
        return getattr(importlib.import_module(_homes[name]), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
