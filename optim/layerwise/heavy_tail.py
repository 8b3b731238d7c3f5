"""Rates by the heavy tail of each weight's spectrum: LLR (arXiv:2605.22297), TempBalance (2312.00359), AlphaDecay (2506.14562).

Matrices with lighter tails (larger alpha, "under-trained") get the larger multiplier. Each layer of a stacked parameter is a
matrix of its own; one that holds several side by side (`Parameter.split`), or has more axes, gets one multiplier from the mean
of their alphas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optim import options
from optim.directions.blocks import blocks_of
from optim.layerwise.multipliers import Layerwise, LayerwiseState, Multipliers, Seen, ones
from optim.layerwise.spectrum import LARGEST, hill_alpha
from optim.roles import Parameter, depth_of
from strata import ConfigError, Problem


class HeavyTailState(NamedTuple):
    """State of the methods of this file."""

    alpha: Multipliers  # as last measured, of the matrices that are compared; 0 before
    start: Multipliers  # multipliers at the last measurement
    target: Multipliers  # what they move to
    began: jax.Array  # int32[]: update of the last measurement


class Matrices(NamedTuple):
    """The matrices that are compared: for each path the rows that take part."""

    rows: dict[str, np.ndarray]  # layers of each parameter, int; (0,) for one without a layer axis
    places: np.ndarray  # the layer of the model of each, in the order of `rows`, int [count]


def llr(chosen: options.LLR, declared: Mapping[str, Parameter], groups: Any, steps: int) -> Layerwise:
    """LLR: every matrix, measured at step 1 and every `interval` in the first `adapt` of the run, each change a linear ramp.

    As released embedding and head have the largest multiplier, everything else the smallest of the range; 1 with a map that
    fills none (sqrt, log2, sigmoid), whose multipliers lie around 1. The ramp is of the multiplier,
    where the code ramps the rate to where the schedule will be: the same while the schedule is straight. The code's last
    measurement falls on the last adaptive step and acts for about one step; here the last one is such that its ramp ends within
    `adapt`. Step 1 measures in any run, so where its ramp would not end within `adapt` ramps are as long as is left after it.
    """
    del groups
    limit = int(chosen.adapt * steps)
    ramp = min(chosen.ramp, max(0, limit - 1))
    outer = ("embedding", "head") if chosen.outer == "most" else ()
    return _build(chosen, declared, ramp=ramp, last=limit - ramp, outer=outer, untuned="least")


def frozen(chosen: options.Frozen, declared: Mapping[str, Parameter], groups: Any, steps: int | None) -> Layerwise:
    """LLR's multipliers of the first step, for ever: how much of LLR is the shapes of matrices."""
    del groups, steps
    outer = ("embedding", "head") if chosen.outer == "most" else ()
    return _build(chosen, declared, ramp=0, last=1, outer=outer, untuned="least")


def temp_balance(chosen: options.TempBalance, declared: Mapping[str, Parameter], groups: Any, steps: int | None) -> Layerwise:
    """TempBalance: measured every `interval`, switched at once; ends, and all that is no matrix, at the base rate."""
    del groups, steps
    return _build(chosen, declared, ends=chosen.ends)


def alpha_decay(chosen: options.AlphaDecay, declared: Mapping[str, Parameter], groups: Any, steps: int | None) -> Layerwise:
    """AlphaDecay: TempBalance's map on the weight decay of every matrix or, without `ends`, of those between the end layers.

    As released the first linear layer, the query of layer 0, is the only matrix that is not tuned; there is no arm for that.
    """
    del groups, steps
    return _build(chosen, declared, ends=chosen.ends, of_decay=True)


def assign(alpha: jax.Array, chosen: Any) -> jax.Array:
    """Multipliers of matrices that are compared with each other, float32 [count]; the larger alpha has the larger one.

    linear: from `least` at the smallest alpha to `most` at the largest. rank: `least` plus the share of matrices with a smaller
    alpha of the range. sqrt, log2: alpha's, divided by their mean. sigmoid: 2 / (1 + exp(-4 z)), z the standardised alpha.
    Where all alphas are equal every multiplier is 1, or the nearest in the range. A matrix without an exponent, which is zero
    or has a flat spectrum, is not compared with others and has that multiplier too (chosen here: the papers' matrices all
    start normal, those that write to the stream start at zero in most placements of this project).
    """
    name, known = chosen.assign, alpha <= LARGEST
    low, high = jnp.min(jnp.where(known, alpha, jnp.inf)), jnp.max(jnp.where(known, alpha, -jnp.inf))
    if getattr(chosen, "reverse", False):
        alpha = low + high - alpha

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(known, x, 0)) / jnp.maximum(jnp.sum(known), 1)

    if name in ("sqrt", "log2"):
        values = jnp.sqrt(alpha) if name == "sqrt" else jnp.log2(alpha)
        return jnp.where(known, values / mean(values), 1.0)
    compared = known & (high > low)
    if name == "sigmoid":
        z = alpha - mean(alpha)
        z = z / jnp.where(compared, jnp.sqrt(mean(z * z)), 1)
        return jnp.where(compared, 2 / (1 + jnp.exp(-4 * z)), 1.0)
    if name == "rank":
        share = jnp.sum(known[None, :] & (alpha[:, None] > alpha[None, :]), axis=1) / jnp.maximum(jnp.sum(known), 1)
    else:
        share = (alpha - low) / jnp.where(compared, high - low, 1)
    alike = min(max(1.0, chosen.least), chosen.most)
    return jnp.where(compared, chosen.least * (1 - share) + chosen.most * share, alike)


def _matrices(chosen: Any, declared: Mapping[str, Parameter], ends: bool) -> Matrices:
    depth, rows, places = depth_of(declared, "matrix"), {}, []
    for path, parameter in declared.items():
        sizes = parameter.split or (parameter.shape[-1],) if parameter.shape else ()
        if parameter.role != "matrix" or min(parameter.shape[-2], *sizes) < chosen.smallest:
            continue
        own = parameter.positions or (-1,)
        taking = [i for i, place in enumerate(own) if ends or place not in (0, depth - 1)]
        if taking:
            rows[path] = np.array(taking)
            places += [own[i] for i in taking]
    if not rows:
        message = f"no matrix has {chosen.smallest} singular values and takes part; lower smallest"
        raise ConfigError([Problem("optimizer.layerwise.smallest", message, chosen.smallest)], source="the layerwise rate")
    return Matrices(rows, np.array(places))


def _build(
    chosen: Any,
    declared: Mapping[str, Parameter],
    *,
    ends: bool = True,
    ramp: int = 0,
    last: int | None = None,
    outer: tuple[str, ...] = (),
    untuned: str = "base",
    of_decay: bool = False,
) -> Layerwise:
    """The shared machine.

    Args:
      ends: whether the first and the last layer take part.
      ramp: steps of a ramp.
      last: last update that may measure; None: any. The first always does.
      outer: roles that get the largest multiplier of all.
      untuned: "least" if what is not compared gets the smallest multiplier of all, where the map fills a range, and the roles
        `outer` the largest; "base" if it gets 1.
      of_decay: multipliers of the decay, not of the rate.
    """
    matrices = _matrices(chosen, declared, ends)
    splits = {path: declared[path].split for path in matrices.rows if declared[path].split}
    all_paths = [path for path in declared if untuned == "least" or path in matrices.rows]

    def measure(weights: Mapping[str, jax.Array]) -> Multipliers:
        with jax.named_scope("hill_alpha"):
            found: Multipliers = {}
            for path in matrices.rows:
                parts = [
                    hill_alpha(block, method=chosen.method, window=chosen.window)
                    for block in blocks_of({path: weights[path]}, splits).values()
                ]
                mean = sum(parts) / len(parts)
                stacked = declared[path].stacked
                found[path] = jnp.mean(mean, axis=tuple(range(1 if stacked else 0, mean.ndim)))
            return found

    def targets(alpha: Multipliers) -> Multipliers:
        taking = jnp.concatenate([jnp.atleast_1d(alpha[path])[rows] for path, rows in matrices.rows.items()])
        values = _by_scope(taking, chosen, matrices.places)
        found = ones(declared, all_paths)
        if untuned == "least":
            if chosen.ranged:
                found = {path: jnp.full_like(leaf, jnp.min(values)) for path, leaf in found.items()}
            found |= {
                path: jnp.full_like(leaf, jnp.max(values)) for path, leaf in found.items() if declared[path].role in outer
            }
        start = 0
        for path, rows in matrices.rows.items():
            own = values[start : start + len(rows)]
            found[path] = found[path].at[rows].set(own) if declared[path].stacked else own[0]
            start += len(rows)
        return found

    def init(weights: Mapping[str, jax.Array]) -> LayerwiseState:
        del weights
        # Arrays of their own, since a donated buffer may not be given twice.
        unit, start, target = (ones(declared, all_paths) for _ in range(3))
        alpha = {path: 0 * leaf for path, leaf in ones(declared, matrices.rows).items()}
        inner = HeavyTailState(alpha, start, target, jnp.zeros((), jnp.int32))
        return LayerwiseState({}, unit, inner) if of_decay else LayerwiseState(unit, {}, inner)

    def update(seen: Seen, state: LayerwiseState) -> LayerwiseState:
        now = state.decay if of_decay else state.rate
        due = seen.count % chosen.interval == 0
        if last is not None:
            due &= seen.count <= last
        due |= seen.count == 1

        def measured(_: HeavyTailState) -> HeavyTailState:
            alpha = measure(seen.weights)
            return HeavyTailState(alpha, now, targets(alpha), seen.count)

        inner = jax.lax.cond(due, measured, lambda inner: inner, state.inner)
        x = jnp.clip((seen.count - inner.began) / ramp, 0.0, 1.0) if ramp else jnp.ones((), jnp.float32)
        values = {path: (1 - x) * inner.start[path] + x * inner.target[path] for path in all_paths}
        return LayerwiseState({}, values, inner) if of_decay else LayerwiseState(values, {}, inner)

    what = "decay" if of_decay else "rate"
    how = f"{chosen.least:g} to {chosen.most:g}" if chosen.ranged else f"{chosen.assign} of alpha"
    least = "least" if chosen.ranged else "1"
    words = {}
    for path in declared:
        if path in matrices.rows:
            words[path] = f"{chosen.name} of {what}, {how}"
        elif path in all_paths:
            words[path] = f"{chosen.name} {'most' if declared[path].role in outer else least}"
    return Layerwise(init, update, words)


def _by_scope(alpha: jax.Array, chosen: Any, places: np.ndarray) -> jax.Array:
    if getattr(chosen, "within", "model") == "model":
        return assign(alpha, chosen)
    values: jax.Array = jnp.ones_like(alpha)
    for place in np.unique(places):
        own = np.flatnonzero(places == place)
        values = values.at[own].set(assign(alpha[own], chosen))
    return values
