"""Options of directions: from gradients to updates, with their rate and weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optim.options.roles import ROLES, Problems
from strata import option, options, part, register

SCHEMES = ("jordan", "you5", "you6", "polar_express", "deepseek")
_schedule_help = "schedule of these parameters alone; None: optimizer.schedule"


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
    schedule: object = part("optimizer.schedule", None, _schedule_help, added="0.2")


@register("optimizer.direction", "sgd", implementation="optim.directions.sgd:rules")
@options
class SGD:
    """Gradient descent with momentum: m <- momentum m + g (Polyak 1964; Nesterov's form as in Sutskever et al. 2013)."""

    learning_rate: float = option(0.1, "peak rate; the schedule multiplies it", least=0)
    momentum: float = option(0.9, "decay of the momentum; 0: none", least=0, below=1)
    nesterov: bool = option(False, "look ahead by one momentum step")
    weight_decay: float = option(0.0, "decoupled, times the rate", least=0)
    decay_roles: tuple[str, ...] = option(("matrix",), "parameter roles that are decayed", among=ROLES)
    schedule: object = part("optimizer.schedule", None, _schedule_help)


@register("optimizer.direction", "optax", implementation="optim.directions.dotted:rules")
@options
class Optax:
    """Any optax transformation by dotted name, from gradients to updates of positive sign, such as optax.scale_by_lion."""

    transformation: str = option("optax.scale_by_lion", "dotted name of a function that gives a GradientTransformation")
    arguments: dict | None = option(None, "its keyword arguments")
    learning_rate: float = option(3e-4, "peak rate; the schedule multiplies it", least=0)
    weight_decay: float = option(0.0, "decoupled, times the rate", least=0)
    decay_roles: tuple[str, ...] = option(("matrix",), "parameter roles that are decayed", among=ROLES)
    schedule: object = part("optimizer.schedule", None, _schedule_help)
    per_layer: bool = option(
        True,
        "each layer of a stacked parameter is transformed by itself, so that norms and other statistics are a layer's; false: "
        "the whole tree at once, stacks as they are stored, for what looks across parameters, such as a global norm",
        added="0.2",
    )

    def problems(self) -> Problems:
        """A module and a name in it; what JAX must be loaded for is checked when the optimizer is built."""
        if not all(word.isidentifier() for word in self.transformation.split(".")) or "." not in self.transformation:
            yield "transformation", "expected a dotted name, such as optax.scale_by_lion"


LEFT_TO_NEWTON_SCHULZ = {"coefficients": "jordan", "iterations": None, "triples": ()}
"""Fields of `Orthogonalized` that `newton_schulz` stands for, and their defaults."""


@options
class Orthogonalized:
    """Fields of directions that orthogonalise the momentum of matrices."""

    learning_rate: float = option(0.02, "peak rate of matrices; the default is for scaling=jordan", least=0)
    momentum: float = option(0.95, "decay of the momentum", least=0, below=1)
    nesterov: bool = option(True, "look ahead by one momentum step; false: heavy ball")
    weight_decay: float = option(0.0, "decoupled, times the rate, on every matrix", least=0)
    coefficients: str = option("jordan", "Newton-Schulz polynomial", among=SCHEMES)
    iterations: int | None = option(
        None, "Newton-Schulz steps; None: as many as the polynomial was made for (jordan 5)", least=1, most=20
    )
    triples: tuple[float, ...] = option(
        (), "a polynomial of your own in place of `coefficients`: a, b, c of every step one after the other", added="0.2"
    )
    rest: object = part("optimizer.direction", "adamw", "direction of every parameter that is not a matrix")
    newton_schulz: object = part(
        "optimizer.newton_schulz", None, "steps by layer; None: the same for every matrix", added="0.2"
    )
    schedule: object = part("optimizer.schedule", None, "schedule of matrices alone; None: optimizer.schedule", added="0.2")
    matrices_only = True

    @property
    def polynomials(self) -> str | list[tuple[float, ...]]:
        """What `optim.newton_schulz` takes as coefficients."""
        return [self.triples[i : i + 3] for i in range(0, len(self.triples), 3)] or self.coefficients

    def problems(self) -> Iterator[Problems]:
        """The rest must be a direction for vectors too, and a list of polynomials has its own length."""
        yield self._rest_problems()
        yield self._rest_decay_problems()
        yield from (self._leftover(name, default) for name, default in LEFT_TO_NEWTON_SCHULZ.items())
        yield self._length_problems()

    def _rest_problems(self) -> Problems:
        if getattr(self.rest, "matrices_only", False):
            label = {"muon": "Muon", "normuon": "NorMuon"}[self.rest.name]
            yield "rest.name", f"{label} is for matrices; embeddings, heads and norms need another direction, such as adamw"

    def _rest_decay_problems(self) -> Problems:
        decay, roles = getattr(self.rest, "weight_decay", 0), getattr(self.rest, "decay_roles", ROLES)
        # The default, which is for a direction of all parameters, stands for a rest without decay.
        if decay and decay != type(self.rest).weight_decay and set(roles) <= {"matrix"}:
            yield (
                "rest.weight_decay",
                f"it reaches no parameter: rest.decay_roles = {list(roles)}, and matrices have a weight_decay of their own; "
                "name other roles there, such as ['embedding', 'head'], or leave it out",
            )

    def _leftover(self, name: str, default: Any) -> Problems:
        if self.newton_schulz is not None and getattr(self, name) != default:
            yield name, f"newton_schulz = {self.newton_schulz.name!r} chooses among its own candidates; leave this out"

    def _length_problems(self) -> Problems:
        if len(self.triples) % 3:
            yield "triples", f"{len(self.triples)} numbers are no whole number of triples a, b, c"
        elif self.triples:
            if len(self.triples) > 3 and self.iterations not in (None, len(self.triples) // 3):
                yield "iterations", f"{len(self.triples) // 3} triples are as many steps; only a single one is repeated"
            return
        fixed = {"you5": 5, "you6": 6, "deepseek": 10}.get(self.coefficients)
        if fixed and self.iterations not in (None, fixed):
            yield "iterations", f"{self.coefficients} is a list of {fixed} polynomials; give {fixed} or None"
        if self.coefficients == "polar_express" and self.iterations is not None and self.iterations < 5:
            yield "iterations", "polar_express starts with 5 polynomials and repeats the last; give at least 5 or None"


@register("optimizer.direction", "muon", implementation="optim.directions.muon:rules")
@options
class Muon(Orthogonalized):
    """Momentum orthogonalised by Newton-Schulz for matrices, another direction for the rest (Jordan 2024)."""

    scaling: str | None = option(
        "jordan",
        "jordan: sqrt(max(1, out / in)); moonlight: 0.2 sqrt(max(out, in)) (arXiv:2502.16982); None: 1",
        among=("jordan", "moonlight"),
    )
    form: str = option(
        "lmo",
        "lmo: the polar factor, Muon; sharp: times the nuclear norm, the sharp operator of arXiv:2510.02239",
        among=("lmo", "sharp"),
        added="0.2",
    )


@register("optimizer.direction", "normuon", implementation="optim.directions.normuon:rules")
@options
class NorMuon(Orthogonalized):
    """Muon whose output neurons are brought to one scale by a running second moment (arXiv:2510.05491)."""

    learning_rate: float = option(
        3e-3,
        "peak rate of matrices; the default is for scaling=rms, whose update has about the size of Adam's, and so is Adam's; "
        "jordan takes Muon's, about 0.02",
        least=0,
    )
    b2: float = option(0.95, "decay of the second moment of each output neuron", least=0, below=1)
    epsilon: float = option(1e-10, "added to the root of the second moment", above=0)
    scaling: str | None = option(
        "rms",
        "rms: root mean square 0.2, as the paper; jordan, moonlight: the norm of Muon's update in that scaling, as the code; "
        "None: 1",
        among=("rms", "jordan", "moonlight"),
    )


@register("optimizer.direction", "lmo", implementation="optim.directions.lmo:rules")
@options
class LMO:
    """Momentum through the linear minimisation oracle of a norm by role (arXiv:2502.07529), the base of LANTON
    (arXiv:2510.14009).

    Matrices: spectral norm; embedding, head and tables: largest entry; everything else: root mean square.
    """

    learning_rate: float = option(0.01, "peak rate of matrices", least=0)
    table_learning_rate: float = option(1e-3, "peak rate of embedding, head and tables, whose every entry moves by it", least=0)
    vector_learning_rate: float = option(1e-3, "peak rate of the rest, whose entries move by it in root mean square", least=0)
    momentum: float = option(0.95, "decay of the momentum (LANTON's is not known)", least=0, below=1)
    nesterov: bool = option(False, "look ahead by one momentum step; not mentioned in LANTON")
    weight_decay: float = option(0.0, "decoupled, times the rate", least=0)
    decay_roles: tuple[str, ...] = option(("matrix",), "parameter roles that are decayed", among=ROLES)
    coefficients: str = option("jordan", "Newton-Schulz polynomial", among=SCHEMES)
    schedule: object = part("optimizer.schedule", None, _schedule_help)
