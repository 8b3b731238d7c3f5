"""The chunked algebra is the recurrence: float64, forward 1e-10, every gradient 1e-9, in every regime of `conftest.REGIMES`."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.ops import GATES
from kernels.xla import chunked

LENGTHS = (1, 63, 64, 65, 200)
COVERING = [
    # op, length, sequences, chunk size
    ("linear_attention", 200, "one", None),
    ("linear_attention", 1, "segments", None),
    ("retention", 65, "packed", 16),
    ("lightning_attention", 63, "segments", None),
    ("simple_gla", 64, "one", None),
    ("simple_gla", 200, "packed", 32),
    ("gla", 65, "one", None),
    ("gla", 63, "packed", 16),
    ("delta_rule", 63, "one", None),
    ("delta_rule", 200, "packed", 32),
    ("gated_delta_rule", 200, "one", None),
    ("gated_delta_rule", 64, "segments", 8),
    ("kda", 1, "one", None),
    ("kda", 200, "segments", None),
    ("kda", 65, "packed", 16),
    ("lightnet", 65, "segments", 16),
]
IN_SPANS = [
    ("linear_attention", 65, "segments", 16),  # five chunks in three spans: one of padding
    ("simple_gla", 200, "one", 16),
    ("gla", 65, "segments", 16),
    ("delta_rule", 1, "segments", 16),  # two spans of padding alone
    ("gated_delta_rule", 200, "segments", 16),
    ("kda", 65, "one", 16),
    ("lightnet", 63, "segments", 4),
]
EVERYTHING = list(itertools.product(GATES, LENGTHS, ("one", "segments", "packed"), (None, 16)))


def worst(found, expected) -> float:
    """Largest error of any array, relative to the largest number of the same array and row."""
    errors = []
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = (np.asarray(z).reshape(len(z), -1) for z in (x, y))
        errors.append(np.max(np.abs(x - y) / (np.max(np.abs(y), axis=1, keepdims=True) + 1e-30)))
    return float(np.max(errors))


def check_exact(problem, op: str, length: int, sequences: str, chunk_size: int | None) -> None:
    given = problem(op, length, sequences)
    inputs = (given.arrays, given.gates, given.state)
    results = jax.eval_shape(lambda x: given.run(*x), inputs)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: rng.standard_normal(x.shape), results)

    def objective(inputs, **options):
        results = given.run(*inputs, **options)
        terms = jax.tree.map(lambda x, w: jnp.sum(x * w), results, weights)  # cotangents of o and of the final state
        return sum(jax.tree.leaves(terms)), results

    def value_and_gradients(**options):
        (_, results), gradients = jax.jit(jax.value_and_grad(lambda x: objective(x, **options), has_aux=True))(inputs)
        return results, gradients

    expected, gradients = value_and_gradients(backend="reference")
    found, chunked = value_and_gradients(backend="xla", chunk_size=chunk_size)
    assert worst(found, expected) < 1e-10
    assert worst(chunked, gradients) < 1e-9


@pytest.mark.parametrize("op,length,sequences,chunk_size", COVERING)
def test_chunks_equal_the_recurrence_forward_and_backward(problem, float64, op, length, sequences, chunk_size):
    check_exact(problem, op, length, sequences, chunk_size)


@pytest.mark.full
@pytest.mark.parametrize("op,length,sequences,chunk_size", EVERYTHING)
def test_chunks_equal_the_recurrence_in_the_full_product(problem, float64, op, length, sequences, chunk_size):
    check_exact(problem, op, length, sequences, chunk_size)


@pytest.fixture
def three_spans(monkeypatch):
    """Chunks are worked on in three spans, as those of long rows are on a CPU."""
    monkeypatch.setattr(chunked, "spans_of", lambda call, size: 1 if call.sequences else 3)


@pytest.mark.parametrize("op,length,sequences,chunk_size", IN_SPANS)
def test_spans_equal_the_recurrence_forward_and_backward(problem, float64, three_spans, op, length, sequences, chunk_size):
    check_exact(problem, op, length, sequences, chunk_size)


@pytest.mark.full
@pytest.mark.parametrize("op,length,sequences,chunk_size", [each for each in EVERYTHING if each[2] != "packed"])
def test_spans_equal_the_recurrence_in_the_full_product(problem, float64, three_spans, op, length, sequences, chunk_size):
    check_exact(problem, op, length, sequences, chunk_size)
