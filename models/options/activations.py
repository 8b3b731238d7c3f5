"""Activations: what a feed-forward layer applies to its hidden units, one by one. Imports no JAX."""

from __future__ import annotations

from strata import options, register


@register("model.activation", "silu", implementation="models.layers.activations:SiLU")
@options
class SiLU:
    """`x sigmoid(x)` (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""


@register("model.activation", "gelu", implementation="models.layers.activations:GELU")
@options
class GELUActivation:
    """`x Phi(x)` in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""


@register("model.activation", "relu2", implementation="models.layers.activations:SquaredReLU")
@options
class SquaredReLUActivation:
    """`max(x, 0)**2` (So et al. 2021, Primer, arXiv:2109.08668)."""
