"""Momentum through the linear minimisation oracle of a norm: the direction of unit norm that the momentum falls along most.

| roles | norm of W [in, out] | dual norm | direction |
|---|---|---|---|
| matrix | sqrt(in / out) sigma_max | sqrt(out / in) nuclear norm | sqrt(out / in) U V^T |
| embedding, head, table | largest entry | sum of absolute entries | sign |
| everything else | root mean square | sqrt(entries) Frobenius norm | sqrt(entries) B / norm of B |

One layer of a stacked parameter is one matrix (several, where it declares `split`), or one vector. Sources: arXiv:2502.07529;
the assignment is that of LANTON, arXiv:2510.14009 (second hand), whose duals follow from the definitions. Factors count as
vectors here, a choice of this project.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim import options
from optim.directions.blocks import split_last
from optim.directions.newton_schulz import newton_schulz
from optim.options import ROLES
from optim.rules import Rule, check_numbers
from optim.svd import singular_values

TABLES = ("embedding", "head", "table")


def norm_of(role: str) -> str:
    """The norm that a role is measured in: "spectral", "largest" or "rms"."""
    return "spectral" if role == "matrix" else "largest" if role in TABLES else "rms"


def entries(x: jax.Array, stacked: bool) -> tuple[int, ...]:
    """The axes of one layer."""
    return tuple(range(1 if stacked else 0, x.ndim))


def dual_norm(
    x: jax.Array,
    norm: str,
    *,
    stacked: bool = False,
    split: tuple[int, ...] = (),
    nuclear: str = "exact",
    coefficients: str = "jordan",
) -> jax.Array:
    """The dual of a norm, float32 [layers] for a stacked array and [] for another.

    Args:
      x: an array; of the spectral norm [layers, ..., in, out].
      norm: as `norm_of` gives.
      split: of the spectral norm, sizes of blocks of the last axis that are matrices of their own: the largest of their norms
        is that of the whole, and its dual the sum of theirs.
      nuclear: "exact" by singular values; "newton_schulz" for `<x, newton_schulz(x)>`, 13 to 18 % low with Jordan's polynomial
        and nearly the same on every matrix; "bound", the root of the rank times the Frobenius norm, which is at least the
        nuclear norm.
    """
    x = x.astype(jnp.float32)
    axes = entries(x, stacked)
    if norm == "largest":
        return jnp.sum(jnp.abs(x), axis=axes)
    size = 1
    for axis in axes:
        size *= x.shape[axis]
    if norm == "rms":
        return jnp.sqrt(size * jnp.sum(x * x, axis=axes))
    if len(split) > 1:
        own = {"stacked": stacked, "nuclear": nuclear, "coefficients": coefficients}
        return sum(dual_norm(block, norm, **own) for block in split_last(x, split))
    rank, factor = min(x.shape[-2:]), (x.shape[-1] / x.shape[-2]) ** 0.5
    if nuclear == "exact":
        values = jnp.sum(singular_values(x), axis=-1)
    elif nuclear == "bound":
        values = jnp.sqrt(rank * jnp.sum(x * x, axis=(-2, -1)))
    else:
        values = jnp.sum(x * newton_schulz(x, coefficients), axis=(-2, -1))
    return factor * jnp.sum(values, axis=tuple(range(1 if stacked else 0, values.ndim)))


def direction_of(
    x: jax.Array, norm: str, *, stacked: bool = False, split: tuple[int, ...] = (), coefficients: str = "jordan"
) -> jax.Array:
    """The direction of unit norm with the largest product with `x`; arguments as in `dual_norm`."""
    if norm == "largest":
        return jnp.sign(x)
    if norm == "spectral":
        if len(split) > 1:
            return jnp.concatenate([direction_of(block, norm, coefficients=coefficients) for block in split_last(x, split)], -1)
        return newton_schulz(x, coefficients) * (x.shape[-1] / x.shape[-2]) ** 0.5
    axes = entries(x, stacked)
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32 * x32, axis=axes, keepdims=True)
    return (x32 * jnp.where(mean > 0, jax.lax.rsqrt(jnp.where(mean > 0, mean, 1)), 0)).astype(x.dtype)


def lmo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    norm: str = "spectral",
    momentum: float = 0.95,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    coefficients: str = "jordan",
) -> optax.GradientTransformationExtraArgs:
    """Momentum through the oracle of one norm as a plain optax transformation over any tree (arXiv:2502.07529).

        m <- momentum m + g
        w <- w - rate (direction of unit norm with the largest product with m + weight_decay w)

    Args:
      learning_rate: a number or a schedule of optax.
      norm: "spectral", of leaves [..., in, out] whose every matrix is one; "largest" or "rms", of whole leaves.
      momentum, nesterov, coefficients: as in `optim.options.LMO`.
      weight_decay: decoupled, times the rate.

    Raises:
      ConfigError: a number out of the bounds of `optim.options.LMO`.
      ValueError: another norm.
    """
    if norm not in ("spectral", "largest", "rms"):
        raise ValueError(f"norm is 'spectral', 'largest' or 'rms', not {norm!r}")
    check_numbers(options.LMO, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)

    def unit(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda x: direction_of(x, norm, coefficients=coefficients), updates)

    return optax.chain(
        optax.trace(momentum, nesterov),
        optax.stateless(unit),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def rules(chosen: options.LMO, *, roles: tuple[str, ...] = ROLES, name: str = "all") -> tuple[Rule, ...]:
    """A group a norm: "matrix", "table", "vector"."""
    groups = (
        ("matrix", ("matrix",), chosen.learning_rate),
        ("table", TABLES, chosen.table_learning_rate),
        ("vector", ("factor", "vector", "scalar"), chosen.vector_learning_rate),
    )

    def direction(parameters: Any) -> optax.GradientTransformation:
        def unit(updates: Any, params: Any = None) -> Any:
            return {
                path: direction_of(
                    x,
                    norm_of(parameters[path].role),
                    stacked=parameters[path].stacked,
                    split=parameters[path].split,
                    coefficients=chosen.coefficients,
                )
                for path, x in updates.items()
            }

        # The scale of the momentum does not matter, so it is a sum.
        return optax.chain(optax.trace(chosen.momentum, chosen.nesterov), optax.stateless(unit))

    return tuple(
        Rule(
            name=label if name == "all" else f"{name}_{label}",
            roles=tuple(role for role in own if role in roles),
            direction=direction,
            learning_rate=rate,
            weight_decay=chosen.weight_decay,
            decay_roles=chosen.decay_roles,
            newton_schulz=lambda parameter, model: chosen.coefficients if parameter.role == "matrix" else "",
            schedule=chosen.schedule,
        )
        for label, own, rate in groups
        if set(own) & set(roles)
    )
