"""Muon: momentum of a matrix, orthogonalised by Newton-Schulz (Keller Jordan 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import strata
from optim import options
from optim.directions.blocks import Orthogonalizer, blocks_of, fixed, joined, nuclear_scale
from optim.directions.layer_aware import summary_of
from optim.directions.newton_schulz import Polynomial, gram_is_cheaper, polynomials
from optim.options import ROLES
from optim.roles import Parameter, path_of
from optim.rules import Rule, check_numbers


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`."""

    momentum: Any  # tree of parameters: running mean of the gradient, float[..., m, n]
    steps: Any = ()  # of layer-aware Newton-Schulz; empty with the same steps for every matrix


def shape_factor(shape: Sequence[int], scaling: str | None, fan_in_axis: int = -2) -> float:
    """What the orthogonalised update is multiplied by.

    "jordan": sqrt(max(1, out / in)), as in the code of Muon. "moonlight": 0.2 sqrt(max(in, out)), which gives the update of
    a full-rank matrix the root mean square 0.2 that Adam's has (Liu et al. 2025, arXiv:2502.16982, section 2.2), so
    that Adam's rate and decay can be kept. None: 1.
    """
    if fan_in_axis not in (-1, -2):
        raise ValueError(f"fan_in_axis is one of the last two axes, -2 or -1, not {fan_in_axis}")
    inputs, outputs = shape[fan_in_axis], shape[-3 - fan_in_axis]
    if scaling is None:
        return 1.0
    if scaling == "jordan":
        return max(1.0, outputs / max(1, inputs)) ** 0.5  # 0 inputs: an empty matrix, of any scale
    if scaling == "moonlight":
        return 0.2 * max(inputs, outputs) ** 0.5
    raise ValueError(f"scaling is 'jordan', 'moonlight' or None, not {scaling!r}")


def scale_by_muon(
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    scaling: str | None = "jordan",
    coefficients: str | Sequence[Polynomial] = "jordan",
    steps: int | None = None,
    fan_in_axis: int = -2,
    form: str = "lmo",
    splits: Mapping[str, tuple[int, ...]] | None = None,
    orthogonalizer: Orthogonalizer | None = None,
) -> optax.GradientTransformation:
    """The direction of Muon, without rate or decay.

        b <- momentum b + (1 - momentum) g
        u  = momentum b + (1 - momentum) g  with Nesterov, b without
        direction = shape_factor newton_schulz(u)

    Args:
      momentum: decay of the running mean, not corrected for its start at 0 (Newton-Schulz ignores the scale). The form
        `b <- momentum b + g` gives the same direction.
      nesterov: look ahead by one step.
      scaling, fan_in_axis: as in `shape_factor`.
      coefficients, steps: as in `optim.newton_schulz`.
      form: "lmo", or "sharp" for `shape_factor |u|_* newton_schulz(u)`, the sharp operator of arXiv:2510.02239, with the
        nuclear norm as `<u, newton_schulz(u)>` (Jordan's five steps make it about 15 % low).
      splits: sizes of the blocks of a parameter's last axis that are matrices of their own, by dotted path.
      orthogonalizer: layer-aware Newton-Schulz in place of `coefficients` and `steps`.

    Returns:
      A transformation over any tree of float [..., m, n], each matrix of the last two axes by itself.

    Raises:
      ValueError: wrong coefficients or scaling; at `init`, a leaf with fewer than two axes, by name.

    optax.contrib.muon differs: it corrects the mean for its start and looks ahead as NAdam does.
    """
    orthogonal = orthogonalizer or fixed(polynomials(coefficients, steps))
    shape_factor((1, 1), scaling, fan_in_axis)
    if form not in ("lmo", "sharp"):
        raise ValueError(f"form is 'lmo' or 'sharp', not {form!r}")
    splits = splits or {}

    def init(params: Any) -> ScaleByMuonState:
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.ndim(leaf) < 2:
                raise ValueError(f"Muon takes matrices [..., m, n]; {path_of(keys)} has shape {jnp.shape(leaf)}")
        return ScaleByMuonState(jax.tree.map(jnp.zeros_like, params), orthogonal.init(blocks_of(params, splits)))

    def update(updates: Any, state: ScaleByMuonState, params: Any = None) -> tuple[Any, ScaleByMuonState]:
        del params
        mean, ahead = look_ahead(state.momentum, updates, momentum, nesterov)
        matrices = blocks_of(ahead, splits)
        polar, steps_state = orthogonal.apply(matrices, blocks_of(mean, splits), state.steps)
        scaled = {}
        for name, x in polar.items():
            factor = shape_factor(x.shape, scaling, fan_in_axis)
            if form == "sharp":
                factor = (factor * nuclear_scale(matrices[name], x)).astype(x.dtype)
            scaled[name] = x * factor
        return joined(updates, scaled, splits), ScaleByMuonState(mean, steps_state)

    return optax.GradientTransformation(init, update)


def look_ahead(momentum: Any, gradients: Any, decay: float, nesterov: bool) -> tuple[Any, Any]:
    """The new running mean of the gradient, and the mean one step ahead with Nesterov."""
    mean = jax.tree.map(lambda b, g: decay * b + (1 - decay) * g, momentum, gradients)
    return mean, jax.tree.map(lambda b, g: decay * b + (1 - decay) * g, mean, gradients) if nesterov else mean


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    scaling: str | None = "jordan",
    coefficients: str | Sequence[Polynomial] = "jordan",
    steps: int | None = 5,
    fan_in_axis: int = -2,
) -> optax.GradientTransformationExtraArgs:
    """Muon as a plain optax transformation over any tree of [..., m, n].

        w <- w - rate (shape_factor newton_schulz(u) + weight_decay w)

    Give it hidden matrices only: embeddings, heads, gains and biases need another rule (`optim.build` sees to that, or
    `optax.partition`). Arguments and errors are those of `scale_by_muon`; `weight_decay` is decoupled and multiplies
    the rate; a number out of the bounds of `optim.options.Muon` is a `ConfigError`. Sources: Jordan 2024; Liu et al. 2025,
    arXiv:2502.16982, for decay and "moonlight".
    """
    check_numbers(options.Muon, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
    return optax.chain(
        scale_by_muon(
            momentum, nesterov=nesterov, scaling=scaling, coefficients=coefficients, steps=steps, fan_in_axis=fan_in_axis
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def rules(chosen: options.Muon, *, roles: tuple[str, ...] = ROLES, name: str = "all") -> tuple[Rule, ...]:
    """Matrices by Muon (group "matrix"), everything else by the direction `rest` (group "rest")."""
    if "matrix" not in roles:
        raise ValueError(f"{name}: Muon is for matrices, and {', '.join(roles)} are none")

    def transformation(parameters: Mapping[str, Parameter]) -> optax.GradientTransformation:
        return scale_by_muon(
            chosen.momentum,
            nesterov=chosen.nesterov,
            scaling=chosen.scaling,
            coefficients=chosen.polynomials,
            steps=chosen.iterations,
            form=chosen.form,
            splits={path: parameter.split for path, parameter in parameters.items() if parameter.split},
            orthogonalizer=layer_aware(chosen, parameters),
        )

    return matrix_rules(chosen, transformation, roles)


def layer_aware(chosen: options.Muon | options.NorMuon, parameters: Mapping[str, Parameter]) -> Orthogonalizer | None:
    """The layer-aware Newton-Schulz that the options ask for; None for the same steps everywhere."""
    if chosen.newton_schulz is None:
        return None
    return strata.implementation(chosen.newton_schulz)(chosen.newton_schulz, parameters)


def matrix_rules(chosen: options.Muon | options.NorMuon, transformation: Any, roles: tuple[str, ...]) -> tuple[Rule, ...]:
    """The rule of matrices, and those of the direction for the rest."""

    def summary(parameter: Parameter, model: Mapping[str, Parameter]) -> str:
        if chosen.newton_schulz is not None:
            return summary_of(chosen.newton_schulz, parameter, model)
        count = len(polynomials(chosen.polynomials, chosen.iterations))
        widths = parameter.split or parameter.shape[-1:]
        forms = {"gram" if gram_is_cheaper(parameter.shape[-2], width, count) else "plain" for width in widths}
        form = " and ".join(sorted(forms))
        blocks = f" in {len(parameter.split)} blocks" if parameter.split else ""
        name = "own" if chosen.triples else chosen.coefficients
        return f"{name} x{count} {form}{blocks}"

    matrices = Rule(
        name="matrix",
        roles=("matrix",),
        direction=transformation,
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        decay_roles=("matrix",),
        newton_schulz=summary,
        schedule=chosen.schedule,
    )
    others = tuple(role for role in roles if role != "matrix")
    return (matrices, *strata.implementation(chosen.rest)(chosen.rest, roles=others, name="rest"))
