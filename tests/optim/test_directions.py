"""Directions other than AdamW and Muon, and matrices stored side by side."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optim
from optim.directions.lmo import direction_of, dual_norm
from optim.directions.muon import scale_by_muon
from optim.directions.normuon import scale_by_normuon
from optim.options import AdamW, Optimizer
from strata import ConfigError, resolve

constant = {"name": "constant"}
NUCLEAR = ("exact", "newton_schulz", "bound")


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_sgd_equals_optax(model, params, gradients):
    config = {"direction": {"name": "sgd", "learning_rate": 0.1, "nesterov": True}, "schedule": constant, "clip_norm": None}
    ours, theirs = optim.build(config, model), optax.sgd(0.1, 0.9, nesterov=True)
    one, other = ours.init(params), theirs.init(params)
    for k in (1, 2, 3):
        moved, one = jax.jit(ours.update)(gradients(k), one, params)
        expected, other = jax.jit(theirs.update)(gradients(k), other, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), moved, expected)


def test_an_optax_transformation_by_dotted_name_moves_by_minus_its_rate(model, params, gradients):
    direction = {"name": "optax", "transformation": "optax.scale_by_lion", "arguments": {"b1": 0.8}, "learning_rate": 0.01}
    tx = optim.build({"direction": direction, "schedule": constant, "clip_norm": None}, model)
    lion = optax.lion(0.01, b1=0.8, weight_decay=0.0)
    moved, _ = jax.jit(tx.update)(gradients(1), tx.init(params), params)
    expected, _ = jax.jit(lion.update)(gradients(1), lion.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), moved, expected)


@pytest.mark.parametrize(
    ("name", "arguments", "where", "sentence"),
    [
        ("optax.scale_by_loin", None, "transformation", "no function scale_by_loin"),
        ("optacks.scale", None, "transformation", "ModuleNotFoundError"),
        ("os.system", {"command": "exit 1"}, "transformation", "neither optax's nor annotated"),
        ("optax.lion", None, "transformation", "scale_by_\\* form"),
        ("optax.scale_by_lion", {"b3": 1}, "arguments", "unexpected keyword argument 'b3'"),
        ("optax.constant_schedule", {"value": 1.0}, "transformation", "not an optax.GradientTransformation"),
        ("optax.scale_by_schedule", None, "arguments", "missing 1 required"),
    ],
)
def test_what_is_no_transformation_is_refused_with_its_field(model, name, arguments, where, sentence):
    direction = {"name": "optax", "transformation": name, "arguments": arguments}
    with pytest.raises(ConfigError, match=f"(?s)optimizer.direction.{where}.*{sentence}"):
        optim.build({"direction": direction, "schedule": constant}, model)


def test_a_function_of_ones_own_is_called_if_it_says_what_it_gives(model, tmp_path, monkeypatch):
    (tmp_path / "own_transformations.py").write_text(
        "from __future__ import annotations\nimport optax\n\n\n"
        "def signs() -> optax.GradientTransformation:\n    return optax.scale_by_sign()\n\n\n"
        "def silent():\n    raise AssertionError('called')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    direction = {"name": "optax", "transformation": "own_transformations.signs", "arguments": None}
    optim.build({"direction": direction, "schedule": constant}, model)
    with pytest.raises(ConfigError, match="neither optax's nor annotated"):
        optim.build({"direction": direction | {"transformation": "own_transformations.silent"}, "schedule": constant}, model)


def reference_normuon(gradients, *, momentum, b2, scaling):
    """One matrix [in, out] in float64 by singular values, with the exact polynomial of Jordan's five steps."""
    b, v = np.zeros_like(gradients[0]), np.zeros(gradients[0].shape[1])
    for g in gradients:
        b = momentum * b + (1 - momentum) * g
        u = momentum * b + (1 - momentum) * g
        p, s, q = np.linalg.svd(u, full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        o = (p * s) @ q
        v = b2 * v + (1 - b2) * (o * o).mean(0)
        even = o / (np.sqrt(v) + 1e-10)
        size = 0.2 * o.size**0.5 if scaling == "rms" else np.linalg.norm(o) * max(1, o.shape[1] / o.shape[0]) ** 0.5
        moved = even * size / np.linalg.norm(even)
    return moved


@pytest.mark.parametrize("scaling", ["rms", "jordan"])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_normuon_equals_an_independent_float64_implementation(shape, scaling):
    steps = [np.asarray(normal(*shape, seed=k), np.float64) for k in range(4)]
    tx = scale_by_normuon(0.9, 0.8, scaling=scaling)
    state = tx.init(jnp.zeros(shape))
    for g in steps:
        moved, state = jax.jit(tx.update)(jnp.asarray(g, jnp.float32), state)
    expected = reference_normuon(steps, momentum=0.9, b2=0.8, scaling=scaling)
    np.testing.assert_allclose(moved, expected, atol=2e-4)
    if scaling == "rms":
        assert np.sqrt(np.mean(np.square(moved))) == pytest.approx(0.2, rel=1e-5)


def test_normuon_of_stacked_matrices_equals_separate_ones():
    g, tx = normal(3, 6, 10), scale_by_normuon()
    together, _ = jax.jit(tx.update)(g, tx.init(g))
    for layer in range(3):
        apart, _ = jax.jit(tx.update)(g[layer], tx.init(g[layer]))
        np.testing.assert_allclose(together[layer], apart, atol=1e-6)


def test_a_zero_gradient_moves_nothing_by_normuon():
    g, tx = jnp.zeros((4, 6)), scale_by_normuon()
    assert not np.any(tx.update(g, tx.init(g))[0])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 4), (2, 4, 0)])
def test_a_matrix_without_entries_stays(shape):
    params = {"none": jnp.zeros(shape), "some": jnp.ones((4, 4))}
    for made in (optim.muon(0.1), optim.muon(0.1, scaling="moonlight"), optim.normuon(0.1)):
        updates, _ = made.update(params, made.init(params), params)
        assert updates["none"].shape == shape and np.isfinite(updates["some"]).all()


@pytest.mark.parametrize("sizes", [(8, 4, 4), (4, 4, 4, 4)])
def test_matrices_side_by_side_are_orthogonalised_and_scaled_by_themselves(sizes):
    tx, g = scale_by_muon(splits={"w": sizes}), {"w": normal(2, 5, 16)}
    fused, _ = jax.jit(tx.update)(g, tx.init(g))
    parts, plain = jnp.split(g["w"], np.cumsum(sizes)[:-1], axis=-1), scale_by_muon()
    apart = jax.jit(lambda parts: jnp.concatenate([plain.update(x, plain.init(x))[0] for x in parts], axis=-1))(parts)
    np.testing.assert_allclose(fused["w"], apart, atol=5e-6)
    assert np.abs(fused["w"] - jax.jit(plain.update)(g["w"], plain.init(g["w"]))[0]).max() > 0.05


def test_a_declared_split_reaches_muon_and_the_table():
    class Fused(nnx.Module):
        def __init__(self):
            self.qkv = nnx.Param(normal(2, 5, 16), role="matrix", axes=("layer", "embed", "heads"), split=(8, 4, 4))

    config = {"direction": {"name": "muon"}, "schedule": constant, "clip_norm": None}
    model = Fused()
    # Of 5 x 8 and 5 x 4 the latter is too square for the Gram form, which the whole of 5 x 16 would take.
    assert optim.assignment(config, model)[0].newton_schulz == "jordan x5 gram and plain in 3 blocks"
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx, alias = optim.build(config, model), scale_by_muon(splits={"qkv": (8, 4, 4)})
    moved, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(moved["qkv"], -0.02 * jax.jit(alias.update)(params, alias.init(params))[0]["qkv"], rtol=1e-5)


@pytest.mark.parametrize("norm", ["spectral", "largest", "rms"])
def test_the_plain_form_of_lmo_is_that_of_the_recipe(norm):
    role = {"spectral": "matrix", "largest": "head", "rms": "factor"}[norm]

    class One(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(normal(6, 9), role=role, axes=("embed", "mlp"))
            self.matrix = nnx.Param(normal(6, 9), role="matrix", axes=("embed", "mlp"))

    rates = {"learning_rate": 0.1, "table_learning_rate": 0.1, "vector_learning_rate": 0.1, "momentum": 0.5}
    config = {"direction": {"name": "lmo", **rates}, "schedule": constant, "clip_norm": None}
    params = nnx.to_pure_dict(nnx.state(One(), nnx.Param))
    tx, plain = optim.build(config, One()), optim.lmo(0.1, norm=norm, momentum=0.5)
    state, alone = tx.init(params), plain.init(params["w"])
    for _ in range(2):
        moved, state = tx.update(params, state, params)
        other, alone = plain.update(params["w"], alone, params["w"])
        np.testing.assert_allclose(moved["w"], other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="norm is 'spectral'"):
        optim.lmo(0.1, norm="nuclear")


def test_the_default_rate_of_normuon_is_for_its_own_scaling():
    """An update of root mean square 0.2, as Moonlight's and Adam's, takes Adam's rate and not Muon's."""
    found, _ = resolve(Optimizer, {"direction": {"name": "normuon"}})
    assert found.direction.scaling == "rms" and found.direction.learning_rate == AdamW().learning_rate


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_the_sharp_form_is_the_polar_factor_times_the_nuclear_norm(shape):
    g = normal(*shape)
    quintic = {"coefficients": [(2, -1.5, 0.5)], "steps": 30, "scaling": None, "nesterov": False, "momentum": 0.0}
    tx = scale_by_muon(form="sharp", **quintic)
    moved, _ = jax.jit(tx.update)(g, tx.init(g))
    u, s, v = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    np.testing.assert_allclose(moved, s.sum() * (u @ v), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("norm", "shape"), [("spectral", (6, 10)), ("spectral", (10, 6)), ("largest", (5, 4)), ("rms", (9,))])
def test_a_direction_has_unit_norm_and_reaches_the_dual_norm(norm, shape):
    x = normal(*shape)
    if norm == "spectral":  # the polar factor itself, since Jordan's polynomial only comes near it
        u, _, v = np.linalg.svd(np.asarray(x), full_matrices=False)
        d = (shape[1] / shape[0]) ** 0.5 * (u @ v)
        own = (shape[0] / shape[1]) ** 0.5 * np.linalg.norm(d, 2)
        found = jax.jit(functools.partial(direction_of, norm=norm, coefficients="deepseek"))(x)
        np.testing.assert_allclose(found, d, atol=0.03)
    else:
        d = direction_of(x, norm)
        own = np.abs(d).max() if norm == "largest" else np.sqrt(np.mean(np.square(d)))
    assert own == pytest.approx(1, rel=1e-5)
    assert np.sum(np.asarray(x) * d) == pytest.approx(float(dual_norm(x, norm)), rel=1e-5)


@pytest.mark.parametrize("norm", ["spectral", "largest", "rms"])
def test_norms_of_a_stack_are_those_of_its_layers(norm):
    x = normal(3, 6, 8)
    for nuclear in NUCLEAR if norm == "spectral" else ("exact",):
        one = jax.jit(functools.partial(dual_norm, norm=norm, nuclear=nuclear))
        stack = jax.jit(functools.partial(dual_norm, norm=norm, nuclear=nuclear, stacked=True))
        np.testing.assert_allclose(stack(x), [float(one(layer)) for layer in x], rtol=1e-4)
    one, stack = (jax.jit(functools.partial(direction_of, norm=norm, stacked=stacked)) for stacked in (False, True))
    np.testing.assert_allclose(stack(x), jnp.stack([one(layer) for layer in x]), atol=2e-6)


def test_nuclear_norms_by_newton_schulz_are_a_little_low_and_the_bound_is_high():
    for shape in ((64, 64), (64, 256)):
        x = normal(*shape)
        exact, low, high = (float(jax.jit(functools.partial(dual_norm, norm="spectral", nuclear=how))(x)) for how in NUCLEAR)
        assert 0.8 < low / exact < 0.9 and 1.0 < high / exact < 1.2


def test_blocks_of_a_matrix_have_norms_of_their_own_under_lmo():
    """Fused projections move as separate ones would, and so does the dual norm that LANTON measures."""
    parts = [jax.random.normal(jax.random.key(i), (2, 6, n)) for i, n in enumerate((4, 9))]
    whole, split = jnp.concatenate(parts, axis=-1), (4, 9)

    class Fused(nnx.Module):
        def __init__(self):
            self.qk = nnx.Param(whole, role="matrix", axes=("layer", "embed", "heads"), split=split)

    config = {"direction": {"name": "lmo", "learning_rate": 1.0, "weight_decay": 0.0}, "schedule": constant, "clip_norm": None}
    tx, params = optim.build(config, Fused()), {"qk": whole}
    moved, _ = tx.update(params, tx.init(params), params)
    apart = jnp.concatenate([direction_of(part, "spectral", stacked=True) for part in parts], axis=-1)
    np.testing.assert_allclose(moved["qk"], -apart, atol=1e-6)
    assert np.max(np.abs(apart - direction_of(whole, "spectral", stacked=True))) > 0.1
    norms = [dual_norm(part, "spectral", stacked=True) for part in parts]
    np.testing.assert_allclose(dual_norm(whole, "spectral", stacked=True, split=split), sum(norms), rtol=1e-6)

    noisy = {"direction": {"name": "lmo"}, "layerwise": {"name": "lanton", "interval": 1, "nuclear": "exact"}}
    tx = optim.build(noisy | {"schedule": constant, "clip_norm": None}, Fused())
    state = tx.init(params)
    for sign in (1, -1):
        _, state = tx.update({"qk": sign * whole}, state, params)
    b2 = optim.options.LANTON().b2
    np.testing.assert_allclose(state.layerwise.inner.noise["qk"], (1 - b2) * (2 * sum(norms)) ** 2, rtol=1e-5)


def test_every_role_has_its_norm_under_lmo(model, params, gradients):
    config = {"direction": {"name": "lmo", "learning_rate": 1.0, "table_learning_rate": 2.0, "vector_learning_rate": 3.0}}
    tx = optim.build({**config, "schedule": constant}, model)
    moved, _ = jax.jit(tx.update)(gradients(1), tx.init(params), params)
    np.testing.assert_allclose(np.abs(moved["embedding"]), 2.0)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(moved["blocks"]["gain"]), axis=1)), 3.0, rtol=1e-5)
    assert {row.rule for row in optim.assignment({**config, "schedule": constant}, model)} == {"matrix", "table", "vector"}


def test_a_group_may_have_its_own_schedule(model, params, gradients):
    rest = {"name": "adamw", "schedule": {"name": "linear"}}
    config = {"direction": {"name": "muon", "rest": rest}, "schedule": {"name": "constant", "warmup": 2}}
    table = optim.rates(config, 10)
    assert table(1) == {"matrix": np.float32(0.01), "rest": np.float32(3e-3 * 0.9)}
    assert table(10) == {"matrix": np.float32(0.02), "rest": np.float32(0)}
    tx = optim.build(config, model, steps=10)
    given, _ = jax.jit(tx.update)(gradients(1), tx.init(params), params, rates=table(1))
    inside, _ = jax.jit(tx.update)(gradients(1), tx.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), given, inside)


def test_a_groups_schedule_is_named_when_it_does_not_fit(model):
    rest = {"name": "adamw", "schedule": {"name": "cosine", "warmup": 11}}
    with pytest.raises(ConfigError, match="optimizer.direction.rest.schedule.warmup"):
        optim.rates({"direction": {"name": "muon", "rest": rest}, "schedule": constant}, 10)
    with pytest.raises(ConfigError, match="optimizer.direction.rest.schedule.name"):
        optim.build({"direction": {"name": "muon", "rest": rest}, "schedule": constant}, model)
