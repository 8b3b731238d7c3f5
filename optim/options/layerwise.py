"""Options of layerwise rates: a multiplier of the rate, or of the weight decay, for each layer's matrix.

What the options of a layerwise rate may define beside their fields is in `Layerwise`.
"""

from __future__ import annotations

from optim.options.roles import Problems, kind_problems
from strata import base, option, options, register

METHODS = ("released", "textbook")


@base("optimizer.layerwise")
class Layerwise:
    """What is asked of every layerwise rate."""

    depends_on_steps = True
    """Whether the multipliers of an update depend on the length of the run; if not, a run may be extended."""
    of_decay = False
    """Whether it multiplies the weight decay rather than the rate."""
    needs_second_gradient = False
    """Whether it reads the difference of two gradients at the same weights."""


@options
class HeavyTail:
    """Fields of methods that read the heavy tail of a weight's spectrum (see `optim.hill_alpha`)."""

    interval: int = option(100, "steps between measurements; the first is at step 1", least=1)
    method: str = option(
        "released", "Hill estimator: as released, the threshold counted in its own tail; or as in text books", among=METHODS
    )
    window: int | None = option(
        None,
        "pool the spectra of square windows of this size before the estimate, so that the aspect ratio does not matter "
        "(the idea of FARMS); None: the whole matrix",
        least=2,
    )
    smallest: int = option(50, "matrices with fewer singular values than this keep the multiplier of the rest", least=2)


@options
class Spread:
    """The range that multipliers are spread over."""

    least: float = option(1.0, "multiplier of the heaviest tail (smallest alpha)", above=0)
    most: float = option(5.0, "multiplier of the lightest tail (largest alpha)", above=0)

    def problems(self) -> Problems:
        """A range, of a map that fills one."""
        if self.ranged:
            if self.least > self.most:
                yield "least", f"above most = {self.most:g}"
            return
        for name in ("least", "most"):
            if getattr(self, name) != getattr(type(self), name):
                yield name, f"assign = {self.assign!r} does not use it, only {' and '.join(RANGED)} do; leave it out"

    @property
    def ranged(self) -> bool:
        """Whether multipliers fill the range; those of other maps lie around 1."""
        return self.assign in RANGED


RANGED = ("linear", "rank")
_assignments = ("linear", "sqrt", "log2", "sigmoid", "rank")


@register("optimizer.layerwise", "llr", implementation="optim.layerwise.heavy_tail:llr")
@options
class LLR(HeavyTail, Spread):
    """Larger rates for matrices with lighter tails (arXiv:2605.22297), as released; defaults of its 1 B runs."""

    assign: str = option(
        "linear",
        "from alpha to multiplier; linear and rank fill least to most; sqrt, log2 and sigmoid lie around 1, the rest at 1",
        among=_assignments,
    )
    within: str = option("model", "matrices that are compared: all, or those of one layer", among=("model", "layer"))
    reverse: bool = option(
        False, "larger rates for heavier tails (an ablation); `outer` stays as it is, so that embedding and head keep `most`"
    )
    adapt: float = option(0.2, "fraction of the run in which multipliers adapt; then they are frozen", above=0, most=1)
    ramp: int = option(
        50, "steps in which a multiplier moves to its new value, at most what `adapt` has after step 1; 0: none", least=0
    )
    outer: str = option(
        "most",
        "multiplier of embedding and head: most, as released, or that of every other parameter (least, or 1 without a range)",
        among=("most", "least"),
    )

    depends_on_steps = True


@register("optimizer.layerwise", "frozen", implementation="optim.layerwise.heavy_tail:frozen")
@options
class Frozen(HeavyTail, Spread):
    """LLR's multipliers as measured at step 1, kept for ever: what the shapes of matrices alone do. A control."""

    assign: str = option("linear", "as in llr", among=_assignments)
    outer: str = option("most", "multiplier of embedding and head: most or least", among=("most", "least"))
    depends_on_steps = False


@register("optimizer.layerwise", "temp_balance", implementation="optim.layerwise.heavy_tail:temp_balance")
@options
class TempBalance(HeavyTail, Spread):
    """The same statistic once an epoch, without ramp, around the base rate (arXiv:2312.00359)."""

    interval: int = option(1000, "steps between measurements; its paper: once an epoch", least=1)
    least: float = option(0.5, "multiplier of the heaviest tail", above=0)
    most: float = option(1.5, "multiplier of the lightest tail", above=0)
    assign: str = option("linear", "from alpha to multiplier: linear, or by rank", among=_assignments)
    ends: bool = option(False, "first and last layer too; as released they keep the base rate")
    depends_on_steps = False


@register("optimizer.layerwise", "alpha_decay", implementation="optim.layerwise.heavy_tail:alpha_decay")
@options
class AlphaDecay(HeavyTail, Spread):
    """The same statistic on the weight decay, not on the rate (arXiv:2506.14562), for the whole run."""

    interval: int = option(500, "steps between measurements", least=1)
    least: float = option(0.6666, "multiplier of the decay of the heaviest tail", above=0)
    most: float = option(5.0, "multiplier of the lightest tail (5 with AdamW, 3 with Adam)", above=0)
    assign: str = option("linear", "from alpha to multiplier", among=_assignments)
    ends: bool = option(
        True, "first and last layer too; as released only the first linear layer keeps the base decay, and the head"
    )
    depends_on_steps = False
    of_decay = True


@register("optimizer.layerwise", "by_type", implementation="optim.layerwise.by_type:by_type")
@options
class ByType:
    """Fixed multipliers by type of parameter (the ratios of arXiv:2502.19002): the baseline "Sharpness" of LLR, a control."""

    norm: float = option(1.0, "vectors, scalars, and factors", above=0)
    query_key: float = option(8.0, "query and key matrices", above=0)
    value_output: float = option(4.0, "value and output matrices, and output gates of mixers", above=0)
    mlp: float = option(6.0, "gate, up and down matrices of the MLP", above=0)
    outer: float = option(10.0, "embedding, head and tables", above=0)
    kinds: tuple[str, ...] = option((), "more patterns path=kind, before the built-in ones; fnmatch over dotted paths")
    depends_on_steps = False

    def problems(self) -> Problems:
        """Patterns are patterns."""
        yield from kind_problems("kinds", self.kinds)


@register("optimizer.layerwise", "lanton", implementation="optim.layerwise.noise:lanton")
@options
class LANTON:
    """Smaller rates for layers with noisier gradients than the calmest of their group (arXiv:2510.14009).

    Options whose help says so are recalled from the paper or chosen here, since no code is public.
    """

    estimator: str = option(
        "consecutive",
        "noise from the difference to the gradient before (the practical option), or to an independent one at the same weights "
        "(the theory's), which the training step must supply",
        among=("consecutive", "independent"),
    )
    b2: float = option(0.9, "decay of the running noise (recalled, low confidence)", least=0, below=1)
    floor: float = option(
        0.1,
        "A in a = A / sqrt(A^2 + H), in the units of `floor_of`: noise well below it changes nothing (value chosen here)",
        above=0,
    )
    floor_of: str = option(
        "group",
        "group: A is in units of the root of the group's mean H, so that the scale of the loss does not matter (chosen here); "
        "absolute: in units of the dual norm, as the paper",
        among=("group", "absolute"),
    )
    power: float = option(0.5, "exponent of a / a_max (the square root is recalled, high confidence)", above=0, most=1)
    nuclear: str = option(
        "newton_schulz",
        "nuclear norm of a difference by Newton-Schulz, about 15 % low on every matrix alike; exactly; or bounded by the "
        "root of "
        "the rank times the Frobenius norm (the authors' way is not known)",
        among=("newton_schulz", "exact", "bound"),
    )
    interval: int = option(10, "steps between measurements of the noise (chosen here for its cost; the paper: 1)", least=1)
    depends_on_steps = False

    @property
    def needs_second_gradient(self) -> bool:
        """The independent estimator reads the difference of two gradients at the same weights."""
        return self.estimator == "independent"
