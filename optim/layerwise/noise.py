"""Rates by gradient noise: LANTON (arXiv:2510.14009). No code is public; the options say what is recalled or chosen here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim import options
from optim.directions.lmo import dual_norm, norm_of
from optim.layerwise.multipliers import Layerwise, LayerwiseState, Multipliers, Seen, along, ones
from optim.roles import Parameter


class NoiseState(NamedTuple):
    """State of `lanton`."""

    noise: Multipliers  # H by path: running mean of the squared dual norm of a difference of gradients
    times: dict[str, jax.Array]  # how often each layer was measured, int32 [layers] or [] by path
    previous: dict[str, jax.Array]  # the gradient before, by path; empty with the independent estimator
    known: dict[str, jax.Array]  # whether there is one, bool [layers] or [] by path


def multipliers_of(noise: jax.Array, chosen: options.LANTON, times: jax.Array | None = None) -> jax.Array:
    """`(a / max a) ** power` with `a = A / sqrt(A^2 + H)`, over the layers of one group, float32 [count] in (0, 1].

    A is `floor`, or `floor` times the root of the mean H. With the power 1/2 and H far above A^2 the multiplier is
    (min H / H)^(1/4); without any noise it is 1.

    Args:
      noise: H of each layer, float32 [count].
      chosen: options.
      times: how often each was measured, int32 [count]; None: all equally often. H starts at 0, so that after n measurements
        it has the share 1 - b2^n of the noise: each is taken for what it would be after as many as the layer that has most,
        which changes nothing where all have as many. A layer without any has multiplier 1 and no say in min and mean.
    """
    known = jnp.ones(noise.shape, bool) if times is None else times > 0
    if times is not None:
        share = 1 - jnp.float32(chosen.b2) ** times.astype(jnp.float32)
        noise = noise * (jnp.max(share) / jnp.where(known, share, 1))
    mean = jnp.sum(jnp.where(known, noise, 0)) / jnp.maximum(jnp.sum(known), 1)
    least = jnp.min(jnp.where(known, noise, jnp.inf))
    square = jnp.float32(chosen.floor**2) * (mean if chosen.floor_of == "group" else 1.0)
    # a / max a does not change when both H and A are multiplied; dividing keeps squares in range.
    ratio = (square + least) / jnp.where(square + noise > 0, square + noise, 1)
    return jnp.where(known & (square + noise > 0), jnp.sqrt(ratio), 1.0) ** chosen.power


def lanton(chosen: options.LANTON, declared: Mapping[str, Parameter], groups: Any, steps: int | None) -> Layerwise:
    """LANTON: layers with noisier gradients than the calmest of their group take smaller steps.

        H <- b2 H + (1 - b2) |G - G'|_*^2        dual norm of the group's norm (see `optim.directions.lmo`); from 0
        multiplier = (a / max a) ** power        max over the layers of the group

    G' is the gradient before ("consecutive": twice the noise plus the drift of the gradient), or one of independent data at the
    same weights ("independent"). Groups are matrices, tables (embedding, head), vectors and scalars, and factors; the only
    layer of a group has multiplier 1. Gradients are those after clipping. Under layer sampling a layer that is not active is
    not measured, and its difference is to the gradient of its last update; layers that were measured less often are brought to
    the same footing (`multipliers_of`).
    """
    del groups, steps
    members: dict[str, list[str]] = {}
    for path, parameter in declared.items():
        group = "factor" if parameter.role == "factor" else norm_of(parameter.role)
        members.setdefault(group, []).append(path)
    members = {group: paths for group, paths in members.items() if sum(declared[path].layers for path in paths) > 1}
    paths = [path for own in members.values() for path in own]
    consecutive = chosen.estimator == "consecutive"

    def squares(difference: Mapping[str, jax.Array]) -> Multipliers:
        with jax.named_scope("gradient_noise"):
            return {
                path: dual_norm(
                    difference[path],
                    norm_of(declared[path].role),
                    stacked=declared[path].stacked,
                    split=declared[path].split,
                    nuclear=chosen.nuclear,
                )
                ** 2
                for path in paths
            }

    def init(weights: Mapping[str, jax.Array]) -> LayerwiseState:
        unit = ones(declared, paths)
        noise = {path: jnp.zeros_like(leaf) for path, leaf in unit.items()}
        times = {path: jnp.zeros(leaf.shape, jnp.int32) for path, leaf in unit.items()}
        previous = {path: jnp.zeros_like(weights[path]) for path in paths} if consecutive else {}
        known = {path: jnp.zeros(leaf.shape, bool) for path, leaf in unit.items()} if consecutive else {}
        return LayerwiseState(unit, {}, NoiseState(noise, times, previous, known))

    def update(seen: Seen, state: LayerwiseState) -> LayerwiseState:
        inner: NoiseState = state.inner
        active = {path: jnp.asarray(seen.active.get(path, True)) for path in paths}
        if consecutive:
            measured = {path: active[path] & inner.known[path] for path in paths}
            difference = {path: seen.gradients[path] - inner.previous[path] for path in paths}
        else:
            if seen.difference is None:
                raise ValueError("LANTON's independent estimator needs update(..., gradient_difference=)")
            measured, difference = active, seen.difference

        def due(before: tuple[Multipliers, dict[str, jax.Array]]) -> tuple[Multipliers, dict[str, jax.Array]]:
            noise, times = before
            found = squares(difference)
            new = {path: chosen.b2 * noise[path] + (1 - chosen.b2) * found[path] for path in paths}
            return (
                {path: jnp.where(measured[path], new[path], noise[path]) for path in paths},
                {path: times[path] + measured[path] for path in paths},
            )

        before = (inner.noise, inner.times)
        first = 2 if consecutive else 1
        now = (seen.count % chosen.interval == 0) | (seen.count == first)
        noise, times = jax.lax.cond(now, due, lambda before: before, before) if chosen.interval > 1 else due(before)
        if consecutive:
            previous = {
                path: jnp.where(along(active[path], seen.gradients[path]), seen.gradients[path], inner.previous[path])
                if path in seen.active
                else seen.gradients[path]
                for path in paths
            }
            inner = NoiseState(noise, times, previous, {path: inner.known[path] | active[path] for path in paths})
        else:
            inner = NoiseState(noise, times, {}, {})
        return LayerwiseState(_by_group(noise, times), {}, inner)

    def _by_group(noise: Multipliers, times: Mapping[str, jax.Array]) -> Multipliers:
        rate: Multipliers = {}
        for own in members.values():
            found, counts = (jnp.concatenate([of[path].reshape(-1) for path in own]) for of in (noise, times))
            values = multipliers_of(found, chosen, counts)
            start = 0
            for path in own:
                rate[path] = values[start : start + noise[path].size].reshape(noise[path].shape)
                start += noise[path].size
        return rate

    words = {path: f"lanton {group}" for group, own in members.items() for path in own}
    return Layerwise(init, update, words)
