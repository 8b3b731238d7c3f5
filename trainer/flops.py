"""Floating-point operations of training, by formula."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from flax import nnx

FORMULA = "6 x matrix parameters a use + mixers (attention: 12 x heads x head size x positions, halved: causal)"


class Layer(NamedTuple):
    """Operations a token of one executed layer, as of `Flops`."""

    products: float
    shared: float  # of `products`, those of weights that another executed layer uses too
    causal: float


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations a trained token costs, forward and backward (a multiply-add is two), recomputation not counted."""

    products: float  # 6 a matrix parameter: embedding rows are looked up, not multiplied, and do not count
    attention: float  # of the mixers, with the full square of scores
    causal: float  # with the half that a causal mask leaves
    head: float  # of `products`, those of the head, once for every trained exit
    layers: tuple[Layer, ...] = ()  # that are executed, in their order: what of `products` and `causal` is theirs
    unique: int = 0  # layers with parameters of their own; executed ones beyond these use them again
    together: int | None = None  # the first of the layers that are differentiated together; None: each by itself

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

    def at_cut(self, cut: int) -> float:
        """`per_token` of an update that freezes the layers below a cut (`optim.sampling`): of forward, gradients of weights
        and gradients of activations at a third each, a layer whose first use is below it needs the forward pass alone, and a
        frozen one that loops use again no gradients of weights.
        """
        stop = cut if self.together is None else min(cut, self.together)
        saved = 0.0
        for place, layer in enumerate(self.layers):
            if place < stop:
                saved += 2 / 3 * (layer.products + layer.causal)
            elif place >= self.unique and place % self.unique < cut:
                saved += 1 / 3 * layer.shared
        return self.per_token - saved

    def expected(self, cuts: Any) -> float:
        """`per_token` over the updates of a run with layer sampling, on average; of every update where `cuts` is None."""
        if cuts is None:
            return self.per_token
        return float(sum(p * self.at_cut(cut) for cut, p in zip(cuts.first, cuts.average, strict=True)))


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
    own_products, shared_products = [0.0] * option.layers, [0.0] * option.layers
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        role = variable.get_metadata()["role"]
        if role in ("matrix", "factor", "head") or (role == "embedding" and option.tie_embeddings):
            size = math.prod(variable.shape)
            if path[0] == "blocks":
                places = variable.get_metadata()["positions"]
                # What loops share is used in every loop; what belongs to one executed layer, there.
                own = variable.get_metadata().get("executed", False)
                for place in places:
                    for executed in (place,) if own else range(place, option.layers, unique):
                        (own_products if own else shared_products)[executed] += size / len(places) * uses[executed]
                size *= sum(uses[place] if own else sum(uses[place::unique]) for place in places) / len(places)
            elif role in ("head", "embedding"):
                size *= option.depth.read_outs
                head += size
            used += size
    work = [layer.mixer.flops(layer, sequence_length) for layer in option.plan() * option.depth.loops]
    square, causal = (
        float(sum(count * one for count, one in zip(uses, column, strict=True))) for column in zip(*work, strict=True)
    )
    layers = tuple(
        Layer(6.0 * (own + shared), 6.0 * shared, count * float(one[1]))
        for own, shared, count, one in zip(own_products, shared_products, uses, work, strict=True)
    )
    together = option.layers - option.depth.layers if getattr(option.depth, "forward", "") == "parallel" else None
    return Flops(6.0 * used, square, causal, 6.0 * head, layers, unique, together)
