"""NOBLE: a dense layer with a permanent nonlinear low-rank branch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
import optim
from models import options
from models.layers.noble import NOBLE, Branch

IN, OUT, RANK = 24, 40, 6


def layer(features: tuple[int, int] = (IN, OUT), std: float = IN**-0.5, seed: int = 0, **fields: Any) -> NOBLE:
    option = options.NOBLE(**{"rank": RANK} | fields)
    return NOBLE(option, *features, axes=("embed", "mlp"), std=std, rngs=nnx.Rngs(seed))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numbers(module: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, p)): np.asarray(v[...], np.float64) for p, v in nnx.to_flat_state(nnx.state(module))}


def cosnet(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """Equations 5 to 7, with the repository's biases where they exist."""
    z = x @ p["branch.down"] + p.get("branch.down_bias", 0.0)
    u = np.cos(p["branch.scales.n1"] * z + p["branch.shifts.n1"])
    v = u @ p["branch.mixes.n1"] + p.get("branch.mix_biases.n1", 0.0)
    return np.cos(p["branch.scales.n2"] * v + p["branch.shifts.n2"])


@pytest.mark.parametrize("initial", ["paper", "repository"])
def test_it_is_the_papers_equation(initial):
    module, x = layer(initial=initial, up_scale=1.0), draw(2, 3, IN)
    p = numbers(module)
    if initial == "repository":
        module.branch.down_bias[...] = jnp.asarray(draw(RANK, seed=3))
        p = numbers(module)
    expected = x @ p["main.kernel"] + cosnet(x, p) @ p["branch.up"]
    np.testing.assert_allclose(module(jnp.asarray(x)), expected, atol=2e-5)


def test_with_an_up_matrix_of_zeros_it_is_the_dense_layer_and_only_that_matrix_learns_of_the_branch():
    module, x = layer(), jnp.asarray(draw(2, 3, IN))
    module.branch.up[...] = jnp.zeros((RANK, OUT))
    np.testing.assert_array_equal(module(x), module.main(x))
    graph, state = nnx.split(module)
    found = numbers(jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x) ** 2))(state))
    moved = {path for path, gradient in found.items() if gradient.any()}
    assert moved == {"main.kernel", "branch.up"}


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_cosnet_is_within_one_whatever_the_input_and_the_branch_within_the_sum_of_its_columns(size):
    module, x = layer(up_scale=1.0), jnp.asarray(size * draw(50, IN))
    z = (x @ module.branch.down[...]).astype(jnp.float32)
    assert np.abs(module.branch.nonlinear(z)).max() <= 1
    bound = np.abs(np.asarray(module.branch.up[...])).sum(axis=0)
    assert (np.abs(module.branch(x)) <= bound * (1 + 1e-6)).all()


def test_at_the_start_the_branch_is_a_fiftieth_of_the_main_path():
    width, rank = 512, 64
    module, x = layer((width, width), std=width**-0.5, rank=rank), jnp.asarray(draw(256, width))
    main, branch = (float(jnp.sqrt(jnp.mean(f(x) ** 2))) for f in (module.main, module.branch))
    assert main == pytest.approx(0.5, rel=0.02)
    assert 0.010 < branch / main < 0.022


def test_without_frequency_and_phase_the_branch_does_not_depend_on_its_input():
    module = layer(up_scale=1.0)
    module.branch.scales["n1"][...] = module.branch.shifts["n1"][...] = jnp.zeros(RANK)
    found = np.asarray(module.branch(jnp.asarray(draw(7, IN))))
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), atol=1e-6)
    assert np.abs(found).max() > 1e-2


def test_a_phase_counts_modulo_a_turn_and_a_cosine_does_not_see_a_sign():
    module, x = layer(up_scale=1.0), jnp.asarray(draw(5, IN))
    expected = module(x)
    for name in ("n1", "n2"):
        scale, shift = module.branch.scales[name][...], module.branch.shifts[name][...]
        module.branch.shifts[name][...] = shift + 2 * math.pi
        np.testing.assert_allclose(module(x), expected, atol=1e-5)
        module.branch.scales[name][...], module.branch.shifts[name][...] = -scale, -shift
        np.testing.assert_allclose(module(x), expected, atol=1e-6)


def test_biases_in_the_branch_are_phases():
    module, x = layer(initial="repository", up_scale=1.0), jnp.asarray(draw(5, IN))
    down, mixed = jnp.asarray(draw(RANK, seed=4)), module.branch.mix_biases["n1"][...]
    module.branch.down_bias[...] = down
    expected = module(x)
    module.branch.down_bias[...] = module.branch.mix_biases["n1"][...] = jnp.zeros(RANK)
    for name, bias in (("n1", down), ("n2", mixed)):
        module.branch.shifts[name][...] = module.branch.shifts[name][...] + module.branch.scales[name][...] * bias
    np.testing.assert_allclose(module(x), expected, atol=1e-5)


def test_initial_numbers_are_the_papers_and_the_repositorys():
    for initial in ("paper", "repository"):
        p = numbers(layer((256, 512), std=256**-0.5, rank=128, initial=initial))
        assert np.std(p["main.kernel"]) == pytest.approx(0.5 * 256**-0.5, rel=0.02)
        assert np.std(p["branch.down"]) == pytest.approx(256**-0.5, rel=0.02)
        assert np.std(p["branch.up"]) == pytest.approx(0.01 * 128**-0.5, rel=0.02)
        for name in ("n1", "n2"):
            scale, shift = p[f"branch.scales.{name}"], p[f"branch.shifts.{name}"]
            assert 0.8 <= scale.min() < 0.85 and 1.15 < scale.max() <= 1.2
            assert np.std(shift) == pytest.approx(0.1, rel=0.2) and abs(shift.mean()) < 0.03
        assert not np.array_equal(p["branch.scales.n1"], p["branch.scales.n2"])
        assert not np.array_equal(p["branch.shifts.n1"], p["branch.shifts.n2"])
        mix = p["branch.mixes.n1"]
        if initial == "paper":
            assert np.abs(mix).max() <= math.sqrt(6 / 256) and np.std(mix) == pytest.approx(128**-0.5, rel=0.02)
            assert not any("bias" in path for path in p)
        else:
            assert np.std(mix) == pytest.approx(0.5 * 128**-0.5, rel=0.02)
            assert not p["branch.down_bias"].any()
            assert 0.9 * 128**-0.5 < np.abs(p["branch.mix_biases.n1"]).max() <= 128**-0.5


@pytest.mark.parametrize(("initial", "biases"), [("paper", 0), ("repository", 2)])
def test_a_branch_costs_the_parameters_of_the_formula(initial, biases):
    r = 9
    p = numbers(layer(rank=r, initial=initial))
    branch = sum(value.size for path, value in p.items() if path.startswith("branch"))
    assert branch == r * (IN + OUT) + r * r + 4 * r + biases * r


def test_with_identities_for_cosines_it_is_one_matrix_and_with_cosines_it_is_not_linear():
    module, x = layer(activation="identity", affine=False, up_scale=1.0), draw(5, IN)
    p = numbers(module)
    whole = p["main.kernel"] + p["branch.down"] @ p["branch.mixes.n1"] @ p["branch.up"]
    np.testing.assert_allclose(module(jnp.asarray(x)), x @ whole, atol=2e-5)
    a, b, zero = (jnp.asarray(v) for v in (draw(1, IN), draw(1, IN, seed=1), 0 * draw(1, IN)))
    for name, linear in (("identity", True), ("cosine", False)):
        f = layer(activation=name, affine=False, up_scale=1.0)
        assert (np.abs(f(a + b) - f(a) - f(b) + f(zero)).max() < 1e-5) == linear


def test_a_rank_of_zero_is_the_dense_layer_of_half_scale():
    module = layer(rank=0)
    assert set(numbers(module)) == {"main.kernel"}
    assert np.std(numbers(module)["main.kernel"]) == pytest.approx(0.5 * IN**-0.5, rel=0.1)


ACTIVATIONS = ("cosine", "identity", "tanh", "leaky_relu", "gelu", "silu", "swiglu")
FORMS = [
    dict(zip(("activation", "depth", "affine", "flipped", "initial"), form, strict=True))
    for form in itertools.product(ACTIVATIONS, (1, 2, 3), (True, False), (False, True), ("paper", "repository"))
    if form[0] != "swiglu" or form[1] == 1
]


@pytest.mark.parametrize("forms", [FORMS[::5], pytest.param(FORMS, marks=pytest.mark.slow)], ids=["every_fifth", "all"])
def test_every_ablated_form_is_its_formula_and_all_of_it_learns(forms):
    """7 activations, 1 to 3 of them, with and without scales, sign and biases; op by op, since all share their shapes."""
    acts = {
        "cosine": np.cos,
        "identity": lambda z: z,
        "tanh": np.tanh,
        "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
        "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
        "silu": lambda z: z / (1 + np.exp(-z)),
    }
    x, rng, modules = draw(4, IN), np.random.default_rng(0), []
    for form in forms:
        shapes = nnx.eval_shape(lambda form=form: layer(**form))
        graph, state = nnx.split(shapes)
        modules.append((graph, jax.tree.map(lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), jnp.float32), state)))

    for form, (graph, state) in zip(forms, modules, strict=True):

        def squares(state: Any, graph: Any = graph) -> Any:
            y = nnx.merge(graph, state)(jnp.asarray(x))
            return jnp.sum(y**2), y

        (_, found), gradient = jax.value_and_grad(squares, has_aux=True)(state)
        p = {".".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(state)}
        z = x @ p["branch.down"] + p.get("branch.down_bias", 0.0)
        for i in range(form["depth"]):
            if form["affine"]:
                z = z * p[f"branch.scales.n{i + 1}"] + p[f"branch.shifts.n{i + 1}"]
            z = -z if form["flipped"] else z
            if form["activation"] == "swiglu":
                gate, value = np.split(z, 2, axis=-1)
                z = acts["silu"](gate) * value
            else:
                z = acts[form["activation"]](z)
            if i + 1 < form["depth"]:
                z = z @ p[f"branch.mixes.n{i + 1}"] + p.get(f"branch.mix_biases.n{i + 1}", 0.0)
        expected = x @ p["main.kernel"] + z @ p["branch.up"]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=str(form))
        for path, v in nnx.to_flat_state(gradient):
            # cos(-z) = cos(z) leaves every gradient; nothing of any form is idle.
            assert np.isfinite(v[...]).all() and np.abs(v[...]).max() > 1e-6, (form, path)


def test_it_computes_cosines_in_float32_within_a_bfloat16_model():
    module, x = layer(up_scale=1.0), draw(64, IN)
    module.branch.scales["n1"][...] = jnp.full(RANK, 3.0)
    exact = np.asarray(module(jnp.asarray(x)))
    half = module(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(lambda x: module(x))(jnp.asarray(x, jnp.bfloat16))
    cosines = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "cos"]
    assert len(cosines) == 2 and all(v.aval.dtype == jnp.float32 for eqn in cosines for v in eqn.invars)
    assert np.abs(np.asarray(half, np.float32) - exact).max() < 0.1 * np.abs(exact).max()
    # The angle itself: float32 sums of bfloat16 factors, not rounded on the way to the cosine.
    (angle,) = [eqn.invars[0] for eqn in cosines[:1]]
    first = jax.jit(lambda x: jax.core.eval_jaxpr(jaxpr.jaxpr.replace(outvars=[angle]), jaxpr.consts, x)[0])
    rounded = [np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64) for v in (x, module.branch.down[...])]
    z = rounded[0] @ rounded[1]
    expected = z * np.asarray(module.branch.scales["n1"][...]) + np.asarray(module.branch.shifts["n1"][...])
    np.testing.assert_allclose(first(jnp.asarray(x, jnp.bfloat16)), expected, atol=1e-5)


# Learning-rate multipliers, up to the optimizer.

RATES = {
    "paper": {"up": 0.6, "mix": 0.45, "scale": 3.0, "shift": 5.0},
    "repository": {"up": 0.4, "mix": 0.5, "scale": 2.0, "shift": 4.0},
}


def multiplier(path: str, rates: str, shapes: dict[str, tuple[int, int]], rank: int) -> float:
    """What the dossier's table says of one parameter."""
    if ".branch." not in path:
        return 1.0
    site, leaf = path.split(".branch.")
    ratio = min(shapes[site.split("block0.")[-1]]) / rank
    known = RATES[rates]
    if leaf == "up":
        return ratio ** known["up"]
    if leaf.startswith("mixes"):
        return ratio ** known["mix"]
    return known["scale"] if leaf.startswith("scales") else known["shift"] if leaf.startswith("shifts") else 1.0


@pytest.mark.parametrize("rates", ["paper", "repository"])
def test_every_multiplier_is_in_the_assignment_of_the_optimizer_and_in_the_size_of_an_adam_step(config, awake, jit, rates):
    fields = config(kv_heads=1, ffn={"name": "gelu", "hidden": 24}, norm={"name": "rms_norm"})
    model = awake(fields | {"linear": {"name": "noble", "rank": 3, "rates": rates, "initial": "repository"}})
    shapes = {"mixer.query": (16, 16), "mixer.key": (16, 8), "mixer.value": (16, 8), "mixer.out": (16, 16)}
    shapes |= {"ffn.up": (16, 24), "ffn.down": (24, 16)}
    expected = {
        ".".join(map(str, p)): multiplier(".".join(map(str, p)), rates, shapes, 3)
        for p, _ in nnx.to_flat_state(nnx.state(model))
    }
    assert len(set(expected.values())) == 1 + 2 * 2 + 2  # 1; two ratios for W_up and for the mixing matrix; scale and shift
    adam = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0}
    config_of_run = {"direction": adam, "schedule": {"name": "constant", "warmup": 0}, "clip_norm": None}
    rows = {row.path: row for row in optim.assignment(config_of_run, model)}
    assert {path: row.learning_rate_multiplier for path, row in rows.items()} == pytest.approx(expected)
    assert {path: row.learning_rate for path, row in rows.items()} == pytest.approx(
        {path: 1e-3 * value for path, value in expected.items()}
    )
    transform, state = optim.build(config_of_run, model), nnx.to_pure_dict(nnx.state(model))
    ones = jax.tree.map(jnp.ones_like, state)
    updates, _ = jit(lambda p: transform.update(ones, transform.init(p), p))(state)
    moved = jax.tree.map(lambda a, b: a - b, optax.apply_updates(state, updates), state)
    for path, value in nnx.to_flat_state(nnx.State(moved)):
        name = ".".join(map(str, path))
        np.testing.assert_allclose(
            value[...] if hasattr(value, "get_metadata") else value, -1e-3 * expected[name], rtol=1e-3, atol=1e-7, err_msg=name
        )


@pytest.mark.slow
def test_a_model_of_noble_layers_starts_and_learns(config, jit, tokens):
    """From the real start, where the writing matrices of both paths but for W_up are zero."""
    fields = config(width=8, heads=1, linear={"name": "noble", "rank": 3}, ffn={"name": "gelu", "hidden": 8}, head_std=0.3)
    model, rows = models.build(fields, vocab_size=11, seed=0), tokens(2, 6)
    assert isinstance(model.blocks["block0"].ffn.up.branch, Branch)
    graph, state = nnx.split(model)

    def nats(state: Any) -> jax.Array:
        h, _ = nnx.merge(graph, state).hidden(rows)
        return models.cross_entropy(h, nnx.merge(graph, state).output_kernel(), rows[:, ::-1], jnp.ones(rows.shape))[0]

    found = jit(jax.grad(nats))(state)
    for path, gradient in nnx.to_flat_state(found):
        assert np.isfinite(gradient[...]).all() and gradient[...].any(), path
