"""The words that options use for parameters."""

from __future__ import annotations

from collections.abc import Iterator

Problems = Iterator[tuple[str, str]]

ROLES = ("embedding", "head", "matrix", "factor", "vector", "scalar", "table")
"""What a parameter can be (see `optim.roles`)."""

KINDS = ("query", "key", "value", "output", "output_gate", "gate", "up", "down")
"""Kinds of matrices that methods tell apart; `output_gate` is a mixer's, `gate` that of the feed-forward layer."""

# The first that fits counts, so a mixer's gate stands before every gate.
_SITES = {"out": "output", "mixer.gate": "output_gate"} | {kind: kind for kind in KINDS}

DEFAULT_KINDS = tuple(f"{match}={kind}" for site, kind in _SITES.items() for match in (f"*.{site}.*", f"*.{site}"))
"""Patterns over dotted paths, as of the models here; see `optim.kinds`."""


def kind_problems(field: str, patterns: tuple[str, ...]) -> Problems:
    """Patterns are written `pattern=kind`."""
    for pattern in patterns:
        path, equals, kind = pattern.rpartition("=")
        if not equals or not path or kind not in KINDS:
            yield field, f"{pattern!r} is not of the form path-pattern=kind, with one of {', '.join(KINDS)}"
