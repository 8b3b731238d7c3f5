"""The running logsumexp of LightNet against NumPy's, over lengths on both sides of its blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels import running
from kernels.running import running_logsumexp

BLOCK = running.BLOCK
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK + 1, 200]


def keys_of(length: int) -> np.ndarray:
    """[2,T,1,3]; of the last channel most are -inf, the first of them and whole blocks among them."""
    rng = np.random.default_rng(length)
    keys = 3 * rng.standard_normal((2, length, 1, 3))
    keys[:, : length - 1 : 2, 0, 2] = keys[0, : BLOCK + 2, 0, 2] = -np.inf
    return keys


def by_hand(keys: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one sequence: keys [T,...], weight [...]. Before each token, after it, and at the end."""
    sums = np.logaddexp.accumulate(np.concatenate([weight[None], keys]), axis=0)
    return sums[:-1], sums[1:], sums[-1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("weighed", [True, False])
def test_rows(float64, length, weighed):
    keys = keys_of(length)
    weight = np.random.default_rng(1).standard_normal((2, 1, 3)) if weighed else np.full((2, 1, 3), -np.inf)
    found = running_logsumexp(jnp.asarray(keys), jnp.asarray(weight) if weighed else None, None, None)
    for row in range(2):
        for mine, expected in zip(found, by_hand(keys[row], weight[row]), strict=True):
            np.testing.assert_allclose(mine[row], expected, rtol=1e-13)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("weighed", [True, False])
def test_segments_begin_with_nothing_but_the_first(float64, length, weighed):
    keys, rng = keys_of(length), np.random.default_rng(2)
    segments = np.cumsum(rng.random((2, length)) < 0.2, axis=1)
    weight = rng.standard_normal((2, 1, 3)) if weighed else np.full((2, 1, 3), -np.inf)
    given = (jnp.asarray(weight) if weighed else None, jnp.asarray(segments), None)
    before, after, last = running_logsumexp(jnp.asarray(keys), *given)
    for row in range(2):
        for number in np.unique(segments[row]):
            part = segments[row] == number
            entering = weight[row] if number == segments[row, 0] else np.full((1, 3), -np.inf)
            expected = by_hand(keys[row, part], entering)
            np.testing.assert_allclose(before[row, part], expected[0], rtol=1e-13)
            np.testing.assert_allclose(after[row, part], expected[1], rtol=1e-13)
        np.testing.assert_allclose(last[row], expected[2], rtol=1e-13)


@pytest.mark.parametrize("weighed", [True, False])
def test_packed_sequences_and_empty_ones(float64, weighed):
    keys, ends = keys_of(70)[:1], [0, 0, 3, 3, 40, 70, 70]
    weight = np.random.default_rng(3).standard_normal((6, 1, 3)) if weighed else np.full((6, 1, 3), -np.inf)
    given = (jnp.asarray(weight) if weighed else None, None, jnp.asarray(ends))
    before, after, last = running_logsumexp(jnp.asarray(keys), *given)
    for number in range(6):
        part = slice(ends[number], ends[number + 1])
        expected = by_hand(keys[0, part], weight[number])
        np.testing.assert_allclose(before[0, part], expected[0], rtol=1e-13)
        np.testing.assert_allclose(after[0, part], expected[1], rtol=1e-13)
        np.testing.assert_allclose(last[number], expected[2], rtol=1e-13)


@pytest.mark.parametrize("length", [1, 2 * BLOCK + 3])
def test_derivatives_of_both_modes_and_of_second_order(float64, length):
    rng = np.random.default_rng(4)
    keys, weight = rng.standard_normal((1, length, 1, 2)), rng.standard_normal((1, 1, 2))
    segments = (np.arange(length) >= BLOCK + 5)[None]
    check_grads(lambda keys, weight: running_logsumexp(keys, weight, segments, None)[1:], (keys, weight), order=2, rtol=1e-5)


def test_second_derivatives_hold_where_a_sequence_begins_far_below_the_one_before():
    keys = jnp.concatenate([jnp.full((1, BLOCK + 4, 1, 1), 60.0), jnp.full((1, 9, 1, 1), -60.0)], axis=1)

    def penalty(keys, ends):
        """Of the sum of squares of z, the squared length of the gradient."""
        gradient = jax.grad(lambda keys: jnp.sum(running_logsumexp(keys, None, None, jnp.array(ends))[1] ** 2))(keys)
        return jnp.sum(gradient**2)

    packed = jax.grad(penalty)(keys, [0, BLOCK + 4, BLOCK + 13])
    apart = [jax.grad(penalty)(part, [0, part.shape[1]]) for part in (keys[:, : BLOCK + 4], keys[:, BLOCK + 4 :])]
    np.testing.assert_allclose(packed, np.concatenate(apart, axis=1), rtol=1e-4)


def test_the_gradient_loses_no_digits_over_many_tokens():
    keys = np.random.default_rng(5).standard_normal((1, 4000, 1, 8))

    def gradients(dtype):
        last = lambda keys, weight: jnp.sum(running_logsumexp(keys, weight, None, None)[2])  # noqa: E731
        found = jax.grad(last, argnums=(0, 1))(jnp.asarray(keys, dtype), jnp.zeros((1, 1, 8), dtype))
        return [np.asarray(x, np.float64) for x in found]

    found = gradients(jnp.float32)
    with jax.enable_x64(True):
        expected = gradients(jnp.float64)
    for mine, exact in zip(found, expected, strict=True):
        assert np.linalg.norm(mine - exact) < 2e-6 * np.linalg.norm(exact)


def test_keys_of_minus_infinity_have_no_gradient_and_spoil_none(float64):
    keys = keys_of(3 * BLOCK)
    gradient = jax.grad(lambda keys: jnp.sum(jnp.maximum(running_logsumexp(keys, None, None, None)[1], -50)))(jnp.asarray(keys))
    assert np.isfinite(gradient).all() and not np.any(gradient[np.isinf(keys)])
    assert np.all(gradient[np.isfinite(keys)] > 0)
