"""Floating-point operations of training, by formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import nnx

FORMULA = "6 x matrix parameters a use + mixers (attention: 12 x heads x head size x positions, halved: causal)"


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations a trained token costs, forward and backward (a multiply-add is two), recomputation not counted."""

    products: float  # 6 a matrix parameter: embedding rows are looked up, not multiplied, and do not count
    attention: float  # of the mixers, with the full square of scores
    causal: float  # with the half that a causal mask leaves
    head: float  # of `products`, those of the head, once for every trained exit

    @property
    def per_token(self) -> float:
        """With the causal half only: the work that the model needs, which MFU counts."""
        return self.products + self.causal

    @property
    def per_token_full(self) -> float:
        """With the full square, as in PaLM's definition (arXiv:2204.02311, appendix B)."""
        return self.products + self.attention

    @property
    def head_share(self) -> float:
        """Part of `per_token` that is the head's."""
        return self.head / self.per_token


def training_flops(model: nnx.Module, sequence_length: int) -> Flops:
    """Count the work of one token in a sequence of `sequence_length`: each block as often as the depth strategy evaluates it,
    the head as often as it reads out.

    Args:
      model: a `models.Transformer`, abstract or not.
      sequence_length: tokens in a row.
    """
    option: Any = model.options
    uses, unique = option.depth.uses(option.layers), option.unique_layers
    used, head = 0.0, 0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        role = variable.get_metadata()["role"]
        if role in ("matrix", "factor", "head") or (role == "embedding" and option.tie_embeddings):
            size = math.prod(variable.shape)
            if path[0] == "blocks":
                places = variable.get_metadata()["positions"]
                # What loops share is used in every loop; what belongs to one executed layer, there.
                own = variable.get_metadata().get("executed", False)
                size *= sum(uses[place] if own else sum(uses[place::unique]) for place in places) / len(places)
            elif role in ("head", "embedding"):
                size *= option.depth.read_outs
                head += size
            used += size
    work = [layer.mixer.flops(layer, sequence_length) for layer in option.plan() * option.depth.loops]
    square, causal = (
        float(sum(count * one for count, one in zip(uses, column, strict=True))) for column in zip(*work, strict=True)
    )
    return Flops(6.0 * used, square, causal, 6.0 * head)
