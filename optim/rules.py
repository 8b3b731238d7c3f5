"""Which parameter gets which rule: every parameter exactly one, or the run does not start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx

import strata
from optim.layerwise.multipliers import described
from optim.options import Optimizer
from optim.roles import Parameter, parameters
from optim.sampling import layer_cuts
from strata import ConfigError, Problem


class Group(dict[str, Parameter]):
    """The parameters of a rule by path."""

    def __init__(self, own: Mapping[str, Parameter], model: Mapping[str, Parameter]):
        super().__init__(own)
        self.model = model  # all parameters, of every rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How one group of parameters is updated. A direction's implementation returns one or more of these.

    The implementation of a registered direction is called as `rules(options, roles=..., name=...)` and covers exactly
    `roles` with groups of its own, or with one group called `name`.
    """

    name: str  # of the group
    roles: tuple[str, ...]  # parameters of these roles belong to it
    direction: Callable[[Group], optax.GradientTransformation]
    # From the parameters of the group by path to a transformation over the dict of their arrays by path, from gradients to
    # updates of positive sign, before rate and decay.
    learning_rate: float  # peak; the schedule multiplies it
    weight_decay: float  # decoupled; the rate multiplies it
    decay_roles: tuple[str, ...]
    newton_schulz: Callable[[Parameter, Mapping[str, Parameter]], str] = lambda parameter, model: ""
    # The configuration of a parameter in words, for the table.
    schedule: Any = None  # options of a schedule of its own; None: the common one

    def decay_of(self, parameter: Parameter) -> float:
        """Weight decay of one parameter."""
        return self.weight_decay if parameter.role in self.decay_roles else 0.0


class Assignment(NamedTuple):
    """One row of the table: a parameter and how it is updated."""

    path: str
    shape: tuple[int, ...]
    role: str
    layers: int  # stacked layers; 1 without a "layer" axis
    rule: str  # name of the group
    learning_rate_multiplier: float  # of the group's rate
    learning_rate: float  # peak, multiplier included
    weight_decay: float
    newton_schulz: str  # such as "jordan x5 gram"; empty without
    layerwise: str = ""  # how its multiplier changes with layer and time; empty: it does not
    sampling: str = ""  # the draws of layer sampling that update it; empty: every one


def resolved(config: Optimizer | Mapping[str, Any] | Any) -> Optimizer:
    """The options of an optimizer from an `Optimizer`, a dict or a `ConfigDict`.

    Raises:
      ConfigError: with every mistake in it.
    """
    if isinstance(config, Optimizer):
        config = strata.to_tree(config)
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    value, found = strata.resolve(Optimizer, config, "optimizer")
    if found.problems:
        raise ConfigError(found.problems, source="the optimizer's config")
    return value


def check_numbers(kind: type, **given: Any) -> None:
    """Arguments of a direction that is used by itself, within the bounds of the same fields of its options.

    Schedules and arrays, which may be traced, are left alone.

    Raises:
      ConfigError: with every number that is out of bounds.
    """
    numbers = {name: value for name, value in given.items() if isinstance(value, (int, float, np.number))}
    _, found = strata.resolve(kind, numbers)
    if found.problems:
        raise ConfigError(found.problems, source=f"the arguments of {kind.__name__}")


def rules_of(optimizer: Optimizer) -> tuple[Rule, ...]:
    """The rules of a recipe, the group of matrices first where there are several."""
    return strata.implementation(optimizer.direction)(optimizer.direction)


def assign(rules: tuple[Rule, ...], declared: Mapping[str, Parameter]) -> dict[str, Rule]:
    """The one rule of each parameter by path.

    Raises:
      ConfigError: naming every parameter that no rule or several rules cover, a first rule that covers none, and every weight
        decay that reaches none (of matrices, the default, excepted).
    """
    chosen: dict[str, Rule] = {}
    problems: list[Problem] = []
    for path, parameter in declared.items():
        fits = [rule for rule in rules if parameter.role in rule.roles]
        if len(fits) == 1:
            chosen[path] = fits[0]
        elif not fits:
            covered = ", ".join(role for rule in rules for role in rule.roles)
            problems.append(Problem(path, f"no rule covers role {parameter.role!r}; covered: {covered}", has_value=False))
        else:
            names = " and ".join(repr(rule.name) for rule in fits)
            problems.append(Problem(path, f"role {parameter.role!r} is covered by the rules {names}", has_value=False))
    # A model may consist of matrices alone, but a direction chosen for matrices that meets none is a mistake.
    if not problems and rules[0] not in chosen.values():
        roles = ", ".join(rules[0].roles)
        message = f"rule {rules[0].name!r} matches no parameter: the model has none of role {roles}"
        problems.append(Problem("optimizer.direction", message, has_value=False))
    problems += _idle_decays(rules, chosen, declared)
    if problems:
        raise ConfigError(problems, source="the assignment of optimizer rules to parameters")
    return chosen


def _idle_decays(rules: tuple[Rule, ...], chosen: Mapping[str, Rule], declared: Mapping[str, Parameter]) -> list[Problem]:
    """Weight decays of which none of the roles that were asked for is a parameter's."""
    reached = {(rule.decay_roles, rule.decay_of(declared[path])) for path, rule in chosen.items()}
    problems: dict[str, Problem] = {}
    for rule in rules:
        # The default, matrices, is not something that was asked for.
        if rule.weight_decay and rule.decay_roles != ("matrix",) and (rule.decay_roles, rule.weight_decay) not in reached:
            path = f"optimizer.direction{'.rest' if rule.name.startswith('rest') else ''}.decay_roles"
            message = (
                f"the weight decay of {rule.weight_decay:g} reaches no parameter: no one that it could reach has such a role"
            )
            problems[path] = Problem(path, message, list(rule.decay_roles))
    return list(problems.values())


def assignment(optimizer_config: Optimizer | Mapping[str, Any] | Any, model: nnx.Module | nnx.State) -> list[Assignment]:
    """One row for every parameter of `model`, in the order of its state.

    Args:
      optimizer_config: as in `optim.build`.
      model: as in `optim.build`; the abstract form is enough.

    Raises:
      ConfigError: as in `optim.build`.
    """
    optimizer, declared = resolved(optimizer_config), parameters(model)
    chosen = assign(rules_of(optimizer), declared)
    rates, words = described(optimizer, declared, chosen) if optimizer.layerwise else ({}, {})
    cuts = layer_cuts(optimizer, declared, 1)
    fixed = {path: parameter.multiplier * rates.get(path, 1.0) for path, parameter in declared.items()}
    return [
        Assignment(
            path=path,
            shape=parameter.shape,
            role=parameter.role,
            layers=parameter.layers,
            rule=chosen[path].name,
            learning_rate_multiplier=fixed[path],
            learning_rate=chosen[path].learning_rate * fixed[path],
            weight_decay=chosen[path].decay_of(parameter),
            newton_schulz=chosen[path].newton_schulz(parameter, declared),
            layerwise=words.get(path, ""),
            sampling=cuts.describe(parameter) if cuts else "",
        )
        for path, parameter in declared.items()
    ]
