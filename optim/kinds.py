"""Which kind of matrix a parameter is: query, key, value, output, output_gate (of a mixer), gate, up or down.

Kinds are matched by patterns over dotted paths, written `pattern=kind` (fnmatch), the user's before the built-in ones. The
first that fits counts; a pattern of the user's that fits nothing is refused, and so is a matrix that none fits.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from optim.options.roles import DEFAULT_KINDS
from optim.roles import Parameter
from strata import ConfigError, Problem


def kinds_of(declared: Mapping[str, Parameter], patterns: Sequence[str], field: str) -> dict[str, str]:
    """The kind of every matrix by path.

    Args:
      declared: the model's parameters; those of other roles are passed over.
      patterns: the user's.
      field: the config's field that holds them, for messages.

    Raises:
      ConfigError: a matrix that no pattern fits, and a pattern of the user's that fits no matrix.
    """
    found: dict[str, str] = {}
    used: set[str] = set()
    problems: list[Problem] = []
    for path, parameter in declared.items():
        if parameter.role != "matrix":
            continue
        for pattern in (*patterns, *DEFAULT_KINDS):
            match, _, kind = pattern.rpartition("=")
            if fnmatch.fnmatchcase(path, match):
                found[path] = kind
                used.add(pattern)
                break
        else:
            problems.append(Problem(path, f"no pattern says which kind of matrix it is; add one to {field}", has_value=False))
    for pattern in patterns:
        if pattern not in used:
            problems.append(Problem(field, f"{pattern!r} fits no matrix that an earlier pattern leaves", has_value=False))
    if problems:
        raise ConfigError(problems, source="the kinds of matrices")
    return found
