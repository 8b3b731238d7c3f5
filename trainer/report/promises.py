"""What stood in the ledger before the runs, against what a report goes by. Imports no JAX."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.sweep.changes import flat
from trainer.sweep.place import rules_of
from trainer.sweep.plan import Plan

_WORDS = ("statement", "metric", "rule", "paper_effect")
"""Of a claim's row: in words what other fields hold exactly."""


def changed_rules(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about claims, rules, metrics, seeds, tuning or the file, where they are not what the first start had.

    Args:
      plan: that the report goes by.
      rows: of the ledger. Rows of earlier versions lack fields, which are then not compared.
    """
    plans = [row for row in rows if row["event"] == "plan"]
    if not plans or not plan.claims or not any(row["event"] == "end" for row in rows):
        return []
    first, now = ({_name(rule): rule for rule in rules} for rules in (plans[0]["rules"], rules_of(plan)))
    pairs = [(first.pop(name), now.pop(name)) for name in list(now) if name in first]
    words = []
    for name, rule in list(now.items()):  # the same statement about other arms, or by another metric
        alike = [other for other in first if first[other]["statement"] == rule["statement"]]
        if len(alike) == 1 and first[alike[0]]["rule"] == rule["rule"]:
            then = first.pop(alike[0])
            words.append(f"{rule['statement']}: then {_compared(then)}, now {_compared(now.pop(name))}")
    words += [f"now: {name}: {rule['rule']}" for name, rule in now.items()]
    words += [f"then: {name}: {rule['rule']}" for name, rule in first.items()]
    changes: dict[str, list[str]] = {}  # of which claims: a grid of rates is that of many
    for then, rule in pairs:
        for change in _changes(then, rule):
            changes.setdefault(change, []).append(rule["statement"])
    words += [f"{of[0] if len(of) == 1 else f'{len(of)} claims'}: {change}" for change, of in changes.items()]
    found = []
    if words:
        found.append(f"the claims or rules were changed after the sweep was first started ({'; '.join(words)})")
    known = plans[0].get("file_sha256")
    if known and known != hashlib.sha256(plan.source.text.encode()).hexdigest():
        found.append(f"{plan.source.path} is not what it was when the sweep was first started")
    return found


def _name(rule: Mapping[str, Any]) -> str:
    return f"{rule['statement']} ({_compared(rule)})"


def _compared(rule: Mapping[str, Any]) -> str:
    return f"{rule['arm']} against {rule['against']}, {rule['metric']}"


def _changes(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What became of every field that both have; fields in words only where the exact ones are not there."""
    exact = "claim" in first and "claim" in now
    kept = [key for key in first if key in now and not (exact and key in _WORDS)]
    one, two = (flat({key: rule[key] for key in kept}) for rule in (first, now))
    fields = ("claim.", "metrics.")  # another version of the code may have more of them
    paths = [path for path in one.keys() | two.keys() if (path in one and path in two) or not path.startswith(fields)]
    return [
        f"{path.removeprefix('claim.')} {_difference(one.get(path), two.get(path))}"
        for path in sorted(paths)
        if one.get(path) != two.get(path)
    ]


def _difference(then: Any, now: Any) -> str:
    """Of lists, such as the points of a grid, only what one has and the other has not."""
    if isinstance(then, list) and isinstance(now, list):
        more, gone = ([x for x in found if x not in other] for found, other in ((now, then), (then, now)))
        told = [
            f"{word} {', '.join(map(_shown, points))}" for word, points in (("now with", more), ("now without", gone)) if points
        ]
        if told:
            return ", ".join(told)
    return f"then {_shown(then)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
