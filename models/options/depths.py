"""Depth strategies: how a stack of blocks is executed, and for `recursive` also how many blocks there are.

`config.model.depth` is how a run trains. Another strategy can be asked for on the same weights when evaluating,
generating or calling the model; what it then needs of the model is checked by `problems_as_request`.

What a strategy of one's own does not say is what `Depth` says.

| attribute or method | says |
|---|---|
| `loops` | how often the blocks are run through; the model has `layers / loops` of them |
| `adapter_rank`, `adapter_scale` | of the low-rank matrices that every executed layer adds to each projection; rank 0: none |
| `share_norms` | whether loops share what is no projection |
| `depends_on_steps` | whether it reads `progress`, so that extending a run would change its loss; True where it is not said |
| `uses(layers)` | how often a training step evaluates each executed layer, to count its work |
| `read_outs` | how often a training step applies the head to a token, to count its work |
| `one_by_one` | whether decoding n tokens in one step gives what n steps of one token do, as checking drafts needs |
| `views()` | other strategies that an evaluation also reports, by name |
| `problems_as_request(model)` | what forbids this strategy on the weights of `model` |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from models.options.linears import rank_problems
from strata import base, option, options, register

if TYPE_CHECKING:
    from models.options.model import Model

UNROLL_HELP = "True writes every layer out, False scans over them; None: written out on CPU up to 16 layers, scanned otherwise"


@base("model.depth")
class Depth:
    """What is asked of every depth strategy: by default that of one which runs each block once, in order."""

    loops = 1
    adapter_rank = 0
    adapter_scale = 1.0
    share_norms = True
    depends_on_steps = True
    read_outs = 1
    one_by_one = True

    def uses(self, layers: int) -> tuple[int, ...]:
        """Once each."""
        return (1,) * layers

    def views(self) -> dict[str, Any]:
        """None but itself."""
        return {}

    @classmethod
    def request_defaults(cls, model: Model) -> dict[str, Any]:
        """Fields that a request takes from the model when it does not give them."""
        del model
        return {}

    def problems_as_request(self, model: Model) -> Iterator[tuple[str, str]]:
        """As `problems_in`."""
        yield from self.problems_in(model)

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """None."""
        del model
        yield from ()


@register("model.depth", "sequential", implementation="models.depth.sequential:Sequential")
@options
class SequentialDepth(Depth):
    """Blocks one after another, each once; on a looped model, loop after loop."""

    depends_on_steps = False

    unroll: bool | None = option(None, UNROLL_HELP, key="execution")


@register("model.depth", "recursive", implementation="models.depth.recursive:Recursive")
@options
class RecursiveDepth(Depth):
    """`layers / loops` blocks, run through `loops` times (CYCLE sharing; Bae et al. 2024, arXiv:2410.20672).

    Executed layer l uses block l mod (layers / loops). With `rank` the model is *relaxed*: every executed layer has a
    low-rank matrix of its own beside each projection, the first loop included. Exits train the result of every loop to
    predict; the forms of their losses are inferred from the names in the paper's table.
    """

    depends_on_steps = False

    loops: int = option(2, "times that the blocks are run through; divides the layers", least=1)
    rank: int = option(0, "of the low-rank matrix of each executed layer; a smaller side of a matrix is its limit", least=0)
    alpha: float | None = option(None, "scale of it is alpha / rank; None: 1, which a conversion by SVD needs", above=0)
    share_norms: bool = option(
        True, "loops share norm gains, gates and whatever else is no projection; False: each executed layer has its own"
    )
    exits: str = option(
        "none",
        "losses of the loops before the last. weighted: loop j of B counts j / (1 + ... + B); aggressive: `exit_weight` each, "
        "beside the whole loss of the last",
        among=("none", "weighted", "aggressive"),
    )
    exit_weight: float = option(0.1, "with exits=aggressive: weight of each earlier loop", above=0)
    exit_distillation: float = option(0.0, "weight of KL(last loop || earlier loop), the last one held, for each exit", least=0)
    exit: int | None = option(None, "for evaluation and generation: leave after this many loops", least=1)
    confidence: float | None = option(
        None, "for evaluation and generation: leave at the first loop that gives a token this probability", above=0, most=1
    )
    unroll: bool | None = option(None, UNROLL_HELP, key="execution")

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapters."""
        return self.rank

    @property
    def adapter_scale(self) -> float:
        """Factor of the adapters' product."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def read_outs(self) -> int:
        """After every loop where exits are trained; a divergence between two of them needs no further logits."""
        return 1 if self.exits == "none" else self.loops

    def exit_weights(self) -> tuple[float, ...]:
        """Weight of the loss after each loop, the last included."""
        loops = self.loops
        if self.exits == "weighted":
            return tuple(j / (loops * (loops + 1) / 2) for j in range(1, loops + 1))
        early = self.exit_weight if self.exits == "aggressive" else 0.0
        return (*(early,) * (loops - 1), 1.0)

    def views(self) -> dict[str, Any]:
        """Every earlier loop's result, where exits are trained."""
        if self.exits == "none":
            return {}
        return {f"loop{j}": dataclasses.replace(self, exit=j) for j in range(1, self.loops)}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Exits exist before the last loop only."""
        if self.exit is not None and self.exit > self.loops:
            yield "exit", f"there are {self.loops} loops to leave"
        if self.exit is not None and self.confidence is not None:
            yield "confidence", "leave at a chosen loop (exit) or at a confident one, not both"
        if self.exit_distillation and self.exits == "none":
            yield "exit_distillation", "distils into exits, and exits = 'none'"
        if self.alpha is not None and not self.rank:
            yield "alpha", "scales low-rank matrices, and rank = 0"

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """Loops of equal length, adapters that fit, and no exit while training."""
        if model.layers % self.loops:
            yield "loops", f"{self.loops} loops do not divide {model.layers} layers"
        yield from rank_problems(self.rank, model)
        for field in ("exit", "confidence"):
            if getattr(self, field) is not None:
                yield field, "belongs to evaluation and generation (depth=..., --depth); a run trains all of its loops"

    @classmethod
    def request_defaults(cls, model: Model) -> dict[str, Any]:
        """The loops that the model was built with."""
        return {"loops": model.depth.loops}

    def problems_as_request(self, model: Model) -> Iterator[tuple[str, str]]:
        """The model must have been built with these loops."""
        if model.depth.loops != self.loops:
            yield (
                "loops",
                f"the model runs its blocks in {model.depth.loops} loops; `python -m trainer.convert` makes another",
            )
        elif self.rank not in (0, model.depth.adapter_rank):
            yield "rank", f"the model's low-rank matrices have rank {model.depth.adapter_rank}"
        elif self.rank and self.adapter_scale != model.depth.adapter_scale:
            yield "alpha", f"the model's low-rank matrices are scaled by {model.depth.adapter_scale:g} = alpha / rank"


@register("model.depth", "layer_parallel", implementation="models.depth.layer_parallel:LayerParallel")
@options
class LayerParallelDepth(Depth):
    """Structured Newton layer parallelism: the last `layers` blocks all at once, `sweeps` times (arXiv:2605.17842).

    A sweep evaluates every block of the suffix at its current input and corrects the results along depth,
    c_j = f_j(h_{j-1}) + A_j (c_{j-1} - h_{j-1}). After k sweeps the first k layers are exact, after `layers` sweeps all are.
    """

    layers: int = option(8, "blocks of the suffix that run in parallel", least=1)
    sweeps: int = option(1, "K, evaluations of the whole suffix", least=1)
    correction: str = option(
        "identity",
        "A_j. identity: IDN; scaled: the residual scale a_l; hcn: the product of the stream-mixing matrices; damped: "
        "(1 - damping) I; diagonal: a probe of the Jacobian's diagonal; none: Jacobi; exact: the Jacobian itself",
        among=("identity", "scaled", "hcn", "damped", "diagonal", "none", "exact"),
    )
    start: str = option(
        "prefix",
        "first estimate of every layer. prefix: the state before the suffix; batched: each block's value there, one more "
        "evaluation",
        among=("prefix", "batched"),
    )
    damping: float = option(0.1, "kappa of correction=damped", least=0, most=1)
    probe: float | None = option(
        None,
        "correction=diagonal: length of the finite difference along a random sign vector, in units of a token's root mean "
        "square (ours: the released 0.01 is absolute); None: 0.01 in float32, 0.1 in narrower types, whose rounding hides less",
        above=0,
    )
    probe_limit: float = option(2.0, "correction=diagonal: the estimate is clipped to this size", above=0)
    fused: int = option(1, "layers merged into one wide block that reads one input; sweeps run over such chunks", least=1)
    forward: str = option(
        "parallel",
        "parallel: sweeps always, training included (SNLP-forward fine-tuning); sequential: train and run in order, with the "
        "regulariser, and report the sweeps beside it",
        among=("parallel", "sequential"),
    )
    regularizer: float = option(0.0, "lambda: weight of the summed errors of one sweep; needs forward=sequential", least=0)
    suffixes: tuple[int, ...] = option((), "lengths of the suffixes that are regularised; empty: `layers`", least=1)
    stride: int = option(0, "error at every stride-th layer of a suffix and its last; 0: at the last only", least=0)
    ramp: float = option(0.2, "fraction of the run in which the weight grows from 0 to lambda", least=0, most=1)
    detach: bool = option(False, "hold the sequential states that the sweep is compared with")
    form: str = option(
        "code",
        "stride=0 with identity: what is compared with the last state. code: the last block alone at the state before the "
        "suffix; paper: the corrected result of the sweep",
        among=("code", "paper"),
    )
    unroll: bool | None = option(None, UNROLL_HELP, key="execution")

    @classmethod
    def request_defaults(cls, model: Model) -> dict[str, Any]:
        """The sweeps that the model was trained for; of others as many layers as it has, corrected along its streams."""
        if isinstance(model.depth, cls):
            names = ("layers", "sweeps", "correction", "start", "damping", "probe", "probe_limit", "fused")
            return {name: getattr(model.depth, name) for name in names}
        streams = all(layer.placement.transport == "matrix" for layer in model.plan())
        return {"layers": min(8, model.layers), "correction": "hcn" if streams else "identity"}

    @property
    def depends_on_steps(self) -> bool:
        """The ramp is a fraction of the run."""
        return self.forward == "sequential" and self.regularizer > 0 and self.ramp > 0

    @property
    def one_by_one(self) -> bool:
        """Only if the sweeps are enough to be exact: before that a later token of a step reads estimates of earlier ones."""
        return self.forward == "sequential" or self.sweeps + (self.start == "batched") >= self.layers // self.fused

    def uses(self, layers: int) -> tuple[int, ...]:
        """Every sweep evaluates its suffix: `diagonal` twice, `exact` three times (a value, a product with the Jacobian)."""
        sweep = {"diagonal": 2, "exact": 3}.get(self.correction, 1)
        if self.forward == "parallel":
            taken = {self.layers: self.sweeps * sweep + (self.start == "batched") - 1}  # beside the one that every layer has
        elif not self.regularizer:
            taken = {}
        elif self.compares_last_block:
            taken = {1: len(self._regularized)}
        else:
            taken = dict.fromkeys(self._regularized, sweep)
        return tuple(1 + sum(times for count, times in taken.items() if layer >= layers - count) for layer in range(layers))

    @property
    def _regularized(self) -> set[int]:
        """Lengths of the suffixes that have an error: that of one layer is exact."""
        return {count for count in self.suffixes or (self.layers,) if count > 1}

    def probe_length(self, dtype: Any) -> float:
        """`probe`, derived from the compute type when not given."""
        return self.probe or (0.01 if dtype == "float32" else 0.1)

    @property
    def compares_last_block(self) -> bool:
        """Whether the regulariser evaluates the last block alone, and no sweep."""
        return self.stride == 0 and self.correction == "identity" and self.form == "code"

    def views(self) -> dict[str, Any]:
        """The sweeps, where the run itself is sequential."""
        if self.forward == "parallel":
            return {}
        return {"parallel": dataclasses.replace(self, forward="parallel", regularizer=0.0)}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Chunks of equal length; a regulariser belongs to the sequential forward pass."""
        if self.layers % self.fused:
            yield "fused", f"chunks of {self.fused} do not divide the {self.layers} layers of the suffix"
        if self.fused > 1 and self.correction in ("diagonal", "exact"):
            yield "correction", f"{self.correction} is defined for single blocks; use fused = 1"
        if self.form == "paper" and (self.stride or self.correction != "identity"):
            yield "form", "tells two readings of stride = 0 with correction = 'identity' apart, and this is neither"
        if self.regularizer and self.forward == "parallel":
            yield "regularizer", "compares a sweep with the sequential states, so it needs forward = 'sequential'"

    def problems_in(self, model: Model) -> Iterator[tuple[str, str]]:
        """The suffix must lie in the stack, and the correction must know the residual path."""
        for field, lengths in (("layers", (self.layers,)), ("suffixes", self.suffixes)):
            if max(lengths, default=0) > model.layers:
                yield field, f"a suffix of {max(lengths)} layers is longer than the stack of {model.layers}"
        plan, longest = model.plan(), min(model.layers, max((self.layers, *self.suffixes)))
        kinds = {plan[layer % len(plan)].placement for layer in range(model.layers - longest, model.layers)}
        if self.correction == "hcn" and any(kind.transport != "matrix" for kind in kinds):
            yield "correction", "hcn corrects along residual streams; model.placement.name = 'mhc' has them, others do not"
        if self.correction == "scaled" and any(kind.transport != "scale" for kind in kinds):
            yield "correction", "scaled needs learned residual scales; model.placement.name = 'blend' has them"
        if self.fused > 1 and not all(kind.additive for kind in kinds):
            yield (
                "fused",
                "fused blocks sum what each sub-layer adds to the stream, which post-norm and parallel blocks lack",
            )
