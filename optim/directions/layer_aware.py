"""Layer-aware Newton-Schulz: each layer's matrix takes as many steps as its spectrum needs (arXiv:2606.04058).

A configuration serves a matrix if the median of its normalised singular values passes the configuration's computed threshold
(`optim.directions.thresholds`): the paper's ablation loses nothing as long as half of the directions are served. One whose
threshold bfloat16 would round away runs in float32 on every device (`needs_float32`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optim import options
from optim.directions.blocks import Blocks, Orthogonalizer
from optim.directions.newton_schulz import newton_schulz, newton_schulz_leaves
from optim.directions.spectral_laws import bucket, laws
from optim.directions.thresholds import cheapest, configuration, needs_float32, threshold
from optim.kinds import kinds_of
from optim.layerwise.spectrum import quantile_index
from optim.options.newton_schulz import QUANTILES
from optim.roles import Parameter, depth_of
from optim.svd import singular_values
from strata import ConfigError, Problem


class MeasuredState(NamedTuple):
    """State of `measured`. Rows are layers; the second axis counts matrices of one layer: blocks, or more leading axes."""

    count: jax.Array  # int32[]: updates
    measured: jax.Array  # int32[]: measurements
    log_quantiles: dict[str, jax.Array]  # by path, float32 [rows, matrices, 5]: running mean of ln s_q, q as in QUANTILES
    choice: dict[str, jax.Array]  # by path, int32 [rows, matrices]: index of the candidate in use


# ---- predicted: static choices, grouped


def predicted_choices(chosen: options.Predicted, model: Mapping[str, Parameter]) -> dict[str, tuple[int, ...]]:
    """The candidate of each layer of each matrix by path, from the laws.

    Raises:
      ConfigError: a matrix of no known kind, or of a kind without a law.
    """
    kinds = kinds_of(model, chosen.kinds, "optimizer.direction.newton_schulz.kinds")
    size = chosen.model_size or sum(math.prod(parameter.shape) for parameter in model.values())
    depth, known = depth_of(model, "matrix"), laws(chosen.laws)
    for path, kind in kinds.items():
        if (kind, "mid") not in known:
            raise ConfigError([Problem(path, f"no law for matrices of kind {kind!r}")], source="the laws of spectra")
    return {
        path: tuple(
            cheapest(known[kinds[path], bucket(place, depth)].at(size), chosen.candidates, chosen.accept)
            for place in model[path].positions or (depth - 1,)
        )
        for path in kinds
    }


def predicted(chosen: options.Predicted, parameters: Any) -> Orthogonalizer:
    """The cheapest candidate that the predicted median passes, by layer; no state."""
    choices = predicted_choices(chosen, parameters.model)

    def apply(matrices: Blocks, momentum: Blocks, state: Any) -> tuple[Blocks, Any]:
        del momentum
        own = {}
        for name, x in matrices.items():
            whole = choices[_path(name)]
            # Under layer sampling the first layers may be missing.
            rows = whole[len(whole) - x.shape[0] :] if x.ndim > 2 else whole
            own[name] = rows
        return grouped(matrices, own, chosen.candidates, accept=chosen.accept), state

    return Orthogonalizer(lambda matrices: (), apply)


def grouped(
    matrices: Blocks,
    choices: Mapping[str, Sequence[int]],
    candidates: Sequence[str],
    *,
    accept: float = 0.6,
    dtype: Any = None,
) -> Blocks:
    """Newton-Schulz of every matrix with the candidate of its row; rows of one candidate are one batch a shape.

    Args:
      matrices: [rows, ..., m, n], or [m, n] with one choice.
      choices: for each, an index into `candidates` a row.
      candidates: names of configurations.
      accept: that of the thresholds, which decide what runs in float32.
      dtype: of the products inside where a candidate does not need float32, as in `newton_schulz`.
    """
    parts: dict[str, list[tuple[np.ndarray, jax.Array]]] = {name: [] for name in matrices}
    for index, candidate in enumerate(candidates):
        rows = {name: np.flatnonzero(np.asarray(choices[name]) == index) for name in matrices}
        for wide in (False, True):
            names = [
                name
                for name in matrices
                if len(rows[name]) and needs_float32(candidate, accept, *matrices[name].shape[-2:]) == wide
            ]
            taken = [matrices[name] if len(rows[name]) == len(choices[name]) else matrices[name][rows[name]] for name in names]
            done = newton_schulz_leaves(taken, configuration(candidate), dtype=jnp.float32 if wide else dtype)
            for name, y in zip(names, done, strict=True):
                parts[name].append((rows[name], y))
    found = {}
    for name, own in parts.items():
        if len(own) == 1:
            found[name] = own[0][1]
        else:
            order = np.argsort(np.concatenate([rows for rows, _ in own]))
            found[name] = jnp.concatenate([y for _, y in own])[order]
    return found


def summary_of(chosen: Any, parameter: Parameter, model: Mapping[str, Parameter]) -> str:
    """The configurations of a parameter's layers in words, such as "jordan4: 3 layers, deepseek10 in float32: 1 layers".

    "in float32" stands where a configuration does not run in bfloat16 on an accelerator either, for any block.
    """
    if not isinstance(chosen, options.Predicted | options.Measured):
        return chosen.name  # of a way of one's own no more is known

    def label(i: int) -> str:
        name = chosen.candidates[i]
        widths = parameter.split or parameter.shape[-1:]
        wide = any(needs_float32(name, chosen.accept, parameter.shape[-2], width) for width in widths)
        return f"{name} in float32" if wide else name

    if isinstance(chosen, options.Measured):
        return f"{chosen.name}: {label(len(chosen.candidates) - 1)} up to step {chosen.choose_at}"
    choices = predicted_choices(chosen, model)[parameter.path]
    counts = {label(i): choices.count(i) for i in sorted(set(choices))}
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name}: {count} layers" for name, count in counts.items())


# ---- measured: choices are state


def measured(chosen: options.Measured, parameters: Any) -> Orthogonalizer:
    """Follow the momentum's quantiles and choose from them.

    Every `every` updates the five quantiles of each matrix enter a running mean of their logarithms. At update `choose_at` each
    matrix takes the cheapest candidate whose threshold its quantile passes; until then, and without a measurement, the last one
    runs. Later checks, every `recheck` updates, change a choice only beyond `hysteresis`. Matrices run one at a time with a
    branch a candidate, so that fewer steps are less work although choices are state; nothing is compiled anew.
    """
    thresholds = [threshold(name, chosen.accept) for name in chosen.candidates]
    which = QUANTILES.index(chosen.quantile)

    def init(matrices: Blocks) -> MeasuredState:
        counts = {path: (rows, number) for path, rows, number in _counts(matrices, parameters)}
        logs = {path: jnp.zeros((*shape, len(QUANTILES)), jnp.float32) for path, shape in counts.items()}
        last = {path: jnp.full(shape, len(thresholds) - 1, jnp.int32) for path, shape in counts.items()}
        # Two arrays, since a donated buffer may not be given twice.
        return MeasuredState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), logs, last)

    def apply(matrices: Blocks, momentum: Blocks, state: MeasuredState) -> tuple[Blocks, MeasuredState]:
        count = state.count + 1
        due = count % chosen.every == 0

        def measure(before: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[jax.Array, dict[str, jax.Array]]:
            times, logs = before
            keep = jnp.where(times > 0, chosen.decay, 0.0)
            new = _log_quantiles(momentum, parameters)
            return times + 1, {path: keep * logs[path] + (1 - keep) * new[path] for path in logs}

        times, logs = jax.lax.cond(due, measure, lambda before: before, (state.measured, state.log_quantiles))
        choice = {path: _choose(logs[path][..., which], state.choice[path], count, times, thresholds, chosen) for path in logs}
        return switched(matrices, choice, chosen, parameters), MeasuredState(count, times, logs, choice)

    return Orthogonalizer(init, apply)


def _choose(
    log_value: jax.Array,
    current: jax.Array,
    count: jax.Array,
    times: jax.Array,
    thresholds: Sequence[float],
    chosen: options.Measured,
) -> jax.Array:
    def first_passed(factor: float) -> jax.Array:
        least = np.log(np.asarray(thresholds) * factor).astype(np.float32).reshape((1,) * log_value.ndim + (-1,))
        passed = log_value[..., None] >= least
        return jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), len(thresholds) - 1).astype(jnp.int32)

    fresh = first_passed(1.0)
    found = jnp.where((count == chosen.choose_at) & (times > 0), fresh, current)
    if chosen.recheck:
        again = (count > chosen.choose_at) & ((count - chosen.choose_at) % chosen.recheck == 0) & (times > 0)
        kept = jnp.clip(current, first_passed(1 / chosen.hysteresis), first_passed(chosen.hysteresis))
        found = jnp.where(again, kept, found)
    return found


def _path(name: str) -> str:
    return name.partition("[")[0]


def _rows(x: jax.Array, stacked: bool) -> jax.Array:
    """[rows, matrices, m, n] of a matrix or a stack."""
    shape = (x.shape[0], -1) if stacked else (1, -1)
    return x.reshape(*shape, *x.shape[-2:])


def _counts(matrices: Blocks, parameters: Mapping[str, Parameter]) -> list[tuple[str, int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name, x in matrices.items():
        path = _path(name)
        stacked = parameters[path].stacked
        rows = x.shape[0] if stacked else 1
        found[path] = (rows, found.get(path, (rows, 0))[1] + math.prod(x.shape[:-2]) // rows)
    return [(path, *counts) for path, counts in found.items()]


def _log_quantiles(momentum: Blocks, parameters: Mapping[str, Parameter]) -> dict[str, jax.Array]:
    found: dict[str, list[jax.Array]] = {}
    with jax.named_scope("spectral_quantiles"):
        for name, x in momentum.items():
            path = _path(name)
            s = singular_values(_rows(x, parameters[path].stacked))
            norm = jnp.sqrt(jnp.sum(s * s, axis=-1, keepdims=True))
            at = s[..., np.array([quantile_index(s.shape[-1], q) for q in QUANTILES])]
            logs = jnp.log(jnp.maximum(at, 1e-9 * norm)) - jnp.log(jnp.where(norm > 0, norm, 1))
            found.setdefault(path, []).append(jnp.where(norm > 0, logs, 0))
    return {path: jnp.concatenate(parts, axis=1) for path, parts in found.items()}


def switched(
    matrices: Blocks,
    choice: Mapping[str, jax.Array],
    chosen: options.Measured,
    parameters: Mapping[str, Parameter],
    *,
    dtype: Any = None,
) -> Blocks:
    """Newton-Schulz of one matrix after the other with the candidate that its state says; one loop a shape.

    Args:
      matrices, dtype: as in `grouped`.
      choice: as in `MeasuredState`.
      chosen: options.
      parameters: of the group by path.
    """

    def branches(m: int, n: int) -> list[Any]:
        wide = [needs_float32(name, chosen.accept, m, n) for name in chosen.candidates]
        return [
            functools.partial(newton_schulz, coefficients=configuration(name), dtype=jnp.float32 if own else dtype)
            for name, own in zip(chosen.candidates, wide, strict=True)
        ]

    groups: dict[Any, list[str]] = {}
    for name, x in matrices.items():
        groups.setdefault((*sorted(x.shape[-2:]), x.dtype), []).append(name)
    used: dict[str, int] = {}
    picked = {}
    for name, x in matrices.items():
        path = _path(name)
        number = _rows(x, parameters[path].stacked).shape[1]
        start = used.get(path, 0)
        picked[name], used[path] = choice[path][:, start : start + number].reshape(-1), start + number
    found: Blocks = {}
    for names in groups.values():
        wide = [x if x.shape[-2] <= x.shape[-1] else x.mT for x in (matrices[name] for name in names)]
        batch = jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in wide])
        which = jnp.concatenate([picked[name] for name in names])
        done = jax.lax.map(lambda pair, own=branches(*batch.shape[-2:]): jax.lax.switch(pair[0], own, pair[1]), (which, batch))
        start = 0
        for name, x in zip(names, wide, strict=True):
            size = math.prod(x.shape[:-2])
            part = done[start : start + size].reshape(x.shape)
            found[name], start = part if x.shape == matrices[name].shape else part.mT, start + size
    return {name: found[name] for name in matrices}
