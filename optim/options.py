"""Options of every optimizer part. Imports no JAX: a config is checked before JAX is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from strata import option, options, part, register

Problems = Iterator[tuple[str, str]]

ROLES = ("embedding", "head", "matrix", "vector", "scalar", "table")
"""What a parameter can be (see `optim.roles`)."""


@register("optimizer.direction", "adamw", implementation="optim.directions.adamw:rules")
@options
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101), bias-corrected."""

    learning_rate: float = option(3e-3, "peak rate; the schedule multiplies it", least=0)
    weight_decay: float = option(0.1, "decoupled, times the rate; on matrices only (see `decay_roles`)", least=0)
    decay_roles: tuple[str, ...] = option(("matrix",), "parameter roles that are decayed", among=ROLES)
    b1: float = option(0.9, "decay of the first moment", least=0, below=1)
    b2: float = option(0.95, "decay of the second moment", least=0, below=1)
    epsilon: float = option(1e-8, "added to the root of the second moment", above=0)


@register("optimizer.direction", "muon", implementation="optim.directions.muon:rules")
@options
class Muon:
    """Momentum orthogonalised by Newton-Schulz for matrices, another direction for the rest (Jordan 2024)."""

    learning_rate: float = option(0.02, "peak rate of matrices; the default is for scaling=jordan", least=0)
    momentum: float = option(0.95, "decay of the momentum", least=0, below=1)
    nesterov: bool = option(True, "look ahead by one momentum step; false: heavy ball")
    weight_decay: float = option(0.0, "decoupled, times the rate, on every matrix", least=0)
    scaling: str | None = option(
        "jordan",
        "jordan: sqrt(max(1, out / in)); moonlight: 0.2 sqrt(max(out, in)) (arXiv:2502.16982); None: 1",
        among=("jordan", "moonlight"),
    )
    coefficients: str = option(
        "jordan", "Newton-Schulz polynomial", among=("jordan", "you5", "you6", "polar_express", "deepseek")
    )
    iterations: int | None = option(
        None, "Newton-Schulz steps; None: as many as the polynomial was made for (jordan 5)", least=1, most=20
    )
    rest: object = part("optimizer.direction", "adamw", "direction of every parameter that is not a matrix")

    def problems(self) -> Problems:
        """The rest must be a direction for vectors too, and a list of polynomials has its own length."""
        if self.rest.name == "muon":
            yield "rest.name", "Muon is for matrices; embeddings, heads and norms need another direction, such as adamw"
        fixed = {"you5": 5, "you6": 6, "deepseek": 10}.get(self.coefficients)
        if fixed and self.iterations not in (None, fixed):
            yield "iterations", f"{self.coefficients} is a list of {fixed} polynomials; give {fixed} or None"
        if self.coefficients == "polar_express" and self.iterations is not None and self.iterations < 5:
            yield "iterations", "polar_express starts with 5 polynomials and repeats the last; give at least 5 or None"


@options
class Warmup:
    """Fields that every schedule shares. Update k of a run, the first being 1, uses the rate of step k."""

    warmup: int = option(0, "steps of linear warm-up: update k has k / warmup of the full rate", least=0)

    def problems_over(self, steps: int) -> Problems:
        """What cannot work in a run of `steps` updates."""
        if self.warmup > steps:
            yield "warmup", f"the warm-up of {self.warmup} steps is longer than the run of {steps}"


@register("optimizer.schedule", "constant", implementation="optim.schedules:constant")
@options
class Constant(Warmup):
    """The full rate after warm-up."""

    depends_on_steps = False

    def problems_over(self, steps: int) -> Problems:
        """None: a run may end within its warm-up, and be extended."""
        yield from ()


@register("optimizer.schedule", "linear", implementation="optim.schedules:linear")
@options
class Linear(Warmup):
    """From the full rate to `final` times it in a straight line, over the whole run."""

    final: float = option(0.0, "rate of the last update, as a fraction of the full rate (at 0 it is idle)", least=0, most=1)
    depends_on_steps = True


@register("optimizer.schedule", "cosine", implementation="optim.schedules:cosine")
@options
class Cosine(Warmup):
    """Half a cosine from the full rate to `final` times it, over the whole run (arXiv:1608.03983)."""

    final: float = option(0.1, "rate of the last update, as a fraction of the full rate", least=0, most=1)
    depends_on_steps = True


@register("optimizer.schedule", "inverse_sqrt", implementation="optim.schedules:inverse_sqrt")
@options
class InverseSqrt(Warmup):
    """`sqrt(t0 / step)` after t0 = max(warmup, `plateau`) steps (Vaswani et al. 2017, arXiv:1706.03762)."""

    plateau: int = option(1, "the rate is full up to this step", least=1)
    depends_on_steps = False

    def problems_over(self, steps: int) -> Problems:
        """None: a run may end anywhere, and be extended."""
        yield from ()


@register("optimizer.schedule", "wsd", implementation="optim.schedules:wsd")
@options
class WSD(Warmup):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): full until the last `decay` of the run."""

    decay: float = option(0.2, "length of the decay as a fraction of the run, rounded to whole steps", least=0, most=1)
    shape: str = option("linear", "form of the decay", among=("linear", "sqrt", "cosine", "exponential"))
    final: float = option(0.0, "rate of the last update, as a fraction of the full rate (at 0 it is idle)", least=0, most=1)
    depends_on_steps = True

    def problems(self) -> Problems:
        """An exponential cannot reach zero."""
        if self.shape == "exponential" and self.final == 0:
            yield "final", "an exponential decay needs a final fraction above 0"

    def decay_steps(self, steps: int) -> int:
        """Updates of the decay in a run of `steps`; the last of them has the final rate."""
        return round(self.decay * steps)

    def problems_over(self, steps: int) -> Problems:
        """The warm-up must end before the decay begins."""
        decay = self.decay_steps(steps)
        if self.warmup + decay > steps:
            yield "warmup", f"a warm-up of {self.warmup} and a decay of {decay} steps do not fit in a run of {steps}"


@options
class Optimizer:
    """A recipe: direction x schedule x clipping."""

    direction: object = part("optimizer.direction", "adamw", "from gradients to updates, with its rate and weight decay")
    schedule: object = part("optimizer.schedule", "cosine", "multiplier of every rate over the run")
    clip_norm: float | None = option(1.0, "largest global norm of the gradient; None: no clipping", above=0)
