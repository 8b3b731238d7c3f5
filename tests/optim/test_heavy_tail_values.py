"""Hill's estimator and the maps from alpha to multipliers by their formulas, and multipliers that follow the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optim
from optim.layerwise.heavy_tail import assign
from optim.options import LLR

ALPHA = np.array([3.0, 2.0, 7.0, 2.5])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sqrt", np.sqrt(ALPHA) / np.sqrt(ALPHA).mean()),
        ("log2", np.log2(ALPHA) / np.log2(ALPHA).mean()),
        ("sigmoid", 2 / (1 + np.exp(-4 * (ALPHA - ALPHA.mean()) / ALPHA.std()))),
    ],
)
def test_a_map_around_one_is_its_formula(name, expected):
    found = assign(jnp.asarray(ALPHA, jnp.float32), LLR(assign=name))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    mirrored = assign(jnp.asarray(9 - ALPHA, jnp.float32), LLR(assign=name, reverse=True))
    np.testing.assert_allclose(mirrored, expected, rtol=1e-5)


def released(s):
    """The exponent with the threshold counted in its own tail, as in the released code."""
    logs = np.sort(np.log(np.square(s)))  # ascending
    start = len(logs) // 2
    tail = logs[start:] - logs[start]
    return 1 + len(tail) / tail.sum()


@pytest.mark.parametrize(("count", "tail"), [(11, 6), (3, 2)])
def test_of_an_odd_number_of_values_the_released_tail_is_the_larger_half(count, tail):
    s = np.random.default_rng(0).random(count) + 0.1
    logs = np.sort(np.log(s**2))
    over = np.sum(logs[-tail:] - logs[-tail])
    w = jnp.diag(jnp.asarray(s, jnp.float32))
    assert float(optim.hill_alpha(w)) == pytest.approx(1 + tail / over, rel=1e-5) == pytest.approx(released(s), rel=1e-5)
    # The same threshold, which a text book does not count.
    assert float(optim.hill_alpha(w, method="textbook")) == pytest.approx(1 + (tail - 1) / over, rel=1e-5)


class Layers(nnx.Module):
    def __init__(self, up):
        self.up = nnx.Param(up, role="matrix", axes=("layer", "embed", "mlp"))


def spectra(*powers):
    return [np.arange(1.0, 12) ** -power for power in powers]


@pytest.mark.parametrize(
    ("layerwise", "what"), [({"name": "temp_balance", "ends": True}, "rate"), ({"name": "alpha_decay"}, "decay")]
)
def test_multipliers_follow_the_weights_at_every_interval_and_stay_in_between(layerwise, what):
    first, then = spectra(0.3, 0.6, 0.4), spectra(0.9, 0.5, 0.35)
    given = [first, then, then, first, first, first, then]  # to updates 1 to 7; measured at 1, 3 and 6
    measured = [first, first, then, then, then, first, first]

    def stack(s):
        return jnp.stack([jnp.diag(jnp.asarray(own, jnp.float32)) for own in s])

    least, most = {"rate": (0.5, 1.5), "decay": (0.6666, 5.0)}[what]
    config = {"direction": {"name": "adamw"}, "schedule": {"name": "constant"}}
    tx = optim.build(config | {"layerwise": {"smallest": 4, "interval": 3, **layerwise}}, Layers(stack(first)), steps=7)
    state, update = tx.init({"up": stack(first)}), jax.jit(tx.update)
    for weights, seen in zip(given, measured, strict=True):
        _, state = update({"up": jnp.ones((3, 11, 11))}, state, {"up": stack(weights)})
        alpha = np.array([released(s) for s in seen])
        right = least + (most - least) * (alpha - alpha.min()) / (alpha.max() - alpha.min())
        np.testing.assert_allclose(optim.multipliers(state)[what]["up"], right, rtol=1e-4)
