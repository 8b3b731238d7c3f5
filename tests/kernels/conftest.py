"""Inputs on which linear attention goes wrong: strong and mixed decays, beta of 0 and 2, correlated and identical keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import kernels
from kernels.ops import GATES
from tests import traced

REGIMES = (
    # keys, g, beta: one row of the batch each
    ("random", "mixed", "random"),
    ("correlated", "zero", "one"),
    ("identical", "zero", "two"),
    ("random", "-20", "zero"),
    ("correlated", "mixed", "two"),
    ("identical", "mild", "random"),
)


@pytest.fixture
def float64() -> Iterator[None]:
    """64-bit types within the test, and only there."""
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arrays of one call: `problem.run(backend)` calls the op on them."""

    op: str
    arrays: tuple[np.ndarray, ...]
    gates: dict[str, np.ndarray]
    state: Any
    sequences: dict[str, np.ndarray]

    def run(self, arrays: Any = None, gates: Any = None, state: Any = None, **options: Any) -> Any:
        """(o, final state) of the op under jit, with any of the inputs replaced."""
        inputs = (arrays or self.arrays, gates or self.gates, self.state if state is None else state)
        return jax.jit(lambda arrays, gates, state: self.call(arrays, gates, initial_state=state, **self.sequences, **options))(
            *inputs
        )

    def call(self, arrays: Any, gates: Any, **options: Any) -> Any:
        """(o, final state) of the op on other arrays."""
        return getattr(kernels, self.op)(*arrays, **gates, output_final_state=True, **options)

    def cast(self, dtype: Any) -> Problem:
        """The same with q, k, v in another dtype and gates and states in float32."""
        arrays = tuple(x.astype(dtype) for x in self.arrays)
        single = jax.tree.map(lambda x: x.astype(np.float32), (self.gates, self.state))
        return dataclasses.replace(self, arrays=arrays, gates=single[0], state=single[1])


def make_problem(
    op: str,
    length: int,
    sequences: str = "one",
    *,
    heads: int = 1,
    value_heads: int = 2,
    key_size: int = 6,
    value_size: int = 4,
    regimes: tuple[tuple[str, str, str], ...] = REGIMES,
    seed: int = 0,
) -> Problem:
    """A problem in float64 whose rows (packed: heads after heads of one row) go through the regimes."""
    rng = np.random.default_rng([seed, length, sorted(GATES).index(op)])
    decay, delta = GATES[op]
    batch = len(regimes)
    if sequences == "packed":  # one row only: the regimes go to groups of heads
        heads, value_heads = heads * batch, value_heads * batch
    rows = 1 if sequences == "packed" else batch
    group = value_heads // heads

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    q, k, v = (
        normal(rows, length, heads, key_size),
        normal(rows, length, heads, key_size),
        normal(rows, length, value_heads, value_size),
    )
    g = np.zeros((rows, length, value_heads, key_size if decay == "vector" else 1))
    beta = np.zeros((rows, length, value_heads))
    for i, (keys, gate, write) in enumerate(regimes):
        if sequences == "packed":
            share = heads // batch
            at = np.s_[:, :, i * share : (i + 1) * share]
            at_values = np.s_[:, :, i * share * group : (i + 1) * share * group]
        else:
            at = at_values = np.s_[i]
        shared = rng.standard_normal(key_size)
        k[at] = {"random": k[at], "correlated": 0.5 * k[at] + shared, "identical": 0 * k[at] + shared}[keys]
        g[at_values] = {
            "zero": 0.0,
            "-20": -20.0,
            "mild": -0.05 * np.abs(rng.standard_normal(g[at_values].shape)),
            "mixed": -np.exp(3 * rng.standard_normal(g[at_values].shape)),
        }[gate]
        beta[at_values] = {"zero": 0.0, "one": 1.0, "two": 2.0, "random": rng.uniform(0, 2, beta[at_values].shape)}[write]
    gates = {}
    if delta:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        gates["beta"] = beta
    if decay in ("scalar", "vector") and op != "lightnet":
        gates["g"] = g if decay == "vector" else g[..., 0]
    states = rows
    given: dict[str, np.ndarray] = {}
    if sequences == "segments":
        given["segment_ids"] = np.sort(rng.integers(0, 4, (rows, length)), axis=1).astype(np.int32)
        given["segment_ids"][0] = np.arange(length) // 5 % 2  # a number that comes back is another segment
    if sequences == "packed":
        # Empty sequences at the beginning, in the middle and, of odd lengths, at the end; one of a single token.
        cut = length // 3
        given["cu_seqlens"] = np.array([0, 0, cut, cut, min(length, cut + 1), length, *[length] * (length % 2)], np.int32)
        states = len(given["cu_seqlens"]) - 1
    state: Any = normal(states, value_heads, key_size, value_size)
    if op == "lightnet":
        state = (state, normal(states, heads, key_size))
    return Problem(op, (q, k, v), gates, state, given)


@pytest.fixture
def problem():
    """`problem(op, length, sequences, ...)`: see `make_problem`."""
    return make_problem


def take_regime(results: list[Any], slopes: list[Any], sequences: str, number: int, count: int) -> list[np.ndarray]:
    """One regime's part of results (o, then states) and of gradients (of the inputs, the states last), as rows: of packed
    states one for each sequence, else one.
    """
    states = len(results) - 1
    if sequences == "packed":  # heads: axis 1 of states, 2 of all else
        axes = [2] + [1] * states + [2] * (len(slopes) - states) + [1] * states
    else:
        axes = [0] * (len(results) + len(slopes))

    def part(x: Any, axis: int) -> np.ndarray:
        x = np.split(np.asarray(x), count, axis)[number]
        return x.reshape(len(x) if axis else 1, -1)

    return [part(x, axis) for x, axis in zip([*results, *slopes], axes, strict=True)]


@pytest.fixture
def of_regime():
    """`of_regime(results, slopes, sequences, number, count)`: see `take_regime`."""
    return take_regime


def relative_rms(found: Any, expected: Any) -> float:
    """Root mean square of the difference over that of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.fixture
def rms():
    """`rms(found, expected)`: see `relative_rms`."""
    return relative_rms


def relative_rms_by_row(found: Any, expected: Any) -> float:
    """The largest of the relative RMS of single rows [B, ...]: of regimes with small numbers, too, such as strong decays."""
    found, expected = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (found, expected))
    error, size = (np.sqrt(np.mean(x**2, axis=1)) for x in (found - expected, expected))
    # What is zero, or too small for float32, has no relative error.
    return float(np.max(error / np.maximum(size, 1e-30)))


@pytest.fixture
def row_rms():
    """`row_rms(found, expected)`: see `relative_rms_by_row`."""
    return relative_rms_by_row


@pytest.fixture
def equations():
    """`equations(function, *arguments)`: of the traced function (`tests.traced`)."""
    return lambda function, *arguments: list(traced.equations(jax.make_jaxpr(function)(*arguments)))


@pytest.fixture
def precisions():
    """`precisions(function, *arguments)`: of every matrix product in a traced function."""

    def found(function: Any, *arguments: Any) -> list[Any]:
        every = traced.equations(jax.make_jaxpr(function)(*arguments))
        return [each.params["precision"] for each in every if each.primitive.name == "dot_general"]

    return found
