"""The reference is the published recurrence: against loops in NumPy, written from the papers, float64."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.ops import GATES
from strata.errors import ConfigError


def by_hand(op: str, q, k, v, g, beta, layer: int, layers: int, state=None, weight=None):
    """One row, one head. q, k [T,K]; v [T,V]; written from the papers, sharing nothing with the package.

    `state` [K,V] is before the first token; LightNet's is an average, and `weight` [K] the logarithm of its weight.
    """
    length, size = q.shape
    state = np.zeros((size, v.shape[1])) if state is None else state
    out = np.zeros_like(v)
    total = np.zeros((size, 1)) if weight is None else np.exp(weight)[:, None]
    state = state if weight is None else state * total
    for t in range(length):
        if op == "lightnet":
            total = total + np.exp(k[t])[:, None]
            state = state + np.outer(np.exp(k[t]), v[t])
            out[t] = size**-0.5 * q[t] @ (state / total)
            continue
        if op == "retention":
            state = (1 - 2.0 ** (-5 - g)) * state
        elif op == "lightning_attention":
            state = math.exp(-8 / 4 * (1 - layer / layers) * g) * state
        elif op in ("simple_gla", "gated_delta_rule"):
            state = math.exp(g[t]) * state
        elif op in ("gla", "kda"):
            state = np.diag(np.exp(g[t])) @ state
        if op in ("delta_rule", "gated_delta_rule", "kda"):
            state = (np.eye(size) - beta[t] * np.outer(k[t], k[t])) @ state + beta[t] * np.outer(k[t], v[t])
        else:
            state = state + np.outer(k[t], v[t])
        out[t] = size**-0.5 * q[t] @ state
    return out


@pytest.mark.parametrize("op", GATES)
def test_the_reference_is_the_recurrence_of_the_paper(problem, float64, op):
    given = problem(op, 7, heads=2, value_heads=4)
    q, k, v = given.arrays
    options = {"layer": 1, "layers": 3} if op == "lightning_attention" else {}
    o, _ = jax.jit(lambda *x: given.call(*x, backend="reference", **options))(given.arrays, given.gates)
    for head in range(4):
        row = 4
        g = given.gates["g"][row, :, head] if "g" in given.gates else head
        beta = given.gates["beta"][row, :, head] if "beta" in given.gates else None
        expected = by_hand(op, q[row, :, head // 2], k[row, :, head // 2], v[row, :, head], g, beta, 1, 3)
        np.testing.assert_allclose(o[row, :, head], expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("op", GATES)
def test_packed_sequences_are_the_recurrence_of_the_paper_each_from_its_own_state(problem, float64, op):
    given = problem(op, 8, "packed", heads=2, value_heads=4, regimes=(("random", "mixed", "random"),))
    q, k, v = (x[0] for x in given.arrays)
    gates = {name: x[0] for name, x in given.gates.items()}
    states, weights = given.state if op == "lightnet" else (given.state, None)
    options = {"layer": 1, "layers": 3} if op == "lightning_attention" else {}
    ends = given.sequences["cu_seqlens"]
    for backend in ("reference", "xla"):
        o, _ = given.run(backend=backend, **options)
        for number, head in itertools.product(range(len(ends) - 1), range(4)):
            part = slice(ends[number], ends[number + 1])
            g = gates["g"][part, head] if "g" in gates else head
            beta = gates["beta"][part, head] if "beta" in gates else None
            rows = (q[part, head // 2], k[part, head // 2], v[part, head])
            weight = None if weights is None else weights[number, head // 2]
            expected = by_hand(op, *rows, g, beta, 1, 3, states[number, head], weight)
            np.testing.assert_allclose(o[0, part, head], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("op", GATES)
def test_steps_one_after_the_other_equal_the_op(problem, float64, op):
    given = problem(op, 5, heads=1, value_heads=2)
    options = {"layer": 2, "layers": 5} if op == "lightning_attention" else {}
    o, final = given.run(backend="xla", **options)
    step = jax.jit(lambda *x: getattr(kernels, f"{op}_step")(*x, scale=None, **options))
    state = given.state
    gates = [given.gates[name] for name in ("g", "beta") if name in given.gates]
    for t in range(5):
        one, state = step(*(x[:, t] for x in (*given.arrays, *gates)), state)
        np.testing.assert_allclose(one, o[:, t], rtol=0, atol=1e-12 * np.abs(o).max())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max()), state, final)


def test_a_step_from_no_state_is_a_sequence_of_one_token(problem, float64):
    for op in ("kda", "lightnet"):
        given = problem(op, 1)
        gates = [given.gates[name][:, 0] for name in ("g", "beta") if name in given.gates]
        one, _ = jax.jit(getattr(kernels, f"{op}_step"))(*(x[:, 0] for x in given.arrays), *gates, None)
        o, _ = jax.jit(lambda *x, given=given: given.call(*x, backend="reference"))(given.arrays, given.gates)
        np.testing.assert_allclose(one, o[:, 0], rtol=1e-12)


def test_a_donated_state_is_updated_in_place():
    state = jnp.zeros((2, 2, 8, 8))
    x, gate = jnp.ones((2, 2, 8)), jnp.full((2, 2), -0.1)
    step = jax.jit(kernels.gated_delta_rule_step, donate_argnums=5)
    where = state.unsafe_buffer_pointer()
    _, after = step(x, x, x, gate, jnp.exp(gate), state)
    assert state.is_deleted() and after.unsafe_buffer_pointer() == where


def test_the_decays_that_are_not_learned():
    np.testing.assert_allclose(np.exp(kernels.retention_decay(3)), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])
    np.testing.assert_allclose(kernels.lightning_decay(4, layer=1, layers=2), [0, -1, -2, -3])
    assert kernels.retention_decay(80)[-1] < 0  # 1 - 2^-84 is 1 in float64; its logarithm is not 0
    with pytest.raises(ConfigError, match="layer = 2"):
        kernels.lightning_decay(4, layer=2, layers=2)


def test_retention_is_attention_with_a_decay_mask(float64):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, 2, 3)) for _ in range(3))
    t = np.arange(9)
    gamma = 1 - np.exp2(-5.0 - np.arange(2))
    mask = np.where(t[:, None] >= t, gamma[:, None, None] ** (t[:, None] - t), 0)
    expected = np.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, mask, v) / np.sqrt(3)
    for backend in ("reference", "xla"):
        np.testing.assert_allclose(kernels.retention(q, k, v, backend=backend)[0], expected, rtol=1e-11)


def test_hedgehog_is_attention_with_its_feature_map(float64):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 9, 2, 3)) for _ in range(3))
    query_weight, key_weight = rng.standard_normal((2, 2, 3, 3))
    features = kernels.hedgehog(q, query_weight)
    assert features.shape == (2, 9, 2, 6)
    np.testing.assert_allclose(np.sum(features, -1), 1, rtol=1e-12)
    shared = kernels.hedgehog(q, query_weight[0])
    np.testing.assert_allclose(shared[:, :, 0], features[:, :, 0], rtol=1e-12)
    weights = np.tril(np.einsum("bihk,bjhk->bhij", features, kernels.hedgehog(k, key_weight)))
    weights /= weights.sum(-1, keepdims=True)
    o, state = kernels.hedgehog_attention(q, k, v, query_weight, key_weight, output_final_state=True)
    np.testing.assert_allclose(o, np.einsum("bhij,bjhv->bihv", weights, v), rtol=1e-10)
    carried = None
    for t in range(9):
        one, carried = kernels.hedgehog_attention_step(q[:, t], k[:, t], v[:, t], query_weight, key_weight, carried)
    np.testing.assert_allclose(one, o[:, -1], rtol=1e-10)
    np.testing.assert_allclose(carried, state, rtol=1e-10)


def test_transnormer_output_has_unit_mean_square_whatever_the_scale(float64):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 9, 2, 3)) for _ in range(3))
    gain = rng.standard_normal((2, 3))
    o, state = kernels.transnormer_attention(q, k, v, output_final_state=True, epsilon=0.0)
    np.testing.assert_allclose(np.mean(np.square(o), -1), 1, rtol=1e-12)
    scaled, _ = kernels.transnormer_attention(q, k, v, gain, scale=7.0, epsilon=0.0)
    np.testing.assert_allclose(scaled, np.asarray(o) * gain, rtol=1e-10)
    one, after = kernels.transnormer_attention_step(q[:, 0], k[:, 0], v[:, 0], None, gain, epsilon=0.0)
    np.testing.assert_allclose(one, np.asarray(o)[:, 0] * gain, rtol=1e-10)


@pytest.mark.parametrize("scale", [None, -1.0, 1e-9])
def test_averages_and_their_gradients_are_right_however_small_the_weights_are(rms, scale):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 6, 1, 2)) for _ in range(3))
    q[..., 0], k[..., 0] = 12 + 0.1 * q[..., 0], -12 + 0.1 * k[..., 0]  # weights of e^-48: their square is no float32
    weight = np.eye(2)

    def gradients(*inputs, **options):
        run = lambda *inputs: kernels.hedgehog_attention(*inputs, **options)[0].sum()  # noqa: E731
        return jax.jit(jax.grad(run, argnums=(0, 1, 2, 3, 4)))(*inputs)

    with jax.enable_x64(True):
        expected = gradients(q, k, v, weight, weight, backend="reference")
    single = [x.astype(np.float32) for x in (q, k, v, weight, weight)]
    for backend in ("reference", "xla"):
        for found, wanted in zip(gradients(*single, backend=backend, scale=scale), expected, strict=True):
            assert rms(found, wanted) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_a_key_of_minus_infinity_weighs_nothing_in_lightnet(backend):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 7, 1, 2)).astype(np.float32) for _ in range(3))
    k[0, :3, 0, 1] = k[0, 5, 0, 0] = -np.inf  # before any other key of its channel, and after some

    def run(q, k, v):
        o, (state, weight) = kernels.lightnet(q, k, v, output_final_state=True, backend=backend)
        return jnp.sum(o * v), (o, state, weight)

    (_, (o, state, weight)), gradients = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    kept = np.exp(k[0, :, 0])
    expected = np.cumsum(kept[:, :, None] * v[0, :, 0, None], axis=0) / np.maximum(np.cumsum(kept, axis=0), 1e-30)[:, :, None]
    np.testing.assert_allclose(o[0, :, 0], 2**-0.5 * np.einsum("tk,tkv->tv", q[0, :, 0], expected), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state[0, 0], expected[-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weight[0, 0], np.log(kept.sum(axis=0)), rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.any(gradients[1][np.isinf(k)])


def test_a_query_whose_weights_underflow_averages_nothing_and_has_no_gradient():
    x = np.full((1, 1, 1, 1), 40, np.float32)
    one = np.ones((1, 1), np.float32)
    run = lambda *inputs: kernels.hedgehog_attention(*inputs, one, one)[0].sum()  # noqa: E731
    found, gradients = jax.value_and_grad(run, argnums=(0, 1, 2))(x, -x, x)
    assert found == 0 and not np.any(gradients)


@pytest.mark.parametrize("normalize", [True, False])
def test_hedgehog_in_float16_is_as_exact_as_float16(rms, normalize):
    rng = np.random.default_rng(0)
    q, k, v = (3 * rng.standard_normal((2, 40, 2, 4)) for _ in range(3))
    half = [x.astype(np.float16) for x in (q, k, v)]
    weight = np.eye(4, dtype=np.float32)
    options = {"normalize": normalize}
    with jax.enable_x64(True):
        exact = [x.astype(np.float64) for x in half]
        expected, _ = kernels.hedgehog_attention(*exact, weight, weight, backend="reference", **options)
    o, _ = kernels.hedgehog_attention(*half, weight, weight, **options)
    assert o.dtype == jnp.float16 and rms(o, expected) < 1e-3
    state = None
    for t in range(40):
        one, state = kernels.hedgehog_attention_step(*(x[:, t] for x in half), weight, weight, state, **options)
    assert one.dtype == jnp.float16 and rms(one, np.asarray(expected)[:, -1]) < 1e-3


def test_transnormer_in_float16_stays_finite_where_its_sums_leave_the_range(rms):
    rng = np.random.default_rng(0)
    shared = 3 * rng.standard_normal(32)
    q, k, v = (shared + rng.standard_normal((1, 512, 1, 32)) for _ in range(3))
    half = [x.astype(np.float16) for x in (q, k, v)]
    with jax.enable_x64(True):
        exact = [x.astype(np.float64) for x in half]
        expected, _ = kernels.transnormer_attention(*exact, backend="reference")
    assert np.abs(np.sum(exact[1] * exact[0][:, -1:], axis=-1)).sum() > 65504
    o, state = kernels.transnormer_attention(*half, output_final_state=True)
    assert o.dtype == jnp.float16 and rms(o, expected) < 1e-3
    one, _ = kernels.transnormer_attention_step(*(x[:, -1] for x in half), state)
    assert one.dtype == jnp.float16 and np.isfinite(one).all()


FULL = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


@pytest.mark.parametrize("op", GATES)
def test_the_reference_and_the_steps_multiply_at_full_precision_on_every_device(problem, precisions, op):
    given = problem(op, 3).cast(jnp.float32)
    gates = [given.gates[name] for name in ("g", "beta") if name in given.gates]
    whole = precisions(lambda *x: given.call(*x, backend="reference"), given.arrays, given.gates)
    step = precisions(getattr(kernels, f"{op}_step"), *(x[:, 0] for x in (*given.arrays, *gates)), given.state)
    assert whole and step and {*whole, *step} == {FULL}


@pytest.mark.parametrize("op", ["delta_rule", "gated_delta_rule", "kda"])
def test_chunks_of_delta_rules_multiply_at_full_precision_whatever_the_inputs_are(problem, precisions, op):
    given = problem(op, 9).cast(jnp.bfloat16)

    def objective(arrays, gates):
        return jnp.sum(given.call(arrays, gates, backend="xla", chunk_size=4)[0].astype(jnp.float32))

    found = precisions(jax.grad(objective, argnums=(0, 1)), given.arrays, given.gates)
    assert found and set(found) == {FULL}
