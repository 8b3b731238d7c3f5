"""Norms: what scales a vector of features."""

from __future__ import annotations

from strata import option, options, register


@register("model.norm", "rms_norm", implementation="models.layers.norm:RMSNorm")
@options
class RMSNorm:
    """Root-mean-square norm with a learned gain (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    epsilon: float = option(1e-6, "added to the mean square before the root", above=0)


@register("model.norm", "layer_norm", implementation="models.layers.norm:LayerNorm")
@options
class LayerNorm:
    """Layer normalisation with a learned gain (Ba, Kiros and Hinton 2016, arXiv:1607.06450)."""

    epsilon: float = option(1e-5, "added to the variance before the root", above=0)
    bias: bool = option(False, "learn an offset too")


@register("model.norm", "dyt", implementation="models.layers.norm:DyT")
@options
class DyT:
    """Dynamic tanh, `scale * tanh(alpha x) (+ bias)`: no statistics (Zhu et al. 2025, arXiv:2503.10622).

    The paper's language models start alpha higher before attention than elsewhere (0.8 and 0.2 at 7 B parameters, less
    in larger ones) and have no bias; 0.5 everywhere with a bias is its setting for vision. They are pre-norm; in post-norm
    placements the norm that feeds a mixer is that after the feed-forward layer before it.
    """

    alpha: float = option(0.8, "initial slope of norms that feed a mixer", above=0)
    alpha_other: float = option(0.2, "initial slope of every other norm", above=0)
    bias: bool = option(False, "learn an offset too")

    def for_site(self, site: str) -> DyT:
        """The options at one place: `alpha` is the slope there."""
        return self if site == "mixer" else DyT(alpha=self.alpha_other, alpha_other=self.alpha_other, bias=self.bias)
