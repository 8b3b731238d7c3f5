"""Placements: where norms sit around a sub-layer, and how its result joins the residual stream.

Attributes of the options say what other parts need to know. They have defaults, in `Placement`, that claim nothing which
another part would build on:

| attribute or method | default | meaning |
|---|---|---|
| `final_norm` | True | whether the stack's result is normalised before the head |
| `embedding_norm` | False | whether the embedding is normalised before the first block |
| `additive` | False | each sub-layer adds to the stream, so that several may read one input and be summed |
| `transport` | None | what carries the state past a block, branches held: `identity`, `scale`, `matrix`; None: nothing exact |
| `output_init` | `zero` | how projections that write to the stream start: `zero`, or `normal` where a norm follows them |
| `streams` | None | how many copies of the residual stream there are; None: one, without a stream axis |
| `gain(site, layers)` | 1 | factor of the initial scale of a projection |

`scale` and `matrix` promise that the implementation's `transports` gives that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from strata import base, option, options, register, registry

if TYPE_CHECKING:
    from models.options.model import Model


@base("model.placement")
class Placement:
    """What is asked of every placement; see above."""

    final_norm = True
    embedding_norm = False
    additive = False
    transport: str | None = None
    output_init = "zero"
    streams: int | None = None

    def gain(self, site: str, layers: int) -> float:
        """Factor of the initial scale of the projection `site`."""
        del site, layers
        return 1.0


class Additive(Placement):
    """Placements whose sub-layers add to the stream and leave the rest of it as it is."""

    additive = True
    transport: str | None = "identity"


@register("model.placement", "pre", implementation="models.placements.norms:PreNorm")
@options
class PreNorm(Additive):
    """`h + f(norm(h))` around every sub-layer, with a final norm (Xiong et al. 2020, arXiv:2002.04745)."""


@register("model.placement", "post", implementation="models.placements.norms:PostNorm")
@options
class PostNorm(Placement):
    """`norm(h + f(h))` (Vaswani et al. 2017, arXiv:1706.03762), with a final norm as the code of Mix-LN keeps one.

    A gain of 1 everywhere makes the final norm change nothing; it is there so that all placements have equal parameters.
    """


@register("model.placement", "mix", implementation=None)
@options
class MixLN(Placement):
    """Post-LN in the first layers and pre-LN after them (Li et al. 2024, Mix-LN, arXiv:2412.13795).

    With shared depth (`recursive`) the fraction is of the unique layers: a block keeps its placement in every loop.
    """

    alpha: float = option(0.25, "fraction of layers with the first placement, rounded to whole layers", least=0, most=1)
    first: str = option("post", "placement of the first layers")
    rest: str = option("pre", "placement of all layers after them; the released code also has sandwich")

    def at(self, layer: int, layers: int) -> object:
        """The placement of one layer."""
        return _placement(self.first if layer < self._count(layers) else self.rest)

    def _count(self, layers: int) -> int:
        """How many of `layers` have the first placement."""
        return int(self.alpha * layers + 0.5)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """A mixture has layers of both placements; a fraction of exactly 0 or 1 asks for one."""
        layers = model.unique_layers
        if 0 < self.alpha < 1 and self._count(layers) in (0, layers):
            some = "none" if self._count(layers) == 0 else "all"
            yield "alpha", f"of {layers} unique layers it rounds to {some}; give a fraction that leaves both, or exactly 0 or 1"

    def problems(self) -> Iterator[Iterator[tuple[str, str]]]:
        """Only placements of one stream around each of two sub-layers can be mixed."""
        yield from (self._problems_of(field) for field in ("first", "rest"))

    def _problems_of(self, field: str) -> Iterator[tuple[str, str]]:
        name, known = getattr(self, field), registry.names("model.placement")
        if name == "parallel":
            yield field, "Mix-LN moves the norms of two sub-layers, and a parallel block has one norm for both"
        elif name == "peri":
            yield field, "peri also normalises the embedding, which is no layer's; take sandwich, which has its sub-layers"
        elif name not in known or name == "mix":
            fitting = [n for n in known if n not in ("mix", "parallel", "peri")]
            yield field, f"expected a placement, one of {', '.join(fitting)}"
        elif getattr(registry.lookup("model.placement", name), "streams", None) is not None:
            yield field, f"{name} has several residual streams and cannot be mixed with a placement of one"


def _placement(name: str) -> object:
    """The placement of this name; `MixLN.problems` reports one that does not exist, and pre-norm stands for it meanwhile."""
    return registry.lookup("model.placement", name if name in registry.names("model.placement") else "pre")()


@register("model.placement", "sandwich", implementation="models.placements.norms:Sandwich")
@options
class Sandwich(Additive):
    """`h + norm(f(norm(h)))` (Ding et al. 2021, CogView, arXiv:2105.13290)."""

    output_init = "normal"


@register("model.placement", "peri", implementation="models.placements.norms:Sandwich")
@options
class PeriLN(Additive):
    """`h + norm(f(norm(h)))` with an optional norm of the embedding (Kim et al. 2025, Peri-LN, arXiv:2502.02732)."""

    embedding_norm: bool = option(True, "normalise the embedding too, as the paper's models may")
    output_init = "normal"


@register("model.placement", "deepnorm", implementation="models.placements.norms:DeepNorm")
@options
class DeepNorm(Placement):
    """`norm(a h + f(h))` with a = (2 L)^(1/4), no final norm (Wang et al. 2022, arXiv:2203.00555).

    Values, outputs and feed-forward matrices start smaller by (8 L)^(-1/4); the output gate of a linear mixer, which the paper
    does not have, like queries and keys does not. (The baseline in Mix-LN's released code has
    a = 2.828 at every depth and multiplies by (8 L)^(+1/4): not this.)
    """

    final_norm = False
    output_init = "normal"

    def gain(self, site: str, layers: int) -> float:
        """(8 L)^(-1/4) for values, outputs and the feed-forward layer."""
        return 1.0 if site in ("query", "key", "output_gate") else (8 * layers) ** -0.25


@register("model.placement", "lns", implementation="models.placements.norms:LayerNormScaling")
@options
class LayerNormScaling(Additive):
    """`h + f(norm(h) / sqrt(l))` for layer l = 1, 2, ... (Sun et al. 2025, arXiv:2502.05795); the final norm is not scaled.

    Its authors advise against scaled initial outputs (`model.output_init = "scaled"`), which cancel the benefit. With
    shared depth, l counts executed layers: the factor follows the growth of the stream.
    """

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """The one combination that the authors rule out."""
        if model.output_init == "scaled":
            yield "name", "LayerNorm Scaling and model.output_init = 'scaled' cancel each other (the paper's authors); drop one"


@register("model.placement", "parallel", implementation="models.placements.norms:Parallel")
@options
class Parallel(Additive):
    """`h + mix(x) + ffn(x)` with x = norm(h): one norm a block (Wang and Komatsuzaki 2021, GPT-J; arXiv:2204.02311)."""

    additive = False  # its feed-forward layer reads the norm of the incoming state, not the state that the mixer left


@register("model.placement", "none", implementation="models.placements.norms:NoNorm")
@options
class NoNorm(Additive):
    """`h + f(h)`: no norms at all, the final one included. A control; it needs small rates."""

    final_norm = False


@register("model.placement", "blend", implementation="models.placements.blend:Blend")
@options
class Blend(Additive):
    """Pre-norm over `a_l h + b_l e`, learned scalars and the embedding e: the residual scales of nanochat.

    Both scalars start on a line from the first layer to the last. The SNLP paper (arXiv:2605.17842) trains models with such
    scales; the rest of them (embeddings normalised and smeared, value embeddings, a back-out of the middle state, norms without
    gains) is not here: e is the embedding as it is.
    """

    stream_first: float = option(1.15, "initial a of the first layer")
    stream_last: float = option(1.05, "initial a of the last layer")
    embedding_first: float = option(0.20, "initial b of the first layer")
    embedding_last: float = option(0.05, "initial b of the last layer")
    transport = "scale"


@register("model.placement", "mhc", implementation="models.placements.hyper_connections:HyperConnections")
@options
class HyperConnections(Additive):
    """Manifold-constrained hyper-connections: several residual streams with doubly stochastic mixing (arXiv:2512.24880).

    Every sub-layer reads a weighted sum of the streams and writes to all of them, `X <- H_res X + H_post F(norm(H_pre X))`,
    with H_res from Sinkhorn's iteration. `static` is the input-independent form of SNLP's released code, the default;
    `dynamic` is DeepSeek's, whose weights depend on the token.
    """

    streams: int = option(4, "copies of the residual stream", least=1)
    form: str = option("static", "static: as in SNLP's code; dynamic: as in the mHC paper", among=("static", "dynamic"))
    temperature: float = option(0.05, "static: divides the logits of the mixing matrix", above=0)
    iterations: int | None = option(None, "of Sinkhorn; None: 10 for static, 20 for dynamic", least=1)
    transport = "matrix"

    @property
    def sinkhorn_iterations(self) -> int:
        """Iterations of Sinkhorn, by form when not given."""
        return self.iterations or {"static": 10, "dynamic": 20}[self.form]
