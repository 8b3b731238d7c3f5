"""Norms, feed-forward layers and the whole model against their formulas, in float64 NumPy; bfloat16 near float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import options
from models.layers.norm import DyT, make_norm
from models.layers.parameter import parameter
from models.placements.placement import Context
from strata import implementation, register, registry
from strata import options as parts
from tests.traced import equations

# Written apart from the package, from the papers.


def rms_norm(x, scale, epsilon=1e-6):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def layer_norm(x, scale, bias, epsilon=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotary(x, theta=10_000.0):
    size = x.shape[-1]
    angle = np.arange(x.shape[1])[None, :, None, None] * theta ** (-np.arange(0, size, 2) / size)
    pair = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angle)
    return np.concatenate([pair.real, pair.imag], axis=-1)


def llama(p, tokens, *, layers, heads, kv_heads, size):
    """The default model: RMSNorm before each sub-layer, QK-norm, rotary positions, grouped keys, SwiGLU, untied head."""
    h = p["embedding.table"][tokens]
    batch, length, _ = h.shape
    for i in range(layers):
        w = {name.removeprefix("blocks.block0."): value[i] for name, value in p.items() if "block0" in name}
        x = rms_norm(h, w["placement.mixer_norm.scale"])
        q = (x @ w["mixer.query.kernel"]).reshape(batch, length, heads, size)
        k = (x @ w["mixer.key.kernel"]).reshape(batch, length, kv_heads, size)
        v = (x @ w["mixer.value.kernel"]).reshape(batch, length, kv_heads, size)
        q, k = rotary(rms_norm(q, w["mixer.query_norm.scale"])), rotary(rms_norm(k, w["mixer.key_norm.scale"]))
        out = np.zeros((batch, length, heads, size))
        for head in range(heads):
            shared = head // (heads // kv_heads)
            for t in range(length):
                score = np.einsum("bd,bsd->bs", q[:, t, head], k[:, : t + 1, shared]) / np.sqrt(size)
                weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
                out[:, t, head] = np.einsum("bs,bsd->bd", weight, v[:, : t + 1, shared])
        h = h + out.reshape(batch, length, heads * size) @ w["mixer.out.kernel"]
        x = rms_norm(h, w["placement.ffn_norm.scale"])
        h = h + (silu(x @ w["ffn.gate.kernel"]) * (x @ w["ffn.up.kernel"])) @ w["ffn.down.kernel"]
    return rms_norm(h, p["final_norm.scale"]) @ p["head_kernel"]


def test_the_default_model_is_its_definition(config, awake, run, params, tokens):
    sizes = {"layers": 2, "heads": 4, "kv_heads": 2, "head_size": 6}
    model, rows = awake(config(**sizes)), tokens(2, 7)
    p = {path: np.asarray(value, np.float64) for path, value in params(model).items()}
    expected = llama(p, np.asarray(rows), layers=2, heads=4, kv_heads=2, size=6)
    np.testing.assert_allclose(run(model, rows), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scale_of_x", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", ["rms", "layer", "layer_bias"])
def test_a_norm_is_its_formula(name, scale_of_x):
    option = {"rms": options.RMSNorm(), "layer": options.LayerNorm(), "layer_bias": options.LayerNorm(bias=True)}[name]
    rng = np.random.default_rng(0)
    x, gain, offset = scale_of_x * (rng.standard_normal((2, 3, 24)) + 0.5), rng.standard_normal(24), rng.standard_normal(24)
    norm = implementation(option)(option, 24, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(gain, jnp.float32)
    if name == "layer_bias":
        norm.bias[...] = jnp.asarray(offset, jnp.float32)
    expected = rms_norm(x, gain) if name == "rms" else layer_norm(x, gain, offset if name == "layer_bias" else 0.0)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=2e-5)
    half = norm(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("option", [options.RMSNorm(), options.LayerNorm()], ids=["rms", "layer"])
def test_a_norm_of_bfloat16_rounds_once(option):
    norm = implementation(option)(option, 512, rngs=nnx.Rngs(0))
    gain = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    norm.scale[...] = jnp.asarray(gain)
    x = jnp.asarray(1 + np.random.default_rng(1).standard_normal((4, 512)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    expected = rms_norm(exact, gain) if option.name == "rms_norm" else layer_norm(exact, gain, 0.0)
    error = np.abs(np.asarray(norm(x), np.float64) - expected) / np.abs(expected)
    assert error.max() < 1.05 * 2**-8  # half of the last of eight digits; statistics in bfloat16 give about three times that


def test_the_norm_of_zeros_is_zero_with_a_finite_gradient():
    for option in (options.RMSNorm(), options.LayerNorm()):
        norm = implementation(option)(option, 8, rngs=nnx.Rngs(0))
        value, gradient = jax.value_and_grad(lambda x, norm=norm: jnp.sum(norm(x)))(jnp.zeros((1, 8)))
        assert float(value) == 0 and np.isfinite(gradient).all()


def test_dyt_is_bounded_odd_elementwise_and_nearly_linear_for_a_small_slope():
    x = 3 * np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    norm = DyT(options.DyT(alpha=0.5), 8, rngs=nnx.Rngs(0))
    gain = np.linspace(-2, 2, 8, dtype=np.float32)
    norm.scale[...] = jnp.asarray(gain)
    value = np.asarray(norm(jnp.asarray(x)))
    np.testing.assert_allclose(value, gain * np.tanh(0.5 * x), atol=1e-6)
    assert (np.abs(norm(jnp.asarray(1e4 * x))) <= np.abs(gain) + 1e-6).all()
    np.testing.assert_array_equal(norm(jnp.asarray(-x)), -value)
    other = x.copy()
    other[:, :, 0] += 1  # no statistics: other units and tokens do not notice
    np.testing.assert_array_equal(np.asarray(norm(jnp.asarray(other)))[:, :, 1:], value[:, :, 1:])
    norm.alpha[...] = jnp.float32(1e-3)
    np.testing.assert_allclose(norm(jnp.asarray(x)), 1e-3 * gain * x, rtol=1e-4)
    assert DyT(options.DyT(bias=True), 8, rngs=nnx.Rngs(0)).bias[...].tolist() == [0.0] * 8


def test_slopes_of_dyt_start_higher_before_the_mixer():
    model = options.Model(width=8, norm=options.DyT(alpha=0.6, alpha_other=0.15))
    slopes = {site: float(make_norm(model, site, rngs=nnx.Rngs(0)).alpha[...]) for site in ("mixer", "ffn", "final")}
    assert slopes == {"mixer": pytest.approx(0.6), "ffn": pytest.approx(0.15), "final": pytest.approx(0.15)}


@pytest.mark.parametrize(
    ("placement", "feeding", "other"),
    [
        ("pre", ["mixer_norm"], ["ffn_norm"]),
        ("post", ["ffn_norm"], ["mixer_norm"]),
        ("deepnorm", ["ffn_norm"], ["mixer_norm"]),
        ("sandwich", ["mixer_norm"], ["ffn_norm", "mixer_out_norm", "ffn_out_norm"]),
        ("parallel", ["norm"], []),
    ],
)
def test_the_norm_that_feeds_a_mixer_has_its_slope_wherever_it_stands(config, params, placement, feeding, other):
    fields = config(width=8, heads=1, norm={"name": "dyt"}, placement={"name": placement})
    found = {
        path: float(value[0])
        for path, value in params(models.build(fields, vocab_size=11, seed=0)).items()
        if ".placement." in path and path.endswith("alpha")
    }
    slopes = {name: 0.8 for name in feeding} | {name: 0.2 for name in other}
    assert found == {f"blocks.block0.placement.{name}.alpha": pytest.approx(slope) for name, slope in slopes.items()}


FORMULAS = {
    "swiglu": ({}, lambda gate, up: silu(gate) * up),
    "glu": ({"activation": {"name": "relu2"}}, lambda gate, up: np.maximum(gate, 0) ** 2 * up),
    "relu2": ({}, lambda gate, up: np.maximum(up, 0) ** 2),
    "gelu": ({}, lambda gate, up: gelu_tanh(up)),
    "mlp": ({"activation": {"name": "silu"}}, lambda gate, up: silu(up)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_feed_forward_layer_is_its_formula(config, awake, params, name):
    fields, formula = FORMULAS[name]
    model = awake(config(layers=1, ffn={"name": name, "hidden": 20, **fields}))
    p = {path.split("ffn.")[1]: np.asarray(v[0], np.float64) for path, v in params(model).items() if ".ffn." in path}
    graph, state = nnx.split(model.blocks["block0"].ffn)
    ffn = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    x = np.random.default_rng(0).standard_normal((2, 3, 16))
    hidden = formula(x @ p["gate.kernel"] if "gate.kernel" in p else None, x @ p["up.kernel"])
    np.testing.assert_allclose(ffn(jnp.asarray(x, jnp.float32)), hidden @ p["down.kernel"], atol=2e-5)


class Slope(nnx.Module):
    """An activation with a learned slope for each unit."""

    def __init__(self, option, units, *, axis, rngs):
        self.slope = parameter(rngs, (units,), nnx.initializers.constant(0.5), role="vector", axes=(axis,))

    def __call__(self, x):
        return jnp.maximum(x, 0) + jnp.minimum(x, 0) * self.slope[...].astype(x.dtype)[None, None]


@parts
class SlopeOptions:
    """Registered for one test."""


def test_an_activation_may_have_parameters_of_its_own(config, run, tokens, monkeypatch):
    monkeypatch.setitem(registry._components, "model.activation", dict(registry._components["model.activation"]))
    register("model.activation", "slope", implementation=f"{__name__}:Slope")(SlopeOptions)
    ffn = {"name": "mlp", "hidden": 20, "activation": {"name": "slope"}}
    model = models.build(config(layers=3, ffn=ffn), vocab_size=11, seed=0)
    assert model.blocks["block0"].ffn.activation.slope.shape == (3, 20)
    assert run(model, tokens(2, 5)).shape == (2, 5, 11)


@pytest.mark.parametrize(("name", "expected"), [("swiglu", 352), ("relu2", 512), ("gelu", 512)])
def test_hidden_units_follow_the_width(name, expected):
    model = models.abstract({"width": 128, "ffn": {"name": name}}, vocab_size=11)
    assert model.blocks["block0"].ffn.up.kernel.shape == (4, 128, expected)


def test_the_softcap_bounds_logits_and_leaves_small_ones(config, awake, run, tokens):
    rows = tokens(2, 8)
    plain, capped, loose = (run(awake(config(logit_softcap=cap)), rows) for cap in (None, 0.5, 1e4))
    assert np.abs(plain).max() > 1
    assert np.abs(capped).max() < 0.5
    np.testing.assert_allclose(capped, 0.5 * np.tanh(np.asarray(plain) / 0.5), atol=1e-6)
    np.testing.assert_allclose(loose, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_bfloat16_compute_gives_float32_logits_near_float32_ones(config, awake, run, tokens, implementation):
    fields, rows = config(mixer={"name": "attention", "implementation": implementation}), tokens(2, 16)
    exact, rounded = (run(awake(fields, precision=precision), rows) for precision in ("float32", "bfloat16"))
    assert exact.dtype == rounded.dtype == jnp.float32
    assert np.isfinite(rounded).all()
    assert 0 < np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)


def test_bfloat16_compute_keeps_the_stream_bfloat16_and_gradients_float32(config, awake, gradients, tokens):
    model, rows = awake(config(), precision="bfloat16"), tokens(2, 16)
    assert jax.eval_shape(lambda: model.hidden(rows)[0]).dtype == jnp.bfloat16
    found, expected = gradients(model, rows), gradients(awake(config()), rows)
    for path, gradient in found.items():
        assert gradient.dtype == jnp.float32, path
        assert np.linalg.norm(gradient - expected[path]) < 0.1 * np.linalg.norm(expected[path]), path


@pytest.mark.parametrize("ffn", ["swiglu", "relu2", "gelu"])
def test_no_product_of_a_bfloat16_block_takes_float32_operands_forward_or_backward(config, awake, ffn):
    model = awake(config(layers=1, ffn={"name": ffn}), precision="bfloat16")
    graph, state = nnx.split(model.blocks["block0"])
    state = jax.tree.map(lambda x: x[0], state)

    def total(state, h):
        block = nnx.merge(graph, state)
        return jnp.sum(block(h, Context(block.mixer.prepare(16, None), jnp.int32(0), h)).astype(jnp.float32))

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(state, jnp.ones((2, 16, 16), jnp.bfloat16))
    products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) >= 3 * 8  # six projections or more and two products of attention, each with two backward
    assert {v.aval.dtype for eqn in products for v in eqn.invars} == {jnp.dtype("bfloat16")}
