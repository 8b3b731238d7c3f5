"""Fixed multipliers of the rate by type of parameter: a control for what adaptive ones do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optim import options
from optim.kinds import kinds_of
from optim.layerwise.multipliers import Layerwise, LayerwiseState, Seen, ones
from optim.roles import Parameter


def by_type(chosen: options.ByType, declared: Mapping[str, Parameter], groups: Any, steps: int | None) -> Layerwise:
    """norm 1, query and key 8, value and output 4, MLP 6, embedding and head 10: the ratios of arXiv:2502.19002.

    The output gate of a mixer, of which the ratios say nothing, counts with value and output (chosen here).
    """
    del groups, steps
    kinds = kinds_of(declared, chosen.kinds, "optimizer.layerwise.kinds")
    of_kind = dict.fromkeys(("query", "key"), chosen.query_key)
    of_kind |= dict.fromkeys(("value", "output", "output_gate"), chosen.value_output)
    fixed = {}
    for path, parameter in declared.items():
        if parameter.role == "matrix":
            fixed[path] = of_kind.get(kinds[path], chosen.mlp)
        else:
            fixed[path] = chosen.outer if parameter.role in ("embedding", "head", "table") else chosen.norm

    def init(weights: Mapping[str, Any]) -> LayerwiseState:
        del weights
        return LayerwiseState({path: fixed[path] * leaf for path, leaf in ones(declared, declared).items()}, {}, ())

    def update(seen: Seen, state: LayerwiseState) -> LayerwiseState:
        del seen
        return state

    return Layerwise(init, update, {path: f"by_type {kinds.get(path, declared[path].role)}" for path in declared}, fixed)
