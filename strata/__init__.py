"""The schema shared by every package: options, their registry, their errors. Imports no JAX.

`models`, `optim` and `trainer` describe each of their parts with a frozen dataclass of typed options; this package
turns a plain nested dict into those objects, reports every mistake it finds at once, and writes them back to JSON.
"""

from strata.errors import ConfigError, DataError, Diverged, Preempted, Problem, StrataError
from strata.options import option, options, part, parts, section
from strata.registry import base, implementation, lookup, names, register
from strata.resolve import components, resolve, to_tree
from strata.version import VERSION

__version__ = VERSION

__all__ = [
    "ConfigError",
    "DataError",
    "Diverged",
    "Preempted",
    "Problem",
    "StrataError",
    "base",
    "components",
    "implementation",
    "lookup",
    "names",
    "option",
    "options",
    "part",
    "parts",
    "register",
    "resolve",
    "section",
    "to_tree",
]
