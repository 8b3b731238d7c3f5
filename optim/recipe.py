"""From an optimizer's config to one optax transformation: clip, direction by group, layerwise rate, decay by role, rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optim.directions.layer_aware import MeasuredState
from optim.freezing import Freezable
from optim.layerwise.multipliers import LayerwiseState, Seen, along, layerwise_of
from optim.options import Optimizer
from optim.roles import Parameter, by_path, like, parameters
from optim.rules import Group, Rule, assign, resolved, rules_of
from optim.sampling import Cuts, frozen_rows, layer_cuts
from optim.schedules import Multiplier, RateTable, multiplier_of
from strata import ConfigError


class RecipeState(NamedTuple):
    """State of a recipe. It holds no tree of the model's own: arrays that mirror parameters are keyed by dotted path."""

    count: jax.Array  # int32[]: updates done
    directions: dict[str, Any]  # state of each group's direction, by name of the group
    layerwise: LayerwiseState | None = None


def rates(optimizer_config: Optimizer | Mapping[str, Any] | Any, steps: int | None = None) -> RateTable:
    """The learning rates of a run, as a table on the host.

    Args:
      optimizer_config: as in `build`.
      steps: updates in the whole run; needed if a schedule depends on it.

    Returns:
      `table(k)` -> rate of each group (numpy.float32) in update k, the first being 1. Equal schedules give equal bits.

    Raises:
      ConfigError: as in `build`.
    """
    optimizer = resolved(optimizer_config)
    rules = rules_of(optimizer)
    return RateTable({rule.name: rule.learning_rate for rule in rules}, _schedules(optimizer, rules, steps))


def spectra(state: RecipeState) -> MeasuredState | None:
    """What layer-aware Newton-Schulz with `name="measured"` has seen and chosen; None without it.

    `log_quantiles` float32 [rows, matrices, 5] and `choice` int32 [rows, matrices] by dotted path, rows being layers.
    """
    steps = getattr(state.directions.get("matrix"), "steps", None)
    return steps if isinstance(steps, MeasuredState) else None


def _schedules(optimizer: Optimizer, rules: tuple[Rule, ...], steps: int | None) -> dict[str, Multiplier]:
    """The schedule of each group; the common one is checked even if every group has its own."""
    _check_steps(steps)
    places = {id(schedule): f"optimizer.{path}" for path, schedule in optimizer.schedules()}
    common = multiplier_of(optimizer.schedule, steps)
    return {
        rule.name: common if rule.schedule is None else multiplier_of(rule.schedule, steps, places[id(rule.schedule)])
        for rule in rules
    }


def _check_steps(steps: int | None) -> None:
    whole = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)
    if steps is not None and not (whole and steps >= 1):
        raise ConfigError(f"steps = {steps!r}: expected the whole number of updates in the run, at least 1, or None")


def cuts(
    optimizer_config: Optimizer | Mapping[str, Any] | Any, model: nnx.Module | nnx.State, *, steps: int | None = None
) -> Cuts | None:
    """The layer sampling of a recipe over a model, for the host: `cuts(...).cut(step, seed)`. None without.

    Args:
      optimizer_config, model, steps: as in `build`.

    Raises:
      ConfigError: as in `build`.
    """
    _check_steps(steps)
    return layer_cuts(resolved(optimizer_config), parameters(model), steps)


def multipliers(state: RecipeState) -> dict[str, dict[str, jax.Array]]:
    """What the last update multiplied rates and decays by: `rate` and `decay`, each float32 [layers] or [] by dotted path.

    Empty without a layerwise rate. A path that is missing has multiplier 1.
    """
    found = state.layerwise
    return {"rate": {}, "decay": {}} if found is None else {"rate": found.rate, "decay": found.decay}


def build(
    optimizer_config: Optimizer | Mapping[str, Any] | Any,
    model: nnx.Module | nnx.State,
    *,
    steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One optax transformation for every parameter of a model.

        g <- g min(1, clip_norm / |g|)         |g| over all parameters
        w <- w - rate (direction(g) + weight_decay w)         rate, direction and decay by group, decay by role

    A parameter's declared multiplier, and those of the layerwise rate, multiply its rate.

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
        cut: a Python int, the first active layer, of the transformation that has layer sampling; 0: every layer. Weights and
          state below are unchanged, bit for bit. A gradient then has all its rows, those of frozen layers being ignored, or
          only the active ones; that of a parameter without an active layer may be None. The norm is of the active rows.
        gradient_difference: a tree like the gradients, the difference of two independent ones at the same weights, before
          clipping, which shrinks both alike; LANTON's independent estimator needs it.
      Peak rates and schedule are not in the program when `rates` is given: changing them compiles nothing.

    Raises:
      ConfigError: the config or `steps` is wrong, a parameter is not covered by exactly one rule, the first rule covers
        nothing, or a part needs `steps` or does not fit in it.
      ValueError: at `init` or `update`, a tree of other paths than the model's; no `params` though weights decay; rates
        of other groups; a cut without layer sampling; no difference of gradients though it is needed.
    """
    optimizer = resolved(optimizer_config)
    declared = parameters(model)
    rules = rules_of(optimizer)
    chosen = assign(rules, declared)
    schedules = _schedules(optimizer, rules, steps)
    peaks = {rule.name: rule.learning_rate for rule in rules}
    members = {rule.name: [path for path, own in chosen.items() if own is rule] for rule in rules}
    sampling = layer_cuts(optimizer, declared, steps)
    layerwise = layerwise_of(optimizer, declared, {path: rule.name for path, rule in chosen.items()}, steps)
    directions: dict[str, Any] = {}
    for rule in rules:
        of_group = Group({path: declared[path] for path in members[rule.name]}, declared)
        direction = optax.with_extra_args_support(rule.direction(of_group))
        directions[rule.name] = Freezable(direction, of_group, sampling) if sampling else direction
        if sampling:
            directions[rule.name].check(rule.name)
    decay = {path: rule.decay_of(declared[path]) for path, rule in chosen.items()}

    def own(leaves: dict[str, Any], group: str) -> dict[str, Any]:
        return {path: leaves[path] for path in members[group] if path in leaves}

    def init(params: Any) -> RecipeState:
        leaves = _flat(params, declared, "parameters")
        states = {name: direction.init(own(leaves, name)) for name, direction in directions.items()}
        return RecipeState(jnp.zeros((), jnp.int32), states, layerwise and layerwise.init(leaves))

    def update(
        updates: Any,
        state: RecipeState,
        params: Any = None,
        *,
        rates: Mapping[str, Any] | None = None,
        grad_norm: Any = None,
        cut: int = 0,
        gradient_difference: Any = None,
        **extra: Any,
    ) -> tuple[Any, RecipeState]:
        frozen = _frozen(declared, sampling, cut)
        gradients = _active(_flat(updates, declared, "gradients", partly=sampling is not None), declared, frozen)
        whole = None if params is None else _flat(params, declared, "parameters")
        weights = whole and _active(whole, declared, frozen)
        if weights is None and (any(decay.values()) or layerwise or cut):
            raise ValueError("weight decay, layerwise rates and cuts need the parameters: tx.update(gradients, state, params)")
        count = optax.safe_increment(state.count)
        if rates is None:
            rates = {name: peak * schedules[name](count, jnp) for name, peak in peaks.items()}
        elif set(rates) != set(peaks):
            raise ValueError(f"rates of groups {sorted(rates)}, expected {sorted(peaks)}")
        difference = None if gradient_difference is None else _flat(gradient_difference, declared, "differences")
        if optimizer.clip_norm is not None:
            norm = global_norm(gradients) if grad_norm is None else grad_norm
            # At most 1, and 1 for a zero gradient; a norm that is not finite stays visible in the updates.
            shrink = optimizer.clip_norm / jnp.maximum(norm, optimizer.clip_norm)
            gradients = {path: g * shrink.astype(g.dtype) for path, g in gradients.items()}
            # Noise is that of the gradients that move the weights, so it shrinks with them.
            difference = difference and {path: d * shrink.astype(d.dtype) for path, d in difference.items()}
        scales = state.layerwise
        if layerwise:
            scales = layerwise.update(_seen(gradients, whole, count, declared, frozen, difference), state.layerwise)
        after, steps_of = {}, {}
        for name, direction in directions.items():
            with jax.named_scope(f"direction_{name}"):
                arguments = {"cut": cut, **extra} if sampling else extra
                moved, after[name] = direction.update(
                    own(gradients, name), state.directions[name], weights and own(weights, name), **arguments
                )
                for path, move in moved.items():
                    if decay[path]:
                        shrinking = _scaled(decay[path], scales and scales.decay.get(path), move, frozen[path])
                        move = move + shrinking * weights[path]
                    rate = _scaled(rates[name], scales and scales.rate.get(path), move, frozen[path])
                    if declared[path].multiplier != 1:
                        rate = rate * declared[path].multiplier
                    steps_of[path] = (-rate * move).astype(gradients[path].dtype)
        if not sampling:
            return like(updates, steps_of), RecipeState(count, after, scales)
        return like(params, _padded(steps_of, whole, frozen)), RecipeState(count, after, scales)

    return optax.GradientTransformationExtraArgs(init, update)


def _flat(tree: Any, declared: Mapping[str, Parameter], what: str, partly: bool = False) -> dict[str, Any]:
    leaves = by_path(tree)
    missing, extra = sorted(declared.keys() - leaves.keys()), sorted(leaves.keys() - declared.keys())
    if extra or (missing and not partly):
        raise ValueError(f"{what} are not those of the model: missing {missing}, unexpected {extra}")
    return leaves


def _frozen(declared: Mapping[str, Parameter], sampling: Cuts | None, cut: int) -> dict[str, int]:
    """Frozen rows of each parameter, counted from the first."""
    if sampling is None:
        if cut:
            raise ValueError(f"cut={cut} needs layer sampling in the optimizer's config")
        return dict.fromkeys(declared, 0)
    if cut not in sampling.first:
        raise ValueError(f"cut={cut} is none of those that can be drawn, {sampling.first}")
    return {path: sampling.frozen(parameter, cut) for path, parameter in declared.items()}


def _active(leaves: dict[str, Any], declared: Mapping[str, Parameter], frozen: Mapping[str, int]) -> dict[str, Any]:
    """The active rows of each array that has any."""
    found = {}
    for path, parameter in declared.items():
        rest = parameter.layers - frozen[path]
        if rest == 0:
            continue
        if path not in leaves:
            raise ValueError(f"no gradient of {path}, of which {rest} layers are active")
        leaf = leaves[path]
        found[path] = leaf if not frozen[path] or leaf.shape[0] == rest else leaf[frozen[path] :]
    return found


def _padded(updates: dict[str, Any], weights: Mapping[str, Any], frozen: Mapping[str, int]) -> dict[str, Any]:
    """Updates of every row. Adding -0.0 leaves every number as it is, -0.0 too; adding 0.0 does not."""
    found = {}
    for path, weight in weights.items():
        if path not in updates:
            found[path] = jnp.full_like(weight, -0.0)
        elif frozen[path]:
            still = jnp.full((frozen[path], *weight.shape[1:]), -0.0, updates[path].dtype)
            found[path] = jnp.concatenate([still, updates[path]])
        else:
            found[path] = updates[path]
    return found


def _seen(
    gradients: dict[str, Any],
    weights: dict[str, Any],
    count: jax.Array,
    declared: Mapping[str, Parameter],
    frozen: Mapping[str, int],
    difference: dict[str, Any] | None,
) -> Seen:
    """What a layerwise rate looks at: every array whole, with which rows are active where some are not."""
    if not any(frozen.values()):
        return Seen(gradients, weights, count, {}, difference)
    zeros = {path: jnp.zeros_like(leaf) for path, leaf in weights.items()}
    full = {path: zeros[path].at[frozen[path] :].set(g) if frozen[path] else g for path, g in gradients.items()}
    active = {
        path: np.arange(parameter.layers) >= frozen[path] if parameter.stacked else np.bool_(frozen[path] == 0)
        for path, parameter in declared.items()
        if frozen[path]
    }
    return Seen(zeros | full, weights, count, active, difference)


def _scaled(value: Any, multiplier: jax.Array | None, leaf: jax.Array, frozen: int) -> Any:
    """A rate or decay times the multipliers of the active layers of a leaf."""
    if multiplier is None:
        return value
    return value * along(multiplier[frozen:] if multiplier.ndim and frozen else multiplier, leaf)


def active_rows(gradients: Any, model: nnx.Module | nnx.State, cut: int) -> dict[str, jax.Array]:
    """The gradients that an update with a cut uses, by dotted path: whole, or the rows from the first active layer on.

    Args:
      gradients: of every parameter.
      model: as in `build`.
      cut: the first active layer; 0: all.
    """
    declared = parameters(model)
    frozen = {path: frozen_rows(parameter, cut) for path, parameter in declared.items()}
    return _active(_flat(gradients, declared, "gradients"), declared, frozen)


def global_norm(tree: Any) -> jax.Array:
    """Root of the sum of squares of every leaf of a tree: float32[], 0 for an empty one.

    The norm that `build` clips by; compute it once, log it, and pass it on as `grad_norm`.
    """
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
