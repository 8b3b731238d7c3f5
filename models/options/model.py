"""The model as a whole: sizes, and the parts that it is made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from strata import option, options, part

Problems = Iterator[tuple[str, str]]

PARTS = ("mixer", "norm", "placement", "linear", "ffn", "depth")
WRITERS = ("out", "down")
"""Projections whose result joins the residual stream."""


@options
class Model:
    """A decoder-only transformer: embedding, a stack of blocks, a head."""

    width: int = option(128, "size of the residual stream", least=1, most=1_000_000)
    layers: int = option(
        4, "layers that are executed; with loops, so many fewer have parameters of their own", least=1, most=100_000
    )
    heads: int | None = option(
        None, "query heads; None: width / head_size, or the most of at least 64 units that divide the width", least=1
    )
    kv_heads: int | None = option(None, "key and value heads; None: as many as query heads (arXiv:2305.13245)", least=1)
    head_size: int | None = option(None, "units of a head; None: width / heads", least=1)
    mixer: object = part("model.mixer", "attention", "what mixes positions")
    norm: object = part("model.norm", "rms_norm", "normalisation of sub-layer inputs and of the final hidden state")
    placement: object = part("model.placement", "pre", "where norms sit around a sub-layer")
    linear: object = part("model.linear", "dense", "every projection inside a block")
    ffn: object = part("model.ffn", "swiglu", "position-wise feed-forward layer")
    depth: object = part("model.depth", "sequential", "how the stack is executed")
    tie_embeddings: bool = option(False, "the head reuses the embedding table")
    logit_softcap: float | None = option(None, "cap: logits become cap * tanh(logits / cap) (arXiv:2408.00118)", above=0)
    init_scale: float = option(
        1.0,
        "multiplies the initial standard deviation width**-0.5 of matrices (those that write to the stream: see output_init)",
        above=0,
    )
    output_init: str | None = option(
        None,
        "matrices that write to the stream start at zero, normal (standard deviation in**-0.5), or scaled (normal over "
        "sqrt(2 layers)); None: zero, or normal where the placement normalises what they write",
        among=("zero", "normal", "scaled"),
        added="0.2",
    )
    embedding_std: float | None = option(
        None, "initial standard deviation of the embedding; None: 1, or width**-0.5 when tied", above=0, added="0.2"
    )
    head_std: float = option(0.0, "initial standard deviation of an untied head", least=0, added="0.2")

    @property
    def query_heads(self) -> int:
        """Number of query heads; when not given, the most heads of at least 64 units (or of `head_size`) that fit the width."""
        if self.heads is not None:
            return self.heads
        if self.head_size is not None:
            return max(1, self.width // self.head_size)
        # Whole heads of even size, so that changing the width alone keeps a config valid.
        return next((n for n in range(self.width // 64, 0, -1) if self.width % (2 * n) == 0), 1)

    @property
    def key_heads(self) -> int:
        """Number of key and value heads, derived when not given."""
        return self.kv_heads or self.query_heads

    @property
    def head_units(self) -> int:
        """Units of one head, derived when not given."""
        return self.head_size or self.width // self.query_heads

    @property
    def unique_layers(self) -> int:
        """Layers with parameters of their own."""
        return self.layers // self.depth.loops

    def at(self, layer: int) -> Model:
        """The options that one unique layer is built with: every part that varies over layers is the one it is there."""
        chosen = {name: value.at(layer, self.unique_layers) for name in PARTS if hasattr(value := getattr(self, name), "at")}
        return dataclasses.replace(self, **chosen) if chosen else self

    def plan(self) -> tuple[Model, ...]:
        """`at` for every unique layer."""
        return _plan(self)

    def projections(self) -> dict[str, tuple[int, int]]:
        """Units in and out of every kind of linear layer in the blocks, by a name that is theirs alone."""
        found: dict[str, tuple[int, int]] = {}
        for layer in dict.fromkeys(self.plan()):
            for name in ("mixer", "ffn"):
                chosen = getattr(layer, name)
                found |= {f"{chosen.name}.{site}": shape for site, shape in chosen.projections(layer).items()}
        return found

    def initial_std(self, site: str, units_in: int) -> float:
        """Initial standard deviation of a projection's kernel; call it on `at(layer)`.

        Args:
          site: `"out"` and `"down"` write to the stream; any other name is an inner projection. The gate of what a mixer
            reads out is `"output_gate"`.
          units_in: its rows.
        """
        gain = self.init_scale * self.placement.gain(site, self.layers)
        if site not in WRITERS:
            return gain * self.width**-0.5
        chosen = self.output_init or self.placement.output_init
        return {"zero": 0.0, "normal": 1.0, "scaled": (2 * self.layers) ** -0.5}[chosen] * gain * units_in**-0.5

    def problems(self) -> Iterator[tuple[str, str] | Problems]:
        """Combinations of sizes and parts that cannot work."""
        yield self._head_problems()
        yield self._key_head_problems()
        yield self._part_problems()

    def _part_problems(self) -> Iterator[tuple[str, str] | Problems]:
        if [*self._head_problems(), *self._key_head_problems()]:  # nothing below is defined then
            return
        loops = self.depth.loops
        if self.layers % loops:
            yield "depth.loops", f"{loops} loops do not divide {self.layers} layers"
            return
        seen: set[tuple[str, str]] = set()
        yield from (self._problems_of(name, self, seen) for name in PARTS)
        yield self._layer_problems(seen)

    def _layer_problems(self, seen: set[tuple[str, str]]) -> Problems:
        for layer in dict.fromkeys(self.plan()):
            for name in PARTS:
                if name != "depth":  # a strategy is of all layers
                    yield from self._problems_of(name, layer, seen)

    def _problems_of(self, name: str, layer: Model, seen: set[tuple[str, str]]) -> Problems:
        chosen = getattr(layer, name)
        for field, message in chosen.problems_in(layer) if hasattr(chosen, "problems_in") else ():
            # A part that stands for others in some layers has no such field: it is shown as a whole.
            where = f"{name}.{field}" if chosen is getattr(self, name) else name
            if (where, message) not in seen:
                seen.add((where, message))
                yield where, message

    def _head_problems(self) -> Problems:
        if self.head_size is None and self.width % self.query_heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0][:12]
            yield (
                "heads",
                f"{self.query_heads} heads do not divide width {self.width}; give model.head_size, or heads from {divisors}",
            )
        elif self.head_units % 2 and any(layer.mixer.even_heads for layer in self.plan()):
            yield "head_size", f"rotary positions need an even head size, not {self.head_units} (width / heads)"

    def _key_head_problems(self) -> Problems:
        if self.query_heads % self.key_heads:
            yield "kv_heads", f"{self.key_heads} key-value heads do not divide {self.query_heads} query heads"


@functools.lru_cache(maxsize=64)
def _plan(model: Model) -> tuple[Model, ...]:
    return tuple(model.at(layer) for layer in range(model.unique_layers))
