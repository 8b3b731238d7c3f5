"""Every linear-attention mixer: parallel, packed, step by step and from a prompt of any length it is one function."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels
import kernels.registry
import models
from models.construct import resolve_model
from models.mixers.constant_decay import elu1
from models.mixers.short_convolution import ShortConvolution, same_document
from strata import ConfigError, implementation

WIDTH, LENGTH, ROWS = 16, 65, 8
FORMS: dict[str, dict[str, Any]] = {
    "linear_attention": {"name": "linear_attention"},
    "hedgehog": {"name": "linear_attention", "feature_map": "hedgehog", "heads": 2, "value_heads": 4, "convolution": 3},
    "retention": {"name": "retention"},
    "lightning": {"name": "lightning", "depth_fraction": 0.25},
    "simple_gla": {"name": "simple_gla"},
    "gla": {"name": "gla"},
    "delta_net": {"name": "delta_net", "gate": True, "negative_eigenvalues": True},
    "gated_delta_net": {"name": "gated_delta_net", "value_heads": 4},
    "kda": {"name": "kda", "expand_v": 1.5, "value_heads": 4},
    "lightnet": {"name": "lightnet", "convolution": 2, "value_heads": 4},
}
every_form = pytest.mark.parametrize("form", FORMS)


def fresh(mixer: dict[str, Any]) -> nnx.Module:
    """A mixer as it starts."""
    layer = resolve_model({"width": WIDTH, "heads": 2, "mixer": mixer}).at(0)
    return implementation(layer.mixer)(layer.mixer, layer, rngs=nnx.Rngs(params=0))


def make(mixer: dict[str, Any]) -> nnx.Module:
    """A mixer, its parameters drawn by NumPy, gains around 1. In chunks of 4, so that most rows have several."""
    abstract = nnx.eval_shape(lambda: fresh({"chunk_size": 4} | mixer))
    rng, flat = np.random.default_rng(1), {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        drawn = float(path[-1] == "scale") + 0.3 * rng.standard_normal(variable.shape)
        flat[path] = jnp.asarray(drawn, jnp.float32)
    return nnx.merge(nnx.graphdef(abstract), nnx.State(nnx.to_pure_dict(nnx.from_flat_state(flat))))


class Machine:
    """One mixer and its compiled functions."""

    def __init__(self, form: str):
        self.mixer = make(FORMS[form])
        self.graph, self.state = nnx.split(self.mixer)

        def parallel(state, x, ids):
            mixer = nnx.merge(self.graph, state)
            return mixer(x, mixer.prepare(x.shape[1], ids)), mixer(x[:, :1], mixer.prepare(1, None))

        def step(state, x, cache, index, start):
            mixer = nnx.merge(self.graph, state)
            layers = jax.tree.map(lambda leaf: leaf[None], cache)
            return mixer.step(x, mixer.prepare_step(x.shape[1], layers, index, start), cache)

        self._parallel, self._step = jax.jit(parallel), jax.jit(step)

    def parallel(self, x: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.asarray(out) for out in self._parallel(self.state, x, ids))

    def decode(self, x: np.ndarray, sizes: list[int], start: np.ndarray) -> np.ndarray:
        cache, found, at = self.mixer.init_cache(len(x), 64, jnp.float32), [], 0
        for size in sizes:
            out, cache = self._step(self.state, x[:, at : at + size], cache, at, start)
            found.append(out)
            at += size
        return np.concatenate(found, axis=1)


machine = functools.cache(Machine)
drawn = np.random.default_rng(0).standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)


@every_form
def test_a_token_is_seen_by_itself_and_later_ones_of_its_document(form):
    x, ids, cut = drawn.copy(), np.ones((ROWS, LENGTH), np.int32), 20
    places = {1: 0, 2: cut, 3: LENGTH - 1}
    for row, t in places.items():
        x[row] = x[0]
        x[row, t] += 1
    x[4] = np.concatenate([x[0, :cut], x[5, : LENGTH - cut]])  # two documents in a row
    x[6] = x[4]
    ids[4, cut:] = 2
    x[7] = x[0]
    ids[7, 30:] = 0  # padding
    out, first = machine(form).parallel(x, ids)
    assert np.isfinite(out).all()
    for row, t in places.items():
        np.testing.assert_allclose(out[row, :t], out[0, :t], atol=1e-5)
        assert np.abs(out[row, t] - out[0, t]).max() > 1e-3
    np.testing.assert_allclose(out[4, :cut], out[0, :cut], atol=1e-5)
    np.testing.assert_allclose(out[4, cut:], out[5, : LENGTH - cut], atol=1e-5)
    assert np.abs(out[6, cut:] - out[4, cut:]).max() > 1e-2  # as one document they do see each other
    np.testing.assert_allclose(out[7, :30], out[0, :30], atol=1e-5)
    np.testing.assert_allclose(first, out[:, :1], atol=1e-5)  # a row of one token


@every_form
def test_step_by_step_is_the_parallel_forward_for_prompts_padded_on_the_left(form):
    start = np.array([0, 3, 5], np.int32)
    found = machine(form).decode(drawn[:3], [5, 1, 1, 1, 5], start)  # the second prompt goes on from a state
    aligned = np.zeros_like(drawn)
    for row, first in enumerate(start):
        aligned[row, : LENGTH - first] = drawn[row, first:]
    expected, _ = machine(form).parallel(aligned, np.ones((ROWS, LENGTH), np.int32))
    assert np.isfinite(found).all()
    for row, first in enumerate(start):
        np.testing.assert_allclose(found[row, first:], expected[row, : found.shape[1] - first], atol=2e-5)


@every_form
def test_a_gradient_reaches_every_parameter_in_bfloat16(form):
    subject, length = machine(form), 20

    def objective(state, x, weights):
        mixer = nnx.merge(subject.graph, state)
        out = mixer(x, mixer.prepare(length, None))
        return jnp.sum(out * weights), out

    x, weights = jnp.asarray(drawn[:2, :length], jnp.bfloat16), jnp.asarray(drawn[2:4, :length], jnp.bfloat16)
    gradients, out = jax.jit(jax.grad(objective, has_aux=True))(subject.state, x, weights)
    assert out.dtype == jnp.bfloat16
    exact = subject.parallel(drawn, np.ones((ROWS, LENGTH), np.int32))[0][:2, :length]
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.1 * np.abs(exact).max())
    for path, gradient in nnx.to_flat_state(gradients):
        assert gradient[...].dtype == jnp.float32
        assert np.isfinite(gradient[...]).all(), path
        assert np.abs(gradient[...]).max() > 1e-4, path


def test_a_query_that_weighs_nothing_has_no_gradient_and_spoils_no_other():
    """With relu all weights of a token may be zero: its output is zero, and gradients are those of the other tokens."""
    mixer = make({"name": "linear_attention", "feature_map": "relu"})
    graph, state = nnx.split(mixer)

    def objective(state, x):
        mixer = nnx.merge(graph, state)
        out = mixer(x, mixer.prepare(x.shape[1], None))
        return jnp.sum(out**2), out

    x = np.array(drawn[:2, :9])
    x[:, 4] = 0  # q = k = 0: no bias here
    gradients, out = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(state, x)
    assert not np.asarray(out)[:, 4].any() and np.abs(np.asarray(out)[:, 5:]).max() > 1e-3
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradients))


def twin(one: nnx.Module, other: nnx.Module, **changed: float) -> nnx.Module:
    """`other` with the parameters that it has in common with `one`, and constants for those named in `changed`."""
    known = {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(one))}
    for path, variable in nnx.to_flat_state(nnx.state(other)):
        if path in known and known[path].shape == variable.shape:
            variable[...] = known[path]
        elif path[-1] in changed:
            variable[...] = jnp.full(variable.shape, changed[path[-1]])
    return other


def outputs(mixer: nnx.Module, x: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(mixer)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x, mixer.prepare(x.shape[1], None)))(state, x))


def test_a_gated_delta_net_that_forgets_nothing_is_a_delta_net():
    delta = make({"name": "delta_net", "gate": True, "heads": 2, "expand_v": 2.0})
    gated = twin(delta, make({"name": "gated_delta_net", "heads": 2}), A_log=-30.0)
    np.testing.assert_allclose(outputs(gated, drawn[:2]), outputs(delta, drawn[:2]), atol=1e-5)


def test_gla_that_forgets_nothing_is_linear_attention():
    linear = {"name": "linear_attention", "feature_map": "identity", "normalizer": False, "output_norm": True, "gate": True}
    plain = make(linear | {"expand_k": 0.5})
    gated = twin(plain, make({"name": "gla", "gate_normalizer": 1e9}))
    np.testing.assert_allclose(outputs(gated, drawn[:2]), outputs(plain, drawn[:2]), atol=1e-5)


@pytest.mark.parametrize("feature_map", ["elu1", "hedgehog"])
def test_normalised_linear_attention_averages_values(feature_map):
    x = drawn[:2].copy()
    x[..., 0] = 1.0
    mixer = make({"name": "linear_attention", "feature_map": feature_map})
    kernel = mixer.value.kernel
    kernel[...] = jnp.where(jnp.arange(WIDTH)[:, None] == 0, kernel[...], 0)  # the value of every token is the same
    out = outputs(mixer, x)
    np.testing.assert_allclose(out, np.broadcast_to(out[:, :1], out.shape), atol=1e-5)
    np.testing.assert_allclose(out[0, 0], kernel[...][0] @ mixer.out.kernel[...], atol=1e-5)


def test_a_short_convolution_is_a_causal_sum_over_its_taps_within_a_document():
    convolution = ShortConvolution(3, 4, axis="heads", activated=False, rngs=nnx.Rngs(params=0))
    x, kernel = drawn[:1, :9, :3], np.asarray(convolution.kernel[...])
    ids = np.array([[1, 1, 1, 1, 2, 2, 1, 1, 1]])  # a number that comes again is another document
    plain, last = jax.jit(lambda x: convolution(x, None, None))(x)
    within, _ = jax.jit(lambda x, ids: convolution(x, None, same_document(ids, 4)))(x, ids)
    bounds = [0, 0, 0, 0, 4, 4, 6, 6, 6]
    for t in range(9):
        for first, found in ((0, plain), (bounds[t], within)):
            expected = sum(kernel[j] * x[0, t - j] for j in range(4) if t - j >= first)
            np.testing.assert_allclose(found[0, t], expected, atol=1e-6)
    np.testing.assert_array_equal(last, x[:, -3:])


def test_mamba_and_kimi_gates_start_within_their_published_ranges_or_those_given():
    given = {"A_init_range": (0.0, 0.5), "dt_init_range": (0.01, 0.01)}
    for name, low, high in (("simple_gla", 1, 16), ("gated_delta_net", 0, 16), ("kda", 1, 16)):

        def drawn(name=name, **ranges) -> tuple[jax.Array, jax.Array]:
            decay = fresh({"name": name, "heads": 8, "value_heads": 8, **ranges}).decay
            return jnp.exp(decay.A_log[...]), jax.nn.softplus(decay.dt_bias[...])

        rates, steps = jax.jit(drawn)()
        assert low <= rates.min() < rates.max() <= high + 1e-4, name
        assert 1e-3 - 1e-6 <= steps.min() < steps.max() <= 0.1 + 1e-6, name
        rates, steps = jax.jit(functools.partial(drawn, **given))()
        assert 1e-4 - 1e-6 <= rates.min() < rates.max() <= 0.5 + 1e-6, name
        np.testing.assert_allclose(steps, 0.01, rtol=1e-4)


def test_hedgehog_starts_with_the_identity():
    kernel = jax.jit(lambda: fresh(FORMS["hedgehog"]).query_features.kernel[...])()
    np.testing.assert_array_equal(kernel, np.stack([np.eye(8)] * 2))


def test_lightning_decays_less_in_deeper_layers_and_alike_where_a_fraction_is_given():
    plan = resolve_model({"width": WIDTH, "heads": 2, "layers": 4, "mixer": {"name": "lightning"}}).plan()
    assert [layer.mixer.depth_fraction for layer in plan] == [0, 0.25, 0.5, 0.75]
    for i, layer in enumerate(plan):
        mixer = nnx.eval_shape(lambda layer=layer: implementation(layer.mixer)(layer.mixer, layer, rngs=nnx.Rngs(params=0)))
        np.testing.assert_allclose(mixer.constant_decay(), kernels.lightning_decay(2, i, 4))
    fixed = resolve_model({"width": WIDTH, "heads": 2, "layers": 4, "mixer": {"name": "lightning", "depth_fraction": 0.5}})
    assert len(set(fixed.plan())) == 1


def test_the_cache_does_not_grow_with_the_length():
    for form in FORMS:
        mixer = make(FORMS[form])
        short, long = (jax.eval_shape(lambda n=n, m=mixer: m.init_cache(2, n, jnp.bfloat16)) for n in (1, 4096))
        assert short == long, form
        state = short["state"][0] if form == "lightnet" else short["state"]
        assert state.dtype == jnp.float32, form
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(short["past"])), form


def test_what_muon_takes_is_exactly_the_projections():
    for form in FORMS:
        mixer = make(FORMS[form])
        roles = {path[0]: v.get_metadata()["role"] for path, v in nnx.to_flat_state(nnx.state(mixer)) if path[-1] == "kernel"}
        sites = set(mixer.option.projections(resolve_model({"width": WIDTH, "heads": 2})))
        assert {site for site, role in roles.items() if role == "matrix"} == sites, form


def test_published_proportions_follow_from_the_width():
    def units(name: str) -> float:
        model = resolve_model({"width": 512, "heads": 8, "mixer": {"name": name}})
        return sum(rows * columns for rows, columns in model.mixer.projections(model).values()) / 512**2

    assert units("gated_delta_net") == 6  # keys 0.75, values 1.5
    assert units("simple_gla") == 6 + 2 * 128 / 512  # Mamba-2: two widths of values, one group of keys of 128
    assert units("retention") == 8
    assert units("gla") == 4


def test_training_flops_are_those_of_the_chunked_algebra():
    model = resolve_model({"width": 128, "heads": 1, "mixer": {"name": "linear_attention", "normalizer": False}})
    assert model.mixer.flops(model, 4096)[0] * 64 / 3 == pytest.approx(6.3e6, rel=0.01)  # a chunk of 64, K = V = 128
    delta = resolve_model({"width": 128, "heads": 1, "mixer": {"name": "delta_net", "convolution": 0}})
    assert delta.mixer.flops(delta, 4096)[0] * 64 / 3 == pytest.approx(11.5e6, rel=0.01)
    assert delta.mixer.flops(delta, 4096) == delta.mixer.flops(delta, 8192)


@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        ({"name": "gla", "heads": 3, "value_heads": 4}, "3 query heads do not divide 4 value heads"),
        ({"name": "simple_gla", "heads": 3}, "4 value heads; value_heads is not set, which means twice the model's heads"),
        (
            {"name": "gla", "value_heads": 3},
            "divide 3 value heads; heads is not set, which means as many as the model has: set it",
        ),
        ({"name": "gated_delta_net", "value_heads": 3}, "heads is not set, which means 3/4 of the model's, rounded up: set it"),
        ({"name": "gla", "expand_k": 0.3}, "0.3 times a head size of 8 is not a whole number"),
        ({"name": "retention", "expand_k": 0.125}, "rotary positions need an even key size, not 1"),
        ({"name": "delta_net", "convolution": 1}, "one tap is a gain"),
        ({"name": "kda", "chunk_size": 48}, "a power of two of tokens, not 48"),
        (
            {"name": "kda", "A_init_range": (2.0, 1.0)},
            "A_init_range = (2.0, 1.0)\n      is two numbers, the smaller one first, not [2.0, 1.0]",
        ),
        ({"name": "simple_gla", "dt_init_range": (0.1,)}, "is two numbers, the smaller one first, not [0.1]"),
        ({"name": "gated_delta_net", "dt_init_range": (0.0, 0.1)}, "dt_init_range"),
        ({"name": "linear_attention", "feature_map": "identity"}, "give normalizer = False"),
        ({"name": "linear_attention", "backend": "triton"}, "one of 'auto', 'reference'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(mixer, said):
    with pytest.raises(ConfigError) as refused:
        resolve_model({"width": WIDTH, "heads": 2, "mixer": mixer})
    assert said in str(refused.value)


def explained(mixer: dict[str, Any]) -> str:
    layer = resolve_model({"width": WIDTH, "heads": 2, "mixer": mixer}).at(0)
    return implementation(layer.mixer).explain(layer.mixer, layer, jnp.dtype("float32"), LENGTH)


@every_form
def test_it_says_which_back_end_serves_and_why_others_do_not(form):
    line = explained(FORMS[form])
    assert line.startswith(f"{FORMS[form]['name']}: xla (not tpu: "), line
    assert explained(FORMS[form] | {"backend": "reference"}).endswith(": reference (asked for by name)")


def test_a_back_end_that_cannot_serve_is_refused_not_replaced():
    asked = {"name": "gla", "backend": "mosaic_gpu"}
    with pytest.raises(ConfigError, match="mosaic_gpu"):
        explained(asked)
    mixer = make(asked)
    with pytest.raises(ConfigError, match="mosaic_gpu"):
        mixer(drawn[:1], mixer.prepare(LENGTH, None))


@every_form
def test_what_is_announced_on_a_mesh_of_tpus_is_what_the_mixer_takes(form, monkeypatch):
    """Two devices, so that outside `jax.shard_map` no kernel would be taken."""
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [tpu])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr("kernels.tpu.limits.untried", lambda call: None)  # at sizes that were compiled
    taken, choose = [], kernels.registry.choose

    def seen(call, backend="auto"):
        taken.append(call)
        return choose(call, backend)

    monkeypatch.setattr(kernels.registry, "choose", seen)
    layer = resolve_model({"width": WIDTH, "heads": 2, "mixer": FORMS[form]}).at(0)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        line = implementation(layer.mixer).explain(layer.mixer, layer, jnp.dtype("float32"), LENGTH, 4)
        announced = taken.pop()
        assert line.startswith(f"{FORMS[form]['name']}: tpu (") and not taken
        mixer = nnx.eval_shape(lambda: fresh(FORMS[form]))
        graph, state = nnx.split(mixer)
        x, ids = jax.ShapeDtypeStruct((4, LENGTH, WIDTH), jnp.float32), jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)

        def parallel(state, x, ids):
            mixer = nnx.merge(graph, state)
            return mixer(x, mixer.prepare(LENGTH, ids))

        jax.eval_shape(parallel, state, x, ids)
    assert announced.batch == 2 and announced.devices == 1
    # What only the op itself is told leaves the choice and the tuning key as they are.
    (called,) = taken
    assert called == dataclasses.replace(announced, scale=called.scale)


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 1e-2), ("float32", 1e-6)])
def test_elu_plus_one_keeps_its_digits_far_below_zero(dtype, tolerance):
    x = jnp.asarray(np.linspace(-20, 4, 97), dtype)
    exact = np.asarray(x, np.float64)
    expected, slope = np.where(exact > 0, exact + 1, np.exp(exact)), np.where(exact > 0, 1.0, np.exp(exact))
    for function in (elu1, jax.jit(elu1)):
        found = function(x)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance)
        gradient = jax.grad(lambda x, function=function: jnp.sum(function(x).astype(jnp.float32)))(x)
        np.testing.assert_allclose(np.asarray(gradient, np.float64), slope, rtol=tolerance)
    assert np.isfinite(np.asarray(jax.grad(lambda x: elu1(x))(jnp.float32(1000.0))))


def test_noble_and_lora_stand_for_the_projections_and_nothing_else():
    for name in ("gated_delta_net", "kda"):
        model = models.abstract(
            {"width": WIDTH, "layers": 1, "heads": 2, "mixer": {"name": name}, "linear": {"name": "noble", "rank": 4}},
            vocab_size=5,
        )
        paths = [path for path, _ in nnx.to_flat_state(nnx.state(model)) if "mixer" in path]
        branched = {path[path.index("mixer") + 1] for path in paths if "branch" in path}
        assert branched == set(model.options.mixer.projections(model.options)), name
