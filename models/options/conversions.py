"""Conversions of one model's parameters into those of another. Imports no JAX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from strata import option, options, register

if TYPE_CHECKING:
    from models.options.model import Model


@register("model.conversion", "looped", implementation="models.looped:looped")
@options
class Looped:
    """A sequential model as a looped one with as many executed layers (Bae et al. 2024, arXiv:2410.20672)."""

    initial: str = option(
        "stepwise",
        "the donor's layers that a shared block starts from. stepwise: at equal steps, first and last included; average: the "
        "mean of those that it will stand for; lower, upper: the first, the last; random: a sorted draw",
        among=("stepwise", "average", "lower", "upper", "random"),
    )
    adapters: str = option(
        "svd",
        "low-rank matrices of executed layers. svd: the truncated SVD of what sharing lost; zero: as newly built",
        among=("svd", "zero"),
    )

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """The model that is made must loop."""
        if model.depth.loops == 1:
            yield "name", "makes a looped model, and model.depth runs every block once: give recursive with loops"
