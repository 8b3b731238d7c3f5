"""Floating-point operations of training, by formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import nnx

FORMULA = "6 x matrix parameters used a token + 12 x layers x heads x head size x sequence length (halved: causal)"


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations a trained token costs, forward and backward (a multiply-add is two), recomputation not counted."""

    products: float  # 6 a matrix parameter: embedding rows are looked up, not multiplied, and do not count
    attention: float  # of the full square of scores
    causal: float  # of the half that a causal mask leaves

    @property
    def per_token(self) -> float:
        """With the causal half only: the work that the model needs, which MFU counts."""
        return self.products + self.causal

    @property
    def per_token_full(self) -> float:
        """With the full square, as in PaLM's definition (arXiv:2204.02311, appendix B)."""
        return self.products + self.attention


def training_flops(model: nnx.Module, sequence_length: int) -> Flops:
    """Count the work of one token in a sequence of `sequence_length`.

    Args:
      model: a `models.Transformer`, abstract or not.
      sequence_length: tokens in a row.
    """
    option: Any = model.options
    used = 0
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        role = variable.get_metadata()["role"]
        if role in ("matrix", "head") or (role == "embedding" and option.tie_embeddings):
            used += math.prod(variable.shape)
    square = 0.0
    causal = 0.0
    if option.mixer.name == "attention":
        window = min(option.mixer.window or sequence_length, sequence_length)
        seen = window - window * (window - 1) / (2 * sequence_length)  # positions an average query sees
        units = 12 * option.layers * option.query_heads * option.head_units
        square, causal = units * sequence_length, units * seen
    return Flops(6.0 * used, square, causal)
