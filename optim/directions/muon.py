"""Muon: momentum of a matrix, orthogonalised by Newton-Schulz (Keller Jordan 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import strata
from optim import options
from optim.directions.newton_schulz import Polynomial, gram_is_cheaper, newton_schulz_leaves, polynomials
from optim.options import ROLES
from optim.roles import Parameter, path_of
from optim.rules import Rule


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`."""

    momentum: Any  # tree of parameters: running mean of the gradient, float[..., m, n]


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
        return max(1.0, outputs / inputs) ** 0.5
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

    Returns:
      A transformation over any tree of float [..., m, n], each matrix of the last two axes by itself.

    Raises:
      ValueError: wrong coefficients or scaling; at `init`, a leaf with fewer than two axes, by name.

    optax.contrib.muon differs: it corrects the mean for its start and looks ahead as NAdam does.
    """
    chosen = polynomials(coefficients, steps)
    shape_factor((1, 1), scaling, fan_in_axis)

    def init(params: Any) -> ScaleByMuonState:
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.ndim(leaf) < 2:
                raise ValueError(f"Muon takes matrices [..., m, n]; {path_of(keys)} has shape {jnp.shape(leaf)}")
        return ScaleByMuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: ScaleByMuonState, params: Any = None) -> tuple[Any, ScaleByMuonState]:
        del params
        mean = jax.tree.map(lambda b, g: momentum * b + (1 - momentum) * g, state.momentum, updates)
        ahead = jax.tree.map(lambda b, g: momentum * b + (1 - momentum) * g, mean, updates) if nesterov else mean
        leaves, structure = jax.tree.flatten(ahead)
        scaled = [x * shape_factor(x.shape, scaling, fan_in_axis) for x in newton_schulz_leaves(leaves, chosen)]
        return jax.tree.unflatten(structure, scaled), ScaleByMuonState(mean)

    return optax.GradientTransformation(init, update)


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
    the rate. Sources: Jordan 2024; Liu et al. 2025, arXiv:2502.16982, for decay and "moonlight".
    """
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

    def transformation(parameters: Any) -> optax.GradientTransformation:
        return scale_by_muon(
            chosen.momentum,
            nesterov=chosen.nesterov,
            scaling=chosen.scaling,
            coefficients=chosen.coefficients,
            steps=chosen.iterations,
        )

    def summary(parameter: Parameter) -> str:
        count = len(polynomials(chosen.coefficients, chosen.iterations))
        form = "gram" if gram_is_cheaper(*parameter.shape[-2:], count) else "plain"
        return f"{chosen.coefficients} x{count} {form}"

    matrices = Rule(
        name="matrix",
        roles=("matrix",),
        direction=transformation,
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        decay_roles=("matrix",),
        newton_schulz=summary,
    )
    others = tuple(role for role in roles if role != "matrix")
    return (matrices, *strata.implementation(chosen.rest)(chosen.rest, roles=others, name="rest"))
