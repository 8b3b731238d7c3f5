"""Muon against an independent NumPy implementation, and what must not change it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from optim.directions.muon import scale_by_muon, shape_factor
from strata import ConfigError


def reference(weight, gradients, *, rate, momentum, nesterov, decay, factor):
    """Muon for one matrix [in, out] in float64, after Jordan's formula, by products only."""
    w, b = np.asarray(weight, np.float64), np.zeros(weight.shape)
    tall = w.shape[0] > w.shape[1]
    for g in gradients:
        g = np.asarray(g, np.float64)
        b = momentum * b + (1 - momentum) * g
        x = momentum * b + (1 - momentum) * g if nesterov else b
        x = x.T if tall else x
        x = x / np.sqrt((x * x).sum())
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if tall else x
        w = w - rate * (factor * x + decay * w)
    return w


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def after(tx, weight, gradients):
    state = tx.init(weight)
    update = jax.jit(tx.update)
    for g in gradients:
        moved, state = update(g, state, weight)
        weight = optax.apply_updates(weight, moved)
    return weight


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("shape", "scaling"), [((12, 12), None), ((8, 20), "jordan"), ((20, 8), "jordan"), ((8, 20), "moonlight")]
)
def test_ten_steps_equal_an_independent_float64_implementation(shape, scaling, nesterov):
    weight, gradients = normal(*shape), [normal(*shape, seed=k) for k in range(1, 11)]
    factor = {None: 1.0, "jordan": max(1, shape[1] / shape[0]) ** 0.5, "moonlight": 0.2 * max(shape) ** 0.5}[scaling]
    tx = optim.muon(0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1, scaling=scaling)
    expected = reference(weight, gradients, rate=0.02, momentum=0.9, nesterov=nesterov, decay=0.1, factor=factor)
    np.testing.assert_allclose(after(tx, weight, gradients), expected, atol=2e-5)


def test_stacked_matrices_equal_separate_ones():
    weight, gradients = normal(3, 8, 20), [normal(3, 8, 20, seed=k) for k in range(1, 5)]
    together = after(optim.muon(0.1), weight, gradients)
    for layer in range(3):
        apart = after(optim.muon(0.1), weight[layer], [g[layer] for g in gradients])
        np.testing.assert_allclose(together[layer], apart, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
def test_moonlight_scaling_gives_an_update_of_root_mean_square_0p2(shape):
    # An orthogonal matrix has all singular values 1, which the convergent quintic keeps.
    q, _ = np.linalg.qr(np.asarray(normal(max(shape), min(shape))))
    g = jnp.asarray(q if shape[0] >= shape[1] else q.T)
    tx = optim.muon(1.0, scaling="moonlight", coefficients=[(2, -1.5, 0.5)], steps=12)
    moved, _ = tx.update(g, tx.init(g), g)
    assert np.sqrt(np.mean(np.square(moved))) == pytest.approx(0.2, rel=1e-3)


def test_the_fan_in_axis_tells_how_a_matrix_is_stored():
    assert shape_factor((3, 4, 16), "jordan") == 2.0 and shape_factor((3, 16, 4), "jordan") == 1.0
    weight, gradients = normal(2, 4, 16), [normal(2, 4, 16, seed=1)]
    stored_out_in = after(optim.muon(0.1, fan_in_axis=-1), weight.mT, [g.mT for g in gradients])
    np.testing.assert_allclose(stored_out_in.mT, after(optim.muon(0.1), weight, gradients), atol=1e-6)


def test_decay_alone_shrinks_a_weight_by_the_rate_times_it():
    weight = normal(4, 6)
    np.testing.assert_allclose(
        after(optim.muon(0.5, weight_decay=0.1), weight, [jnp.zeros((4, 6))]), weight * (1 - 0.05), rtol=1e-6
    )


def test_the_first_update_equals_optax_without_nesterov():
    g = normal(8, 20)
    ours, _ = scale_by_muon(nesterov=False).update(g, scale_by_muon().init(g))
    theirs = optax.contrib.scale_by_muon(nesterov=False)
    moved, _ = theirs.update(g, theirs.init(g))
    np.testing.assert_allclose(ours, moved * 2.5**0.5, atol=2e-5)


def test_a_schedule_is_taken_as_a_rate():
    weight, gradients = normal(4, 6), [normal(4, 6, seed=1), normal(4, 6, seed=2)]
    falling = after(optim.muon(lambda count: jnp.where(count == 0, 0.1, 0.0)), weight, gradients)
    np.testing.assert_allclose(falling, after(optim.muon(0.1), weight, gradients[:1]), atol=1e-7)


def test_a_leaf_that_is_no_matrix_is_refused_by_name():
    with pytest.raises(ValueError, match="norm.gain has shape \\(4,\\)"):
        optim.muon(0.1).init({"up": jnp.ones((4, 4)), "norm": {"gain": jnp.ones(4)}})


@pytest.mark.parametrize(
    "wrong", [{"scaling": "moon"}, {"fan_in_axis": 0}, {"coefficients": "deepseek"}, {"coefficients": "ns"}]
)
def test_wrong_arguments_are_refused_before_the_first_step(wrong):
    with pytest.raises(ValueError):
        optim.muon(0.1, **wrong)


@pytest.mark.parametrize(
    ("alias", "given", "wrong"),
    [
        (optim.muon, {"learning_rate": float("nan")}, "learning_rate = nan"),
        (optim.muon, {"learning_rate": -0.1, "momentum": 1.5}, r"2 problems(.|\n)*learning_rate = -0\.1(.|\n)*momentum = 1\.5"),
        (optim.muon, {"learning_rate": 0.1, "weight_decay": -1}, "weight_decay = -1"),
        (optim.normuon, {"learning_rate": 0.1, "b2": 1.0}, "b2 = 1"),
        (optim.adamw, {"learning_rate": np.float32("inf")}, "learning_rate = "),
        (optim.adamw, {"learning_rate": 0.1, "epsilon": 0.0}, "epsilon = 0"),
        (optim.sgd, {"learning_rate": 0.1, "momentum": -0.1}, "momentum = -0.1"),
        (optim.lmo, {"learning_rate": 0.1, "momentum": 1}, "momentum = 1"),
    ],
)
def test_an_alias_refuses_the_numbers_that_a_config_refuses(alias, given, wrong):
    with pytest.raises(ConfigError, match=wrong):
        alias(**given)


def test_a_rate_may_be_traced():
    weight = jnp.ones((3, 4))
    tx = optax.inject_hyperparams(optim.muon, static_args=("steps", "fan_in_axis"))(learning_rate=0.1)
    moved, _ = jax.jit(tx.update)(weight, tx.init(weight), weight)
    np.testing.assert_allclose(moved, after(optim.muon(0.1), weight, [weight]) - weight, atol=1e-6)


def test_adamw_is_the_one_of_optax():
    weight, gradients = normal(5), [normal(5, seed=k) for k in range(1, 4)]
    ours = after(optim.adamw(0.01, b2=0.9, weight_decay=0.1), weight, gradients)
    assert np.array_equal(ours, after(optax.adamw(0.01, 0.9, 0.9, weight_decay=0.1), weight, gradients))
