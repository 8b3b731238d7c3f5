"""LANTON: noisier layers take smaller steps, within their group and by the stated law."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optim
from optim.layerwise.noise import multipliers_of
from optim.options import LANTON, Optimizer
from strata import ConfigError

constant = {"name": "constant"}


def setting(**fields):
    lanton = {"name": "lanton", "interval": 1, **fields}
    return {"direction": {"name": "lmo"}, "layerwise": lanton, "schedule": constant, "clip_norm": None}


def run(config, model, params, gradients, steps, **extra):
    tx = optim.build(config, model)
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(1, steps + 1):
        moved, state = update(gradients(k), state, params, **{name: of(k) for name, of in extra.items()})
        params = optax.apply_updates(params, moved)
    return params, state


def test_the_law_at_four_noises():
    found = multipliers_of(jnp.asarray([0.1, 1.0, 10.0, 100.0]), LANTON(floor=1.0, floor_of="absolute"))
    np.testing.assert_allclose(found, [1, 0.861, 0.562, 0.323], atol=1e-3)


@pytest.mark.parametrize("floor_of", ["group", "absolute"])
def test_no_noise_and_equal_noise_give_one(floor_of):
    for noise in (jnp.zeros(3), jnp.full(3, 7.0), jnp.full(3, 1e-30)):
        np.testing.assert_allclose(multipliers_of(noise, LANTON(floor_of=floor_of)), 1.0, rtol=1e-6)


def test_sixteenfold_noise_far_above_the_floor_halves_the_rate():
    noise = jnp.asarray([1.0, 16.0])
    for floor_of in ("group", "absolute"):
        found = multipliers_of(noise, LANTON(floor=1e-3, floor_of=floor_of))
        np.testing.assert_allclose(found, [1.0, 0.5], rtol=1e-4)
    np.testing.assert_allclose(multipliers_of(noise, LANTON(floor=1e-3, power=1.0)), [1.0, 0.25], rtol=1e-4)


def test_a_floor_in_units_of_the_group_ignores_the_scale_of_the_loss():
    noise = jnp.asarray([0.2, 1.0, 30.0])
    for scale in (1e-8, 1e8):
        np.testing.assert_allclose(multipliers_of(scale * noise, LANTON()), multipliers_of(noise, LANTON()), rtol=1e-5)


def test_the_calmest_layer_of_every_group_has_rate_one(model, params, gradients):
    _, state = run(setting(), model, params, gradients, 4)
    rate = optim.multipliers(state)["rate"]
    matrices = np.concatenate([rate[f"blocks.{name}"] for name in ("query", "up", "down")])
    vectors = np.r_[rate["blocks.gain"], rate["blocks.temperature"]]
    tables = np.array([rate[name] for name in ("embedding", "positions", "head")])
    for group in (matrices, vectors, tables):
        assert group.max() == 1.0 and 0 < group.min() < 1


def test_equal_gradients_every_step_are_the_plain_optimizer_bit_for_bit(model, params, gradients):
    def same(k):
        return gradients(1)

    plain = {name: value for name, value in setting().items() if name != "layerwise"}
    one, state = run(setting(), model, params, same, 4)
    other, _ = run(plain, model, params, same, 4)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert not any(np.any(noise) for noise in state.layerwise.inner.noise.values())


def test_the_first_gradient_is_not_taken_for_noise(model, params, gradients):
    _, state = run(setting(), model, params, gradients, 1)
    assert not any(np.any(noise) for noise in state.layerwise.inner.noise.values())


def test_noise_in_one_group_leaves_the_others_alone(model, params, gradients):
    def louder(k):
        g = gradients(k)
        return g | {"embedding": 30 * g["embedding"]}

    _, one = run(setting(), model, params, gradients, 3)
    _, other = run(setting(), model, params, louder, 3)
    before, after = optim.multipliers(one)["rate"], optim.multipliers(other)["rate"]
    assert float(after["embedding"]) < 0.5 * float(before["embedding"])
    for path in before:
        if path.startswith("blocks"):
            np.testing.assert_array_equal(before[path], after[path])


def expected_square(shape, draws=200):
    rng = np.random.default_rng(0)
    norms = [np.linalg.svd(rng.normal(size=shape), compute_uv=False).sum() for _ in range(draws)]
    return (shape[1] / shape[0]) * np.mean(np.square(norms))


@pytest.mark.parametrize("estimator", ["consecutive", "independent"])
def test_planted_noise_is_found(model, params, gradients, estimator):
    scale = 0.3
    mean = gradients(0)

    def noisy(k, seed=0):
        noise = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1000 * seed + 13 * k + x.size), x.shape), params)
        return jax.tree.map(lambda m, n: m + scale * n, mean, noise)

    def difference(k):
        return jax.tree.map(jnp.subtract, noisy(k), noisy(k, seed=1))

    extra = {"gradient_difference": difference} if estimator == "independent" else {}
    config = setting(estimator=estimator, nuclear="exact", b2=0.95)
    _, state = run(config, model, params, noisy, 90, **extra)
    for path, shape in (("blocks.up", (8, 20)), ("blocks.query", (8, 8))):
        found = np.mean(state.layerwise.inner.noise[path])
        assert found == pytest.approx(2 * scale**2 * expected_square(shape), rel=0.12)


def test_independent_noise_is_that_of_clipped_gradients(model, params, gradients):
    """A difference that is given before clipping shrinks by the factor of the gradient."""

    def difference(k, factor=1.0):
        return jax.tree.map(lambda x: factor * x, gradients(k + 50))

    factor = 0.5 / float(optim.global_norm(gradients(1)))
    assert factor < 1
    config = setting(estimator="independent", nuclear="bound")
    _, clipped = run(config | {"clip_norm": 0.5}, model, params, gradients, 1, gradient_difference=difference)
    shrunk = functools.partial(difference, factor=factor)
    _, plain = run(config, model, params, gradients, 1, gradient_difference=shrunk)
    for path, noise in clipped.layerwise.inner.noise.items():
        np.testing.assert_allclose(noise, plain.layerwise.inner.noise[path], rtol=1e-4)


def test_any_layerwise_rate_may_ask_for_a_second_gradient():
    class Asking:
        needs_second_gradient = True

    assert Optimizer(layerwise=Asking()).needs_second_gradient
    assert Optimizer(layerwise=LANTON(estimator="independent")).needs_second_gradient
    assert not Optimizer(layerwise=LANTON()).needs_second_gradient and not Optimizer().needs_second_gradient


def test_the_independent_estimator_says_what_it_lacks(model, params, gradients):
    with pytest.raises(ValueError, match="gradient_difference"):
        run(setting(estimator="independent"), model, params, gradients, 1)


@pytest.mark.parametrize("floor_of", ["group", "absolute"])
def test_equal_noise_gives_one_however_seldom_a_layer_is_active(floor_of):
    """Every layer's gradient changes its sign whenever it is active, so that all differences are alike."""

    class Stack(nnx.Module):
        def __init__(self):
            self.up = nnx.Param(jnp.ones((4, 6, 8)), role="matrix", axes=("layer", "embed", "mlp"))
            self.head = nnx.Param(jnp.ones((6, 11)), role="head", axes=("embed", "vocab"))

    params = nnx.to_pure_dict(nnx.state(Stack(), nnx.Param))
    config = setting(floor_of=floor_of) | {"sampling": {"name": "drop_muon", "buckets": 4}}
    tx = optim.build(config, Stack())
    state, update = tx.init(params), jax.jit(tx.update, static_argnames="cut")
    one, sign = jax.random.normal(jax.random.key(0), (6, 8)), np.ones(4)
    for cut in (3, 1, 1, 3, 0, 1, 0, 3):
        sign[cut:] *= -1
        g = {"up": jnp.asarray(sign[:, None, None] * np.asarray(one)[None], jnp.float32), "head": params["head"]}
        _, state = update(g, state, params, cut=cut)
        np.testing.assert_allclose(optim.multipliers(state)["rate"]["up"], 1.0, rtol=1e-5)
    assert state.layerwise.inner.times["up"].tolist() == [1, 4, 4, 7]


def test_a_layer_without_a_measurement_has_rate_one_and_no_say():
    chosen, noise = LANTON(floor=1e-3), jnp.asarray([0.0, 1.0, 16.0])
    np.testing.assert_allclose(multipliers_of(noise, chosen, jnp.asarray([0, 40, 40])), [1.0, 1.0, 0.5], rtol=1e-4)
    np.testing.assert_array_equal(multipliers_of(jnp.zeros(3), chosen, jnp.zeros(3, jnp.int32)), 1.0)
    every = multipliers_of(noise, chosen, jnp.full(3, 2))
    np.testing.assert_array_equal(every, multipliers_of(noise, chosen))


def test_measuring_at_intervals_keeps_the_noise_in_between(model, params, gradients):
    states = [run(setting(interval=3), model, params, gradients, steps)[1].layerwise.inner.noise for steps in (2, 3, 4, 5, 6)]
    changed = [any(np.any(a[p] != b[p]) for p in a) for a, b in zip(states, states[1:], strict=False)]
    assert np.all(states[0]["blocks.up"] > 0) and changed == [True, False, False, True]


def test_the_noise_estimate_resumes_bit_for_bit(model, params, gradients):
    config = setting(interval=2)
    whole = run(config, model, params, gradients, 6)
    half, state = run(config, model, params, gradients, 3)
    tx = optim.build(config, model)
    update = jax.jit(tx.update)
    half, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (half, state))
    for k in (4, 5, 6):
        moved, state = update(gradients(k), state, half)
        half = optax.apply_updates(half, moved)
    jax.tree.map(np.testing.assert_array_equal, (half, state), whole)


def test_options_of_lanton_are_checked(model):
    with pytest.raises(ConfigError, match="optimizer.layerwise.estimator"):
        optim.build(setting(estimator="both"), model)
