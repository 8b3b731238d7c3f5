"""Position-wise feed-forward layers, plain and gated, with any activation; the common ones have names of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.options.activations import GELUActivation, SiLU, SquaredReLUActivation
from strata import base, option, options, part, register

if TYPE_CHECKING:
    from models.options.model import Model


@base("model.ffn")
class FFN:
    """What is asked of every feed-forward layer: by default that of one without linear layers."""

    def projections(self, model: Model) -> dict[str, tuple[int, int]]:
        """Units in and out of each linear layer."""
        del model
        return {}


@options
class _Gated:
    hidden: int | None = option(None, "hidden units; None: 8/3 of the width, rounded up to a multiple of 16", least=1)

    def units(self, model: Model) -> int:
        """Hidden units, derived when not given."""
        return self.hidden or -(-8 * model.width // (3 * 16)) * 16

    def projections(self, model: Model) -> dict[str, tuple[int, int]]:
        """Units in and out of each linear layer."""
        hidden = self.units(model)
        return {"gate": (model.width, hidden), "up": (model.width, hidden), "down": (hidden, model.width)}


@options
class _Plain:
    hidden: int | None = option(None, "hidden units; None: 4 times the width", least=1)

    def units(self, model: Model) -> int:
        """Hidden units, derived when not given."""
        return self.hidden or 4 * model.width

    def projections(self, model: Model) -> dict[str, tuple[int, int]]:
        """Units in and out of each linear layer."""
        hidden = self.units(model)
        return {"up": (model.width, hidden), "down": (hidden, model.width)}


@register("model.ffn", "glu", implementation="models.layers.ffn:GLU")
@options
class GLU(_Gated):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    activation: object = part("model.activation", "silu", "of the gate")


@register("model.ffn", "swiglu", implementation="models.layers.ffn:GLU")
@options
class SwiGLU(_Gated):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    activation = SiLU()


@register("model.ffn", "mlp", implementation="models.layers.ffn:MLP")
@options
class MLP(_Plain):
    """`down(act(up(x)))` (Vaswani et al. 2017, arXiv:1706.03762)."""

    activation: object = part("model.activation", "gelu", "of the hidden units")


@register("model.ffn", "relu2", implementation="models.layers.ffn:MLP")
@options
class SquaredReLU(_Plain):
    """`down(relu(up(x))**2)` (So et al. 2021, Primer, arXiv:2109.08668)."""

    activation = SquaredReLUActivation()


@register("model.ffn", "gelu", implementation="models.layers.ffn:MLP")
@options
class GELU(_Plain):
    """`down(gelu(up(x)))` with the tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    activation = GELUActivation()
