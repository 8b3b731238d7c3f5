"""What makes two configs the same run: canonical JSON, key classes, hashes, differences."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from strata import components, to_tree
from strata.resolve import leaves
from trainer.options import Config


def canonical_json(config: Config) -> str:
    """The resolved config as sorted, indented JSON with a newline at the end; equal configs give equal bytes."""
    return json.dumps(to_tree(config), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def config_hash(config: Config) -> str:
    """Eight hex digits over the semantic leaves without the seed, and without later additions at their defaults.

    `train.steps` counts only where some part depends on it: without that it says how far a run goes, not which run it is.
    """
    semantic = {path: value for path, value, key in leaves(config, identity=True) if key == "semantic" and path != "seed"}
    if not depends_on_steps(config):
        del semantic["train.steps"]
    return hashlib.sha256(json.dumps(semantic, sort_keys=True).encode()).hexdigest()[:8]


_words = {
    "optimizer.schedule": "schedule",
    "optimizer.layerwise": "layerwise rate",
    "optimizer.sampling": "layer sampling",
    "model.depth": "depth strategy",
}


def depends_on_steps(config: Config) -> list[str]:
    """The parts, in words, that would have done otherwise up to here in a run of another length.

    A part of a kind that is told the length of the run counts unless its options say that it does not read it: the base of
    the kind (`strata.base`) says that it does. Other kinds cannot see the length.
    """
    parts = [part for _, part in (*config.optimizer.parts(), *components(config.model))]
    dependent = [part for part in parts if getattr(part, "depends_on_steps", False)]
    found = [f"{part.name} {_words.get(part.kind, part.kind.rpartition('.')[2])}" for part in dependent]
    return list(dict.fromkeys(found))


def run_id(config: Config) -> str:
    """`<hash>-s<seed>`."""
    return f"{config_hash(config)}-s{config.seed}"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One leaf that differs between two configs; a component that one of them lacks shows as `absent`."""

    path: str
    before: Any
    after: Any
    key: str

    def __str__(self) -> str:
        return f"{self.path}: {json.dumps(self.before)} -> {json.dumps(self.after)}"


def compare(before: Config, after: Config) -> list[Difference]:
    """The leaves in which two configs differ, in path order."""
    absent = "absent"
    old = {path: (value, key) for path, value, key in leaves(before)}
    new = {path: (value, key) for path, value, key in leaves(after)}
    found = []
    for path in sorted(old.keys() | new.keys()):
        one, two = old.get(path, (absent, None)), new.get(path, (absent, None))
        if one[0] != two[0]:
            found.append(Difference(path, one[0], two[0], one[1] or two[1]))
    return found
