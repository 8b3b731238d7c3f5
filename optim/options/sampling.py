"""Options of layer sampling: which layers an update touches.

`optim.sampling.Cuts` asks the options for `buckets`, the number of first active layers that can be drawn, and for
`probabilities(progress)`, a float of each; what else they may define is in `Sampling`.
"""

from __future__ import annotations

import itertools
import math

from optim.options.roles import Problems
from strata import base, option, options, register


@base("optimizer.sampling")
class Sampling:
    """What is asked of every layer sampling, beside `buckets` and `probabilities`."""

    depends_on_steps = True
    """Whether the draw of an update depends on the length of the run; if not, a run may be extended."""

    @property
    def average(self) -> list[float]:
        """Probability of each cut over the whole run."""
        every = [self.probabilities((i + 0.5) / 100) for i in range(100)]
        return [sum(of_cut) / len(every) for of_cut in zip(*every, strict=True)]

    @property
    def least_activity(self) -> float:
        """Share of a run's updates in which the lowest layers, active at cut 0 alone, are expected to be."""
        return self.average[0]


@register("optimizer.sampling", "drop_muon", implementation="optim.sampling:drop_muon")
@options
class DropMuon(Sampling):
    """Update a random suffix of the layers; weights and optimizer state below it are frozen (arXiv:2510.02239)."""

    distribution: str = option(
        "uniform",
        "of the first active layer: uniform (the paper's main experiments); shifted from early cuts to late ones over the "
        "run (an "
        "unofficial implementation's, not confirmed); optimal for the layers' `smoothness`; full: every layer always",
        among=("uniform", "shifted", "optimal", "full"),
    )
    buckets: int = option(4, "first active layers that can be drawn, evenly spaced; a step is compiled for each", least=1)
    shift: float = option(0.5, "exponent of the shifted distribution", least=0)
    smoothness: tuple[float, ...] = option((), "smoothness constant of each bucket, for optimal", above=0)

    def problems(self) -> Problems:
        """Constants are of buckets, and of the distribution that reads them."""
        if self.distribution == "optimal" and len(self.smoothness) != self.buckets:
            yield "smoothness", f"optimal needs one constant for each of the {self.buckets} buckets"
        if self.distribution != "optimal" and self.smoothness:
            yield "smoothness", f"only distribution = 'optimal' reads it, not {self.distribution!r}; leave it out"
        if self.distribution != "shifted" and self.shift != type(self).shift:
            yield "shift", f"only distribution = 'shifted' reads it, not {self.distribution!r}; leave it out"

    def probabilities(self, progress: float) -> list[float]:
        """Probability of each cut, the lowest first, with `progress` from 0 at the first update to 1 at the last.

        uniform: equal. shifted: proportional to exp(shift ((1 - p)(b - 1 - i) + p i)) with the progress p. optimal: layer i is
        active with probability max_{j<=i} L_j / max L, which for a smoothness L that grows with depth minimises
        (max_i L_i / p_i) sum_i p_i c_i; derived, the paper's theorem was not read. full: always cut 0.
        """
        count = self.buckets
        if self.distribution == "uniform":
            return [1 / count] * count
        if self.distribution == "full":
            return [1.0] + [0.0] * (count - 1)
        if self.distribution == "optimal":
            active = [largest / max(self.smoothness) for largest in itertools.accumulate(self.smoothness, max)]
            return [one - before for before, one in itertools.pairwise([0.0, *active])]
        weights = [math.exp(self.shift * ((1 - progress) * (count - 1 - i) + progress * i)) for i in range(count)]
        return [weight / sum(weights) for weight in weights]

    @property
    def depends_on_steps(self) -> bool:
        """A shifted distribution moves over the run."""
        return self.distribution == "shifted"
