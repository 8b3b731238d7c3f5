"""NorMuon: Muon whose output neurons are brought to one scale (Li et al. 2025, arXiv:2510.05491)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim import options
from optim.directions.blocks import Orthogonalizer, blocks_of, fixed, joined
from optim.directions.muon import layer_aware, look_ahead, matrix_rules, shape_factor
from optim.directions.newton_schulz import Polynomial, polynomials
from optim.options import ROLES
from optim.roles import Parameter
from optim.rules import Rule, check_numbers


class ScaleByNorMuonState(NamedTuple):
    """State of `scale_by_normuon`."""

    momentum: Any  # tree of parameters: running mean of the gradient, float[..., in, out]
    second: Any  # tree of parameters: running mean of the squared update of each output neuron, float32[..., out]
    steps: Any = ()  # of layer-aware Newton-Schulz


def scale_by_normuon(
    momentum: float = 0.95,
    b2: float = 0.95,
    *,
    epsilon: float = 1e-10,
    nesterov: bool = True,
    scaling: str | None = "rms",
    coefficients: str | Sequence[Polynomial] = "jordan",
    steps: int | None = None,
    splits: Mapping[str, tuple[int, ...]] | None = None,
    orthogonalizer: Orthogonalizer | None = None,
) -> optax.GradientTransformation:
    """The direction of NorMuon, without rate or decay.

        O  = newton_schulz(u)                                u as in Muon
        v <- b2 v + (1 - b2) mean_in(O^2)                    one number an output neuron, from 0, without correction
        O' = O / (sqrt(v) + epsilon)
        direction = 0.2 sqrt(m n) O' / |O'|                  scaling "rms", the paper
                    shape_factor |O| O' / |O'|               "jordan", the code; "moonlight"; None

    Args:
      scaling: as above. Every other argument is one of `optim.scale_by_muon`, but matrices are stored [..., in, out].
    """
    orthogonal = orthogonalizer or fixed(polynomials(coefficients, steps))
    splits = splits or {}

    def init(params: Any) -> ScaleByNorMuonState:
        neurons = jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], p.shape[-1]), jnp.float32), params)
        return ScaleByNorMuonState(jax.tree.map(jnp.zeros_like, params), neurons, orthogonal.init(blocks_of(params, splits)))

    def update(updates: Any, state: ScaleByNorMuonState, params: Any = None) -> tuple[Any, ScaleByNorMuonState]:
        del params
        mean, ahead = look_ahead(state.momentum, updates, momentum, nesterov)
        polar, inner = orthogonal.apply(blocks_of(ahead, splits), blocks_of(mean, splits), state.steps)
        before = blocks_of(state.second, splits)
        moved, second = {}, {}
        for name, o in polar.items():
            o32 = o.astype(jnp.float32)
            second[name] = b2 * before[name] + (1 - b2) * jnp.mean(o32 * o32, axis=-2)
            even = o32 / (jnp.sqrt(second[name]) + epsilon)[..., None, :]
            norm = _norm(even)
            inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
            if scaling == "rms":
                size = 0.2 * (o.shape[-2] * o.shape[-1]) ** 0.5
            else:
                size = shape_factor(o.shape, scaling) * _norm(o32)
            moved[name] = (even * inverse * size).astype(o.dtype)
        return joined(updates, moved, splits), ScaleByNorMuonState(mean, joined(state.second, second, splits), inner)

    return optax.GradientTransformation(init, update)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def normuon(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """NorMuon as a plain optax transformation over any tree of [..., in, out]; arguments as of `scale_by_normuon`."""
    bounded = {name: value for name, value in arguments.items() if name in ("momentum", "b2", "epsilon")}
    check_numbers(options.NorMuon, learning_rate=learning_rate, weight_decay=weight_decay, **bounded)
    return optax.chain(
        scale_by_normuon(**arguments),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def rules(chosen: options.NorMuon, *, roles: tuple[str, ...] = ROLES, name: str = "all") -> tuple[Rule, ...]:
    """Matrices by NorMuon (group "matrix"), everything else by the direction `rest` (group "rest")."""
    if "matrix" not in roles:
        raise ValueError(f"{name}: NorMuon is for matrices, and {', '.join(roles)} are none")

    def transformation(parameters: Mapping[str, Parameter]) -> optax.GradientTransformation:
        return scale_by_normuon(
            chosen.momentum,
            chosen.b2,
            epsilon=chosen.epsilon,
            nesterov=chosen.nesterov,
            scaling=chosen.scaling,
            coefficients=chosen.polynomials,
            steps=chosen.iterations,
            splits={path: parameter.split for path, parameter in parameters.items() if parameter.split},
            orthogonalizer=layer_aware(chosen, parameters),
        )

    return matrix_rules(chosen, transformation, roles)
