"""Layer sampling: which layers an update touches, drawn on the host (Drop-Muon, Gruntkowska et al. 2025, arXiv:2510.02239).

An update draws its *cut*, the first active layer: weights and optimizer state of every layer below are left as they are, bit
for bit, and the backward pass stops there. A step is compiled for each cut that can be drawn, so they are few ("buckets").

What belongs to no layer goes with an end: embedding and tables are active only when layer 0 is, head and final norm always; a
parameter without a layer axis that declares a place, as the norm of the embedding does, goes with the layer there.
The learning rates are not rescaled by how often a layer is active. A block that a looped model uses several times stands where
it is used first: below the cut its weights are frozen, while gradients of active blocks still pass through it in later rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from optim.options import DropMuon, Optimizer
from optim.roles import Parameter, depth_of
from strata import ConfigError, Problem, implementation

STREAM = 0xD209
"""Sets the draws of cuts apart from every other use of the run's seed."""


@dataclasses.dataclass(frozen=True)
class Cuts:
    """The cuts that can be drawn and with what probability."""

    options: DropMuon
    depth: int  # layers of the model
    steps: int | None  # updates in the run; needed by the shifted distribution

    @property
    def first(self) -> tuple[int, ...]:
        """The first active layer of each bucket, ascending from 0."""
        return tuple(i * self.depth // self.options.buckets for i in range(self.options.buckets))

    def probabilities(self, step: int) -> np.ndarray:
        """Probability of each cut of `first` in update `step`, float64 [buckets]; see `options.DropMuon.probabilities`."""
        progress = 0.0 if self.steps is None or self.steps < 2 else min((step - 1) / (self.steps - 1), 1.0)
        return np.array(self.options.probabilities(progress))

    @property
    def average(self) -> np.ndarray:
        """Probability of each cut of `first` over the whole run, float64 [buckets]."""
        return np.array(self.options.average)

    def cut(self, step: int, seed: int) -> int:
        """The first active layer of update `step`, the first update being 1. Equal on every host and after every restart."""
        draw = np.random.default_rng((STREAM, seed, step)).random()
        bucket = int(np.searchsorted(np.cumsum(self.probabilities(step)), draw, side="right"))
        return self.first[min(bucket, self.options.buckets - 1)]

    def frozen(self, parameter: Parameter, cut: int) -> int:
        """As `frozen_rows`."""
        return frozen_rows(parameter, cut)

    def describe(self, parameter: Parameter) -> str:
        """In words, which draws update a parameter at the start of the run."""
        active = np.cumsum(self.probabilities(1))
        share = [active[i] for i in range(len(self.first)) for place in self._places(parameter) if self.bucket_of(place) == i]
        low, high = min(share), max(share)
        return f"{low:.0%} of updates" if low == high else f"{low:.0%} to {high:.0%} of updates"

    def bucket_of(self, place: int) -> int:
        """The bucket of a layer."""
        return int(np.searchsorted(self.first, place, side="right")) - 1

    def _places(self, parameter: Parameter) -> tuple[int, ...]:
        if parameter.positions:
            return parameter.positions
        return (0,) if parameter.role in ("embedding", "table") else (self.depth - 1,)

    def buckets_of(self, parameter: Parameter) -> list[tuple[int, int]]:
        """The half-open range of a parameter's layers that each bucket holds; of one without a layer axis, (0, 1) once."""
        buckets = [self.bucket_of(place) for place in self._places(parameter)]
        return [
            (buckets.index(b), buckets.index(b) + buckets.count(b)) if b in buckets else (0, 0) for b in range(len(self.first))
        ]

    @property
    def ceiling(self) -> float:
        """Largest possible ratio of step times, every layer active over drawn cuts, at the start of the run.

        Forward, gradients of weights and of activations cost 1 each, spread evenly over the layers; embedding, head and the
        optimizer are not counted. The lowest active layer needs the gradient of its input at cut 0, where the embedding below
        it is trained; at other cuts only for gains before its matrices, which this bound leaves out (counted, as the models
        here need it, the cost of a cut is 1 + 2 share).
        """
        cost = [1 + 2 * (1 - cut / self.depth) - (cut > 0) / self.depth for cut in self.first]
        return float(3 / np.dot(self.probabilities(1), cost))

    def ceiling_beside(self, fixed: float) -> float:
        """The ceiling where the share `fixed` of a full step, such as the head's, is done in every step."""
        return 1 / ((1 - fixed) / self.ceiling + fixed)


def frozen_rows(parameter: Parameter, cut: int) -> int:
    """How many of a parameter's layers a cut freezes, counted from the first; of one without a layer axis, 0 or 1."""
    if parameter.positions:
        return sum(place < cut for place in parameter.positions)
    return int(cut > 0 and parameter.role in ("embedding", "table"))


def drop_muon(options: DropMuon, declared: Mapping[str, Parameter], steps: int | None) -> Cuts:
    """The cuts of Drop-Muon over a model.

    Raises:
      ConfigError: a tied embedding, or more buckets than layers.
    """
    problems, depth = [], depth_of(declared)
    if not any(parameter.role == "head" for parameter in declared.values()):
        message = "the model has no head of its own: a tied embedding is needed by the last layer and frozen with the first"
        problems.append(Problem("optimizer.sampling.name", message, options.name))
    if options.buckets > depth:
        problems.append(Problem("optimizer.sampling.buckets", f"more than the {depth} layers of the model", options.buckets))
    if problems:
        raise ConfigError(problems, source="the optimizer's layer sampling")
    return Cuts(options, depth, steps)


def layer_cuts(optimizer: Optimizer, declared: Mapping[str, Parameter], steps: int | None) -> Any:
    """The cuts of a recipe; None without layer sampling.

    Raises:
      ConfigError: it needs the length of the run, or does not fit the model.
    """
    chosen = optimizer.sampling
    if chosen is None:
        return None
    if steps is None and chosen.depends_on_steps:
        message = "it depends on the length of the run, which was not given: pass steps="
        raise ConfigError([Problem("optimizer.sampling.name", message, chosen.name)], source="the optimizer's layer sampling")
    return implementation(chosen)(chosen, declared, steps)
