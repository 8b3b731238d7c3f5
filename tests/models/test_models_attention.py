"""Softmax attention: every implementation against the definition; what is chosen and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.mixers import softmax
from models.mixers.rotary import rotary_table, rotate
from strata import ConfigError


def mixer_of(awake, implementation: str, heads: int, kv_heads: int, **fields):
    """The first layer's attention, width 16 and heads of 8."""
    mixer = {"name": "attention", "implementation": implementation, **fields}
    model = awake({"width": 16, "layers": 1, "heads": heads, "kv_heads": kv_heads, "head_size": 8, "mixer": mixer})
    graph, state = nnx.split(model.blocks["block0"].mixer)
    return nnx.merge(graph, jax.tree.map(lambda x: x[0], state))


def outputs_and_gradients(mixers, x, segments, cotangent):
    """Output and gradients (parameters, input) of each mixer, in one program."""
    graphs, states = zip(*(nnx.split(mixer) for mixer in mixers), strict=True)

    def both(states, x):
        found = []
        for graph, state in zip(graphs, states, strict=True):

            def forward(state, x, graph=graph):
                mixer = nnx.merge(graph, state)
                return mixer(x, mixer.prepare(x.shape[1], segments))

            out, pull = jax.vjp(forward, state, x)
            found.append((out, pull(cotangent)))
        return found

    return jax.device_get(jax.jit(both)(states, x))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "window", "documents"),
    [
        (4, 4, 1, None, False),
        (4, 1, 1, 5, True),
        (4, 4, 7, 3, True),
        (4, 1, 7, None, False),
        (4, 2, 65, 5, False),
        (4, 1, 65, None, True),
        (4, 4, 65, None, False),
        (4, 2, 300, None, False),  # long enough to be cut into blocks of queries
        (4, 1, 300, 150, True),
    ],
)
def test_xla_is_the_reference_forward_and_backward(awake, heads, kv_heads, length, window, documents):
    rng = np.random.default_rng(length)
    x, cotangent = (jnp.asarray(rng.standard_normal((2, length, 16)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, length))), jnp.int32) if documents else None
    both = [mixer_of(awake, name, heads, kv_heads, window=window) for name in ("xla", "reference")]
    fast, slow = outputs_and_gradients(both, x, segments, cotangent)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_xla_in_bfloat16_is_near_the_float32_reference(awake):
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.standard_normal((2, 65, 16)), jnp.float32) for _ in range(2))
    (exact,) = outputs_and_gradients([mixer_of(awake, "reference", 4, 2)], x, None, cotangent)
    half = jnp.bfloat16
    both = [mixer_of(awake, name, 4, 2) for name in ("xla", "reference")]
    for rounded in outputs_and_gradients(both, x.astype(half), None, cotangent.astype(half)):
        assert rounded[0].dtype == half
        for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
            assert np.linalg.norm(a.astype(np.float32) - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_knowing_that_the_mask_is_causal_changes_nothing(name):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 300, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    mask = softmax.attention_mask(jnp.arange(300), jnp.arange(300), window=200)
    attend = jax.jit(softmax.IMPLEMENTATIONS[name], static_argnames="causal")
    np.testing.assert_allclose(attend(q, k, v, mask, causal=True), attend(q, k, v, mask, causal=False), atol=1e-6)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_a_query_that_sees_only_itself_returns_its_own_value(awake, name):
    mixer = mixer_of(awake, name, 4, 2, window=1)
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    value = np.repeat(np.asarray(mixer.value(x)).reshape(2, 6, 2, 8), 2, axis=2)
    np.testing.assert_allclose(mixer(x, mixer.prepare(6, None)), mixer.out(jnp.asarray(value).reshape(2, 6, 32)), atol=1e-5)
    # The first position, and a document of one token, see only themselves under any window.
    wide = mixer_of(awake, name, 4, 2)
    alone = wide(x, wide.prepare(6, jnp.broadcast_to(jnp.arange(1, 7)[None], (2, 6))))
    np.testing.assert_allclose(alone, mixer(x, mixer.prepare(6, None)), atol=1e-5)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_scores_far_apart_stay_finite(name):
    q = 200.0 * jnp.ones((1, 4, 1, 8))
    k = q * jnp.array([-1.0, 1.0, -1.0, 1.0])[None, :, None, None]
    mask = softmax.attention_mask(jnp.arange(4), jnp.arange(4))

    def total(q, k, v):
        return jnp.sum(softmax.IMPLEMENTATIONS[name](q, k, v, mask))

    found = jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, jax.random.normal(jax.random.key(0), (1, 4, 1, 8)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_the_mask_is_causal_windowed_and_by_document():
    mask = softmax.attention_mask(jnp.arange(4), jnp.arange(4), window=2)
    assert mask.astype(int)[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    ids = jnp.array([[1, 1, 2, 2], [1, 1, 1, 0]])
    mask = softmax.attention_mask(jnp.arange(4), jnp.arange(4), query_segments=ids, key_segments=ids)
    assert mask.shape == (2, 1, 4, 4)
    assert mask.astype(int)[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask.astype(int)[1, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def test_cudnn_by_name_is_refused_where_it_cannot_serve_in_training_and_in_decoding(config, awake, tokens):
    model = awake(config(mixer={"name": "attention", "implementation": "cudnn"}))
    with pytest.raises(ConfigError, match="'cudnn' cannot serve: the device is cpu, not an NVIDIA GPU"):
        jax.eval_shape(lambda: model(tokens(1, 4)))
    with pytest.raises(ConfigError, match="cannot serve"):
        jax.eval_shape(lambda: model.step(tokens(1, 1), model.init_cache(1, 4)))


def test_auto_says_what_it_chose_and_why(monkeypatch):
    name, why = softmax.choose("auto", jnp.dtype("float32"), 64)
    assert (name, why) == ("xla", "cuDNN cannot serve: the device is cpu, not an NVIDIA GPU")
    assert softmax.choose("reference", jnp.dtype("float32"), 64) == ("reference", "asked for by name")

    class Device:
        platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert softmax.choose("auto", jnp.dtype("bfloat16"), 64)[0] == "cudnn"
    assert softmax.choose("cudnn", jnp.dtype("bfloat16"), 64)[0] == "cudnn"
    for dtype, size, reason in (("float32", 64, "train.precision gives float32"), ("bfloat16", 36, "head size 36")):
        name, why = softmax.choose("auto", jnp.dtype(dtype), size)
        assert name == "xla" and reason in why
        with pytest.raises(ConfigError, match=reason):
            softmax.choose("cudnn", jnp.dtype(dtype), size)
    assert "even lengths only, not 65" in softmax.choose("auto", jnp.dtype("bfloat16"), 64, 65)[1]
    assert softmax.choose("auto", jnp.dtype("bfloat16"), 64, 64)[0] == "cudnn"
    Device.compute_capability = "7.5"
    assert "below 8.0" in softmax.choose("auto", jnp.dtype("bfloat16"), 64)[1]
    Device.device_kind = "AMD Instinct"
    assert "not an NVIDIA GPU" in softmax.choose("auto", jnp.dtype("bfloat16"), 64)[1]


def test_the_first_position_is_not_rotated_and_norms_are_kept():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 8))
    turned = rotate(x, rotary_table(jnp.arange(9), 8, 10_000.0))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    assert np.abs(turned - x)[:, 1:].max() > 0.1


def test_rotated_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    table = rotary_table(jnp.arange(20), 8, 100.0)
    turned_q, turned_k = (rotate(jnp.broadcast_to(x, (1, 20, 1, 8)), table)[0, :, 0] for x in (q, k))
    scores = np.asarray(turned_q @ turned_k.T)
    for distance in range(-19, 20):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.std(scores[0]) > 0.1


def test_rotation_turns_pair_i_by_position_times_theta_to_minus_2i_over_d():
    x = np.random.default_rng(0).standard_normal((1, 5, 1, 6))
    pair = x[..., :3] + 1j * x[..., 3:]
    turned = pair * np.exp(1j * np.arange(10, 15)[None, :, None, None] * 50.0 ** (-2 * np.arange(3) / 6))
    found = rotate(jnp.asarray(x, jnp.float32), rotary_table(jnp.arange(10, 15), 6, 50.0))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: run with JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_cudnn_equals_the_reference_with_packed_documents_on_a_gpu(kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, slope = (
        jax.random.normal(key, (2, 128, heads, 64), jnp.bfloat16)
        for key, heads in zip(keys, (4, kv_heads, kv_heads, 4), strict=True)
    )
    segments = jnp.repeat(jnp.arange(1, 5), 32)[None].repeat(2, axis=0)
    places = jnp.arange(128)
    mask = softmax.attention_mask(places, places, query_segments=segments, key_segments=segments, window=48)

    def run(attend):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, mask, causal=True), q, k, v)
        return out, *pull(slope)

    for got, expected in zip(jax.jit(run, static_argnums=0)(softmax.cudnn), run(softmax.reference), strict=True):
        scale = jnp.max(jnp.abs(expected.astype(jnp.float32)))
        np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2 * float(scale))
