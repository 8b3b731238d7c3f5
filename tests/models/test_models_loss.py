"""Chunked cross-entropy is the plain one: values, gradients, counts, without the logits of all tokens."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import loss


def problem(batch=3, length=7, width=8, vocab=13, seed=0):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.standard_normal((batch, length, width)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((width, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    weights = jnp.asarray(rng.random((batch, length)) * (rng.random((batch, length)) > 0.3), jnp.float32)
    assert (weights == 0).any() and (weights > 0).any()
    return h, kernel, targets, weights


def direct(h, kernel, targets, weights, cap=None):
    logits = jnp.einsum("btd,dv->btv", h, kernel, precision="highest")
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * chosen), jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets))


def gradients(function, scale=1.0):
    return jax.jit(jax.value_and_grad(lambda h, kernel, *rest: scale * function(h, kernel, *rest)[0], argnums=(0, 1)))


@pytest.mark.parametrize("chunk", [None, 1, 7, 9, 10_000])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_value_counts_and_gradients_are_those_of_log_softmax(chunk, cap):
    data = problem()
    chunked = lambda *data: models.cross_entropy(*data, cap=cap, chunk=chunk)  # noqa: E731
    plain = lambda *data: direct(*data, cap=cap)  # noqa: E731
    np.testing.assert_allclose(jax.jit(chunked)(*data), plain(*data), rtol=1e-5)
    # Times three: the gradient is taken in the forward pass, and only scaled in the backward.
    value, found = gradients(chunked, 3.0)(*data)
    expected_value, expected = gradients(plain, 3.0)(*data)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradients_are_those_of_finite_differences_in_float64():
    h, kernel, targets, weights = (np.asarray(x, np.float64) if x.dtype == jnp.float32 else np.asarray(x) for x in problem())

    def nats(h, kernel):
        logits = 2.0 * np.tanh(h @ kernel / 2.0)
        log = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (weights * log).sum()

    _, (dh, dkernel) = gradients(lambda *data: models.cross_entropy(*data, cap=2.0, chunk=4))(*problem())
    rng = np.random.default_rng(1)
    for _ in range(3):
        u, v = rng.standard_normal(h.shape), rng.standard_normal(kernel.shape)
        slope = (nats(h + 1e-6 * u, kernel + 1e-6 * v) - nats(h - 1e-6 * u, kernel - 1e-6 * v)) / 2e-6
        assert (dh * u).sum() + (dkernel * v).sum() == pytest.approx(slope, rel=1e-4)


def test_a_second_derivative_is_that_of_log_softmax():
    data = problem()

    def curvature(function):
        slope = lambda h, kernel: jax.grad(lambda h: function(h, kernel, *data[2:])[0])(h)  # noqa: E731
        return jax.jit(jax.grad(lambda h, kernel: jnp.sum(slope(h, kernel) ** 2), argnums=(0, 1)))(*data[:2])

    found = curvature(lambda *data: models.cross_entropy(*data, chunk=6))
    for a, b in zip(found, curvature(direct), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_tokens_of_weight_zero_change_nothing_and_none_at_all_gives_zero():
    h, kernel, targets, weights = problem()
    other = jnp.where(weights == 0, (targets + 5) % 13, targets)
    moved = jnp.where(weights[..., None] == 0, 50.0, h)
    entropy = jax.jit(lambda *data: models.cross_entropy(*data, chunk=6))
    np.testing.assert_allclose(entropy(moved, kernel, other, weights), entropy(h, kernel, targets, weights), rtol=1e-6)
    value, found = gradients(models.cross_entropy)(h, kernel, targets, jnp.zeros_like(weights))
    assert float(value) == 0 and not any(np.any(gradient) for gradient in found)
    assert [float(x) for x in entropy(h, kernel, targets, jnp.zeros_like(weights))] == [0, 0]


def test_a_constant_shift_of_huge_logits_costs_no_digits():
    h = jnp.ones((1, 2, 1))
    kernel = jnp.array([[1e6, 1e6 + 1, 1e6 - 2]])
    nats, right = models.cross_entropy(h, kernel, jnp.array([[0, 1]]), jnp.ones((1, 2)))
    expected = 2 * math.log(1 + math.e + math.exp(-2)) - 1
    assert float(nats) == pytest.approx(expected, rel=1e-6) and float(right) == 1


def test_among_equal_logits_the_first_is_the_guess_so_that_a_zero_head_is_not_all_right():
    h, kernel, targets, _ = problem()
    _, right = models.cross_entropy(h, jnp.zeros_like(kernel), targets, jnp.ones(targets.shape))
    assert float(right) == int((targets == 0).sum()) < targets.size


def test_bfloat16_hidden_states_give_a_float32_loss_and_gradients_of_the_right_types():
    h, kernel, targets, weights = problem(width=64)
    kernel = kernel * 64**-0.5
    half = lambda chunk: gradients(lambda *data: models.cross_entropy(*data, chunk=chunk))  # noqa: E731
    value, (dh, dkernel) = half(6)(h.astype(jnp.bfloat16), kernel, targets, weights)
    assert (value.dtype, dh.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact_value, exact = gradients(direct)(h, kernel, targets, weights)
    assert float(value) == pytest.approx(float(exact_value), rel=0.01)
    for a, b in zip((dh, dkernel), exact, strict=True):
        assert np.linalg.norm(a.astype(jnp.float32) - b) < 0.02 * np.linalg.norm(b)


def test_a_bfloat16_gradient_is_scaled_in_float32():
    h, kernel, targets, weights = problem()
    scale = 1 / 3  # bfloat16 would make it 0.334
    plain, scaled = (
        gradients(models.cross_entropy, factor)(h.astype(jnp.bfloat16), kernel, targets, weights)[1][0]
        for factor in (1.0, scale)
    )
    expected = np.asarray(plain.astype(jnp.float32) * np.float32(scale))
    kept = np.abs(expected) > 0
    ratio = np.asarray(scaled.astype(jnp.float32))[kept] / expected[kept]
    assert abs(np.mean(ratio) - 1) < 4e-4  # rounding to bfloat16 first: 9.8e-4 to one side


def largest_float32(text: str, without: tuple[int, ...]) -> int:
    """Elements of the largest float32 array of a compiled program."""
    sizes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    return max(math.prod(size) for size in sizes if size not in (without, without[::-1]))


def test_no_float32_array_of_all_tokens_by_the_vocabulary_exists_when_chunked():
    batch, length, width, vocab, chunk = 4, 96, 8, 1009, 64
    data = problem(batch, length, width, vocab)

    def largest(chunk):
        program = gradients(lambda *data: models.cross_entropy(*data, chunk=chunk)).lower(*data).compile()
        return largest_float32(program.as_text(), (width, vocab))

    assert largest(chunk) == chunk * vocab
    assert largest(batch * length) == batch * length * vocab  # the check sees it when it is there


def test_by_default_the_logits_at_one_time_fit_into_a_budget(monkeypatch):
    data = problem(4, 96, 8, 1009)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 32 * 4 * 1009)
    program = gradients(lambda *data: models.cross_entropy(*data)).lower(*data).compile()
    assert largest_float32(program.as_text(), (8, 1009)) <= 32 * 1009


def test_the_models_own_logits_have_the_same_loss_tied_or_not(config, awake, run, tokens):
    rows, targets, weights = tokens(2, 6), tokens(2, 6, seed=1), jnp.ones((2, 6))
    for tied in (False, True):
        model = awake(config(tie_embeddings=tied, logit_softcap=3.0))
        nats, _ = models.cross_entropy(model.hidden(rows)[0], model.output_kernel(), targets, weights, cap=3.0, chunk=5)
        log = jax.nn.log_softmax(run(model, rows))
        expected = -np.take_along_axis(np.asarray(log), np.asarray(targets)[..., None], axis=-1).sum()
        assert float(nats) == pytest.approx(expected, rel=1e-5)
