"""From an optimizer's config to one optax transformation: clip, direction by group, decay by role, rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optim.options import Optimizer
from optim.roles import by_path, like, parameters
from optim.rules import assign, resolved, rules_of
from optim.schedules import RateTable, multiplier_of


class RecipeState(NamedTuple):
    """State of a recipe. It holds no tree of the model's own: arrays that mirror parameters are keyed by dotted path."""

    count: jax.Array  # int32[]: updates done
    directions: dict[str, Any]  # state of each group's direction, by name of the group


def rates(optimizer_config: Optimizer | Mapping[str, Any] | Any, steps: int | None = None) -> RateTable:
    """The learning rates of a run, as a table on the host.

    Args:
      optimizer_config: as in `build`.
      steps: updates in the whole run; needed if the schedule depends on it.

    Returns:
      `table(k)` -> rate of each group (numpy.float32) in update k, the first being 1. Equal schedules give equal bits.

    Raises:
      ConfigError: as in `build`.
    """
    optimizer = resolved(optimizer_config)
    multiplier = multiplier_of(optimizer.schedule, steps)
    peaks = {rule.name: rule.learning_rate for rule in rules_of(optimizer)}
    return RateTable(peaks, dict.fromkeys(peaks, multiplier))


def build(
    optimizer_config: Optimizer | Mapping[str, Any] | Any,
    model: nnx.Module | nnx.State,
    *,
    steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One optax transformation for every parameter of a model.

        g <- g min(1, clip_norm / |g|)         |g| over all parameters
        w <- w - rate (direction(g) + weight_decay w)         rate, direction and decay by group, decay by role

    Args:
      optimizer_config: an `optim.options.Optimizer`, or a dict or ConfigDict of its fields.
      model: the module whose parameters declare role and axes, its abstract form or its state. Only declarations are
        read.
      steps: updates in the whole run; needed if the schedule depends on it.

    Returns:
      A transformation over `nnx.state(model, nnx.Param)` or the plain dict of its arrays. Its update takes, beside the
      usual arguments,
        rates: dict of float32[] by group, as `optim.rates(...)(k)` gives. None: the schedule is evaluated from the
          transformation's own count (agrees to 1e-6).
        grad_norm: float32[], the global norm of the gradients if it is known already. None: computed for clipping.
      Peak rates and schedule are not in the program when `rates` is given: changing them compiles nothing.

    Raises:
      ConfigError: the config is wrong, a parameter is not covered by exactly one rule, the first rule covers nothing,
        or the schedule needs `steps` or does not fit in it.
      ValueError: at `init` or `update`, a tree of other paths than the model's; no `params` though weights decay; rates
        of other groups.
    """
    optimizer = resolved(optimizer_config)
    declared = parameters(model)
    rules = rules_of(optimizer)
    chosen = assign(rules, declared)
    table = rates(optimizer, steps)
    multiplier = multiplier_of(optimizer.schedule, steps)
    members = {rule.name: [path for path, own in chosen.items() if own is rule] for rule in rules}
    directions = {
        rule.name: optax.with_extra_args_support(rule.direction({path: declared[path] for path in members[rule.name]}))
        for rule in rules
    }
    decay = {path: rule.decay_of(declared[path]) for path, rule in chosen.items()}

    def flat(tree: Any, what: str) -> dict[str, Any]:
        leaves = by_path(tree)
        if leaves.keys() != decay.keys():
            missing, extra = sorted(decay.keys() - leaves.keys()), sorted(leaves.keys() - decay.keys())
            raise ValueError(f"{what} are not those of the model: missing {missing}, unexpected {extra}")
        return leaves

    def own(leaves: dict[str, Any], group: str) -> dict[str, Any]:
        return {path: leaves[path] for path in members[group]}

    def init(params: Any) -> RecipeState:
        leaves = flat(params, "parameters")
        return RecipeState(
            jnp.zeros((), jnp.int32), {name: direction.init(own(leaves, name)) for name, direction in directions.items()}
        )

    def update(
        updates: Any,
        state: RecipeState,
        params: Any = None,
        *,
        rates: Mapping[str, Any] | None = None,
        grad_norm: Any = None,
        **extra: Any,
    ) -> tuple[Any, RecipeState]:
        gradients = flat(updates, "gradients")
        weights = None if params is None else flat(params, "parameters")
        if weights is None and any(decay.values()):
            raise ValueError("weight decay needs the parameters: tx.update(gradients, state, params)")
        count = optax.safe_increment(state.count)
        if rates is None:
            fraction = multiplier(count, jnp)
            rates = {name: peak * fraction for name, peak in table.peaks.items()}
        elif set(rates) != set(table.groups):
            raise ValueError(f"rates of groups {sorted(rates)}, expected {sorted(table.groups)}")
        if optimizer.clip_norm is not None:
            norm = global_norm(gradients) if grad_norm is None else grad_norm
            # At most 1, and 1 for a zero gradient; a norm that is not finite stays visible in the updates.
            shrink = optimizer.clip_norm / jnp.maximum(norm, optimizer.clip_norm)
            gradients = {path: g * shrink.astype(g.dtype) for path, g in gradients.items()}
        after, steps_of = {}, {}
        for name, direction in directions.items():
            with jax.named_scope(f"direction_{name}"):
                moved, after[name] = direction.update(
                    own(gradients, name), state.directions[name], weights and own(weights, name), **extra
                )
                for path, move in moved.items():
                    move = move + decay[path] * weights[path] if decay[path] else move
                    steps_of[path] = (-rates[name] * move).astype(gradients[path].dtype)
        return like(updates, steps_of), RecipeState(count, after)

    return optax.GradientTransformationExtraArgs(init, update)


def global_norm(tree: Any) -> jax.Array:
    """Root of the sum of squares of every leaf of a tree: float32[], 0 for an empty one.

    The norm that `build` clips by; compute it once, log it, and pass it on as `grad_norm`.
    """
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
