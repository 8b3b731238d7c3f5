"""Mixers: what lets a position read earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from strata import base, option, options, parts, register

if TYPE_CHECKING:
    from models.options.model import Model


@base("model.mixer")
class Mixer:
    """What is asked of every mixer: by default that of one without linear layers, whose own work is not counted."""

    even_heads = False

    def projections(self, model: Model) -> dict[str, tuple[int, int]]:
        """Units in and out of each linear layer."""
        del model
        return {}

    def flops(self, model: Model, length: int) -> tuple[float, float]:
        """Training FLOPs a token and layer beside its matrices: of the full square of scores, and of the causal half."""
        del model, length
        return 0.0, 0.0


@register("model.mixer", "attention", implementation="models.mixers.attention:Attention")
@options
class Attention:
    """Causal softmax attention with rotary positions and grouped key-value heads."""

    even_heads = True  # rotary positions turn pairs of units

    qk_norm: bool = option(True, "normalise queries and keys over the head, before the rotation (arXiv:2302.05442)")
    qk_norm_epsilon: float = option(1e-6, "of that normalisation", above=0, added="0.2")
    rope_theta: float = option(10_000.0, "base of the rotary frequencies (Su et al. 2021, arXiv:2104.09864)", above=0)
    window: int | None = option(None, "attend to this many latest positions, own included; None: to all", least=1)
    implementation: str = option(
        "auto",
        "auto: cuDNN on a GPU that can, XLA elsewhere, printed at start; a name is refused where it cannot serve",
        among=("auto", "xla", "cudnn", "reference"),
        key="execution",
    )

    def projections(self, model: Model) -> dict[str, tuple[int, int]]:
        """Units in and out of each linear layer."""
        heads, keys = model.query_heads * model.head_units, model.key_heads * model.head_units
        return {
            "query": (model.width, heads),
            "key": (model.width, keys),
            "value": (model.width, keys),
            "out": (heads, model.width),
        }

    def flops(self, model: Model, length: int) -> tuple[float, float]:
        """Training FLOPs a token and layer for the scores and the sums: of the full square, and of the causal half."""
        window = min(self.window or length, length)
        seen = window - window * (window - 1) / (2 * length)  # positions an average query sees
        units = 12.0 * model.query_heads * model.head_units
        return units * length, units * seen


@register("model.mixer", "hybrid", implementation=None)
@options
class Hybrid:
    """Mixers that repeat over the layers: three linear ones and one softmax is a pattern of four.

    With shared depth (`recursive`) the pattern runs over the unique layers.
    """

    pattern: tuple = parts("model.mixer", "mixers of layers 0, 1, ...; starts again after the last")

    def at(self, layer: int, layers: int) -> object:
        """The mixer of one layer."""
        chosen = self.pattern[layer % len(self.pattern)]
        return chosen.at(layer, layers) if hasattr(chosen, "at") else chosen

    def problems(self) -> Iterator[tuple[str, str]]:
        """A pattern names at least one mixer, and no hybrid."""
        if not self.pattern:
            yield "pattern", "a hybrid lists at least one mixer, each a dict with a name"
        for i, mixer in enumerate(self.pattern):
            if isinstance(mixer, Hybrid):
                yield f"pattern.{i}.name", "a hybrid cannot hold a hybrid; write its mixers out"

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Every mixer of the pattern stands in some layer."""
        missing = self.pattern[model.unique_layers :]
        if missing:
            layers = f"{model.unique_layers} layer{'s' if model.unique_layers > 1 else ''}"
            layers += f" that {model.depth.loops} loops share" if model.depth.loops > 1 else ""
            names = ", ".join(mixer.name for mixer in missing)
            yield "pattern", f"{len(self.pattern)} mixers are more than the {layers}: the last would be in none ({names})"
