"""Our packages have plain names; make sure that they are the ones Python finds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("strata", "models", "optim", "kernels", "configs")


class ForeignPackage(ImportError):
    """Another package of one of our names comes first on the path. Exit code 2 on the command line."""


def check_packages() -> None:
    """Raise `ForeignPackage` unless every package of ours is found beside this one."""
    root = Path(__file__).resolve().parent.parent
    for name in filter(lambda name: (root / name).is_dir(), PACKAGES):
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or []) or [spec.origin] if spec else []
        found = Path(places[0]).resolve() if places else None
        if found != root / name:
            where = f"found {found}" if found else "found none"
            raise ForeignPackage(
                f"another package called {name!r} comes first on the Python path: expected {root / name}, {where}. "
                "Start from another directory, or take that one off the path (PYTHONPATH)."
            )
