"""Linear-attention mixers: a state of fixed size in the place of a cache that grows (see docs/linear_mixers.md).

All read and write through `kernels`; what differs between them is the recurrence, the gates and what stands around it.
Head sizes follow from the model: keys have `expand_k`, values `expand_v` times its head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kernels.registry import BACKENDS
from strata import option, options, register

if TYPE_CHECKING:
    from models.options.model import Model

CHUNK = 64
"""Tokens a chunk, where the config leaves it open; what `flops` counts."""
LARGEST_CHUNK = 256

TAPS = "taps of a causal depthwise convolution on queries, keys and values; 0: none"


class Sizes(NamedTuple):
    """Heads of one mixer: queries and keys [heads, key_size], values [value_heads, value_size]."""

    heads: int
    value_heads: int
    key_size: int
    value_size: int


@options
class LinearMixer:
    """Fields that every linear-attention mixer has."""

    heads: int | None = option(None, "query and key heads; None: as many as the model has", least=1)
    value_heads: int | None = option(
        None, "value heads, a multiple of `heads`, each with a state of its own; None: as many as `heads`", least=1
    )
    expand_k: float = option(1.0, "key size of a head over the model's head size", above=0)
    expand_v: float = option(1.0, "value size of a head over the model's head size", above=0)
    convolution: int = option(0, TAPS, least=0, most=16)
    gate: bool = option(True, "multiply the result with a gate of the input")
    norm_epsilon: float = option(1e-5, "of the norm of the result", above=0)
    chunk_size: int | None = option(
        None,
        "tokens computed at once, a power of two; None: the back-end's choice",
        least=1,
        most=LARGEST_CHUNK,
        key="execution",
    )
    backend: str = option(
        "auto",
        "kernels: auto takes the fastest that can serve; a name is refused where it cannot",
        among=("auto", *BACKENDS),
        key="execution",
    )

    default_heads = "as many as the model has"  # what None means, in words
    default_value_heads = "as many as heads"
    delta = False  # whether it writes by the delta rule
    low_rank_gate = False  # whether the output gate is a bottleneck instead of a projection

    def sizes(self, model: Model) -> Sizes:
        """Heads and their sizes."""
        heads = self.heads or model.query_heads
        units = model.head_units
        return Sizes(heads, self.value_heads or heads, round(self.expand_k * units), round(self.expand_v * units))

    def state(self, model: Model) -> tuple[int, int]:
        """Rows and columns of the state of a value head."""
        return self.sizes(model)[2:]

    def projections(self, model: Model) -> dict[str, tuple[int, int]]:
        """Units in and out of each linear layer."""
        sizes = self.sizes(model)
        keys, values = sizes.heads * sizes.key_size, sizes.value_heads * sizes.value_size
        inner = {"query": keys, "key": keys, "value": values}
        if self.gate and not self.low_rank_gate:
            inner["gate"] = values
        return {site: (model.width, units) for site, units in inner.items()} | {"out": (values, model.width)}

    def flops(self, model: Model, length: int) -> tuple[float, float]:
        """Training FLOPs a token and layer of the chunked form and the convolutions; all of it is causal, so the two agree.

        Forward, a token and value head, with chunks of C: 2 C (K + V) for scores and their sums and 4 K V for reading and
        writing the state; the delta rule adds as much for its triangular system, 2 K V and 4 C^2. Backward is twice that.
        """
        heads, value_heads, key_size, value_size = self.sizes(model)
        rows, columns = self.state(model)
        chunk = min(self.chunk_size or CHUNK, length)
        forward = 2 * chunk * (rows + columns) + 4 * rows * columns
        if self.delta:
            forward += 2 * chunk * (rows + columns) + 2 * rows * columns + 4 * chunk * chunk
        channels = 2 * heads * key_size + value_heads * value_size
        total = 3.0 * (value_heads * forward + 2 * self.convolution * channels)
        return total, total

    def problems(self) -> Iterator[Iterator[tuple[str, str]]]:
        """A convolution has at least two taps; chunks are halved until single rows are left."""
        yield self._convolution_problems()
        yield self._chunk_problems()

    def _convolution_problems(self) -> Iterator[tuple[str, str]]:
        if self.convolution == 1:
            yield "convolution", "one tap is a gain; give 0 for none, or at least 2"

    def _chunk_problems(self) -> Iterator[tuple[str, str]]:
        if self.chunk_size is not None and self.chunk_size & (self.chunk_size - 1):
            yield "chunk_size", f"a chunk holds a power of two of tokens, not {self.chunk_size}"

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Whole sizes, and value heads that share query heads evenly."""
        for field in ("expand_k", "expand_v"):
            size = getattr(self, field) * model.head_units
            if size < 1 or not math.isclose(size, round(size), rel_tol=1e-6):
                yield field, f"{getattr(self, field):g} times a head size of {model.head_units} is not a whole number of units"
        heads, value_heads = self.sizes(model)[:2]
        if value_heads % heads:
            field = "heads" if self.value_heads is None else "value_heads"
            said = f"{heads} query heads do not divide {value_heads} value heads"
            if self.heads is None:
                said += f"; heads is not set, which means {self.default_heads}: set it"
            elif self.value_heads is None:
                said += f"; value_heads is not set, which means {self.default_value_heads}: set it"
            yield field, said


@register("model.mixer", "linear_attention", implementation="models.mixers.constant_decay:LinearAttention")
@options
class LinearAttention(LinearMixer):
    """`phi(q) sum phi(k) v^T / (phi(q) sum phi(k))` (Katharopoulos et al. 2020, arXiv:2006.16236).

    With `feature_map="hedgehog"` the learned map of arXiv:2402.04347; with `normalizer=False, output_norm=True` the
    linear half of TransNormer (arXiv:2210.10340). It knows no positions, as published: give it a convolution, or
    softmax layers beside it.
    """

    gate: bool = option(False, "multiply the result with a gate of the input")
    feature_map: str = option(
        "elu1",
        "phi of queries and keys. elu1: elu(x) + 1; hedgehog: softmax of [2 y, -2 y], y = W x + b learned for each head",
        among=("identity", "elu1", "relu", "hedgehog"),
    )
    normalizer: bool = option(True, "divide by the sum of the weights, phi(q) sum phi(k)")
    output_norm: bool = option(False, "RMS norm of the result over each head")

    def state(self, model: Model) -> tuple[int, int]:
        """Hedgehog doubles the rows; the normaliser is one more column."""
        rows, columns = self.sizes(model)[2:]
        return rows * (2 if self.feature_map == "hedgehog" else 1), columns + self.normalizer

    def problems(self) -> Iterator[tuple[str, str]]:
        """Weights of both signs can sum to nothing."""
        yield from super().problems()
        if self.normalizer and self.feature_map == "identity":
            yield "normalizer", "identity features give weights of both signs, whose sum may be zero; give normalizer = False"


@register("model.mixer", "retention", implementation="models.mixers.constant_decay:Retention")
@options
class Retention(LinearMixer):
    """RetNet: rotary positions and a constant decay 1 - 2^(-5-h) for head h (Sun et al. 2023, arXiv:2307.08621)."""

    expand_v: float = option(2.0, "value size of a head over the model's head size", above=0)
    rope_theta: float = option(10_000.0, "base of the rotary frequencies", above=0)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Rotary positions turn pairs of units."""
        yield from super().problems_in(model)
        if self.sizes(model).key_size % 2:
            yield "expand_k", f"rotary positions need an even key size, not {self.sizes(model).key_size}"


@register("model.mixer", "lightning", implementation="models.mixers.constant_decay:Lightning")
@options
class Lightning(LinearMixer):
    """TransNormerLLM: SiLU on queries and keys, decay exp(-8 h / H (1 - l / L)), gate without activation (arXiv:2307.14995).

    Its decay depends on the layer, so layers are not stacked: a stack of N compiles N blocks. A number in
    `depth_fraction` gives all layers one decay and stacks them.
    """

    depth_fraction: float | None = option(
        None, "l / L in the decay; None: each layer's own, l counting from 0", least=0, below=1
    )

    def at(self, layer: int, layers: int) -> Lightning:
        """The options with the layer's decay written in."""
        return self if self.depth_fraction is not None else dataclasses.replace(self, depth_fraction=layer / layers)


@options
class StepDecayMixer(LinearMixer):
    """Fields of mixers that decay by Mamba's g = -A dt, where dt = softplus(x W + b).

    A token's lifetime, 1 / (A dt) tokens before training, is drawn once a head: with few heads, the seed decides how much they
    remember at first (docs/linear_mixers.md).
    """

    A_init_range: tuple[float, ...] = option(
        (1.0, 16.0), "A at the start is uniform within these two, and at least 1e-4", least=0, added="0.2"
    )
    dt_init_range: tuple[float, ...] = option(
        (1e-3, 0.1), "softplus(b) at the start is log-uniform within these two", least=1e-4, added="0.2"
    )

    def problems(self) -> Iterator[Iterator[tuple[str, str]]]:
        """A range has two ends, the smaller one first."""
        yield from super().problems()
        yield self._range_problems()

    def _range_problems(self) -> Iterator[tuple[str, str]]:
        for field in ("A_init_range", "dt_init_range"):
            given = getattr(self, field)
            if len(given) != 2 or given[0] > given[1]:
                yield field, f"is two numbers, the smaller one first, not {list(given)}"


@register("model.mixer", "simple_gla", implementation="models.mixers.learned_decay:SimpleGLA")
@options
class SimpleGLA(StepDecayMixer):
    """The mixer of Mamba-2: one learned decay a head and token, keys and queries shared by all heads (arXiv:2405.21060).

    As published: one group of queries and keys, a state of twice the head size, values twice as wide as the stream, a
    biased convolution, writes scaled by the step size, a skip from the values, and the norm after the gate over all heads.
    """

    heads: int | None = option(1, "query and key heads (groups); None: as many as the model has", least=1)
    value_heads: int | None = option(
        None, "value heads, a multiple of `heads`, each with a state of its own; None: twice the model's heads", least=1
    )
    expand_k: float = option(2.0, "key size of a head (the state size) over the model's head size", above=0)
    convolution: int = option(4, TAPS, least=0, most=16)
    skip: bool = option(True, "add D v to the result, D a number a head that starts at 1")

    default_value_heads = "twice the model's heads"

    def sizes(self, model: Model) -> Sizes:
        """Heads and their sizes."""
        return super().sizes(model)._replace(value_heads=self.value_heads or 2 * model.query_heads)


@register("model.mixer", "gla", implementation="models.mixers.learned_decay:GLA")
@options
class GLA(LinearMixer):
    """Gated linear attention: a learned decay for every key channel (Yang et al. 2023, arXiv:2312.06635)."""

    expand_k: float = option(0.5, "key size of a head over the model's head size", above=0)
    gate_rank: int = option(16, "rank of the decay's projection", least=1)
    gate_normalizer: float = option(16.0, "tau: the decay is sigmoid(...)^(1 / tau)", above=0)


@register("model.mixer", "delta_net", implementation="models.mixers.delta:DeltaNet")
@options
class DeltaNet(LinearMixer):
    """Writes what the state gets wrong about a value, beta k (v - k^T S) (Yang et al. 2024, arXiv:2406.06484)."""

    convolution: int = option(4, TAPS, least=0, most=16)
    gate: bool = option(False, "multiply the result with a gate of the input")
    negative_eigenvalues: bool = option(False, "beta within [0, 2] instead of [0, 1] (arXiv:2411.12537)")

    delta = True


@register("model.mixer", "gated_delta_net", implementation="models.mixers.delta:GatedDeltaNet")
@options
class GatedDeltaNet(StepDecayMixer):
    """The delta rule after one learned decay a head and token (Yang et al. 2024, arXiv:2412.06464)."""

    heads: int | None = option(
        None,
        "query and key heads; None: 3/4 of the model's, rounded up (keys take 3/4 of the width, as published, where 4 divides "
        "the model's heads)",
        least=1,
    )
    expand_v: float = option(2.0, "value size of a head over the model's head size", above=0)
    convolution: int = option(4, TAPS, least=0, most=16)
    negative_eigenvalues: bool = option(False, "beta within [0, 2] instead of [0, 1] (arXiv:2411.12537)")
    A_init_range: tuple[float, ...] = option(
        (0.0, 16.0), "A at the start is uniform within these two, and at least 1e-4", least=0, added="0.2"
    )

    default_heads = "3/4 of the model's, rounded up"
    delta = True

    def sizes(self, model: Model) -> Sizes:
        """Heads and their sizes."""
        heads = self.heads or math.ceil(0.75 * model.query_heads)
        return super().sizes(model)._replace(heads=heads, value_heads=self.value_heads or heads)


@register("model.mixer", "kda", implementation="models.mixers.delta:KDA")
@options
class KDA(StepDecayMixer):
    """Kimi Delta Attention: the delta rule after a learned decay for every key channel (2025, arXiv:2510.26692)."""

    convolution: int = option(4, TAPS, least=0, most=16)
    negative_eigenvalues: bool = option(False, "beta within [0, 2] instead of [0, 1] (arXiv:2411.12537)")
    gate_rank: int | None = option(None, "rank of the projections of decay and gate; None: the value size of a head", least=1)

    delta = True
    low_rank_gate = True


@register("model.mixer", "lightnet", implementation="models.mixers.learned_decay:LightNet")
@options
class LightNet(LinearMixer):
    """A running average of values with weights e^k, channel by channel (Qin et al. 2024, arXiv:2405.21022)."""

    gate_rank: int | None = option(None, "rank of the gate's projection; None: the value size of a head", least=1)

    low_rank_gate = True
