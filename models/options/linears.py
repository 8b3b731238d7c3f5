"""Linear layers: what stands for the matrix of a projection inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from strata import option, options, register

if TYPE_CHECKING:
    from models.options.model import Model


@register("model.linear", "dense", implementation="models.layers.linear:Dense")
@options
class Dense:
    """A plain matrix product, `x @ kernel`, without bias."""


@register("model.linear", "lora", implementation="models.layers.low_rank:LoRALinear")
@options
class LoRA:
    """`x @ kernel + alpha / rank * (x @ down) @ up`, `up` starting at zero (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = option(8, "columns of `down`; a smaller side of a matrix is its limit", least=1)
    alpha: float | None = option(None, "numerator of the scale; None: the rank, so that the scale is 1", above=0)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """A rank that no matrix has."""
        yield from rank_problems(self.rank, model)


@register("model.linear", "noble", implementation="models.layers.noble:NOBLE")
@options
class NOBLE:
    """A dense layer with a permanent nonlinear low-rank branch, `x W + act(x W_down) W_up` (arXiv:2603.06492).

    The defaults are the paper's, as two independent ports report them, but for the scale of W_down, which only the code
    states; `initial="repository"` and `rates="repository"` are the released code's, which differ (see docs/noble.md).
    """

    rank: int = option(64, "units r of the branch, below both sides of every matrix; 0: no branch, a control", least=0)
    activation: str = option(
        "cosine",
        "nonlinearity of the branch; swiglu gates one half of 2 r units with the other",
        among=("cosine", "identity", "tanh", "leaky_relu", "gelu", "silu", "swiglu"),
    )
    depth: int = option(2, "nonlinearities in the branch, an r x r matrix between two; CosNet has 2", least=1, most=3)
    affine: bool = option(True, "learn a scale and a shift, a number each per unit, before every nonlinearity")
    flipped: bool = option(False, "negate the input of every nonlinearity (an ablated variant)")
    main_scale: float = option(0.5, "multiplies the initial scale of the main kernel", above=0)
    up_scale: float = option(0.01, "alpha: W_up starts with standard deviation alpha / sqrt(r)", least=0)
    initial: str = option(
        "paper",
        "paper: Xavier-uniform mixing matrices, no biases; repository: normal of 0.5 / sqrt(r), and biases in the branch",
        among=("paper", "repository"),
    )
    rates: str = option(
        "paper",
        "learning-rate multipliers. paper: W_up (d/r)^0.6, mixing (d/r)^0.45, scales 3, shifts 5; repository: (d/r)^0.4, "
        "(d/r)^0.5, 2, 4; one: none. d is the smaller side of the matrix",
        among=("paper", "repository", "one"),
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Gating halves the units, which a further matrix could not take."""
        if self.activation == "swiglu" and self.depth > 1:
            yield "depth", "swiglu is one gated nonlinearity; give depth = 1"

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """The branch must be narrower than each matrix."""
        shapes = model.projections()
        if not shapes:
            return
        site, (rows, columns) = min(shapes.items(), key=lambda item: min(item[1]))
        if self.rank >= min(rows, columns):
            yield "rank", f"the branch must be narrower than every matrix, and {site} is {rows} x {columns}"


def rank_problems(rank: int, model: Model) -> Iterator[tuple[str, str]]:
    """A low-rank branch whose rank exceeds every matrix it could be added to; of smaller matrices their side is the limit."""
    shapes = model.projections()
    if not shapes:  # parts of one's own need not name their linear layers
        return
    site, (rows, columns) = max(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(rows, columns):
        yield "rank", f"no matrix of the blocks has rank {rank}; the largest, {site}, is {rows} x {columns}"
