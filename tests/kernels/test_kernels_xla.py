"""The chunked back-end as a part of programs: dtypes, strong decays, transformations, higher derivatives, sharding."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kernels
from kernels import samples
from kernels.ops import GATES, call_of
from kernels.xla import chunked
from kernels.xla.limits import spans_of

TAME = (("random", "mixed", "random"), ("correlated", "mild", "one"), ("identical", "-20", "two"))
TOLERANCE = {"float32": (2e-6, 1e-5), "bfloat16": (5e-3, 8e-3), "float16": (5e-4, 1e-3)}


@pytest.mark.parametrize("op,dtype", [("simple_gla", "float16"), ("gla", "bfloat16"), ("gated_delta_rule", "float32")])
def test_low_precision_stays_close_to_float64_and_states_are_float32(problem, row_rms, op, dtype):
    given = problem(op, 130, key_size=16, value_size=16, regimes=TAME).cast(jnp.dtype(dtype))
    inputs = (given.arrays, given.gates, given.state)
    weight = np.random.default_rng(0).standard_normal(given.arrays[2].shape).astype(np.float32)

    def gradients(inputs, **options):
        def objective(inputs):
            o, final = given.run(*inputs, **options)
            return jnp.sum(o * weight.astype(o.dtype)) + jnp.sum(final), (o, final)

        return jax.jit(jax.grad(objective, has_aux=True))(inputs)

    found, (o, final) = gradients(inputs)
    assert o.dtype == dtype and final.dtype == jnp.float32
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        expected, (o_exact, final_exact) = gradients(exact, backend="reference")
    forward, backward = TOLERANCE[dtype]
    assert row_rms(o, o_exact) < forward and row_rms(final, final_exact) < forward
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert row_rms(x, y) < backward


@pytest.mark.parametrize("op", ("delta_rule", "gated_delta_rule"))
def test_reflections_along_one_key_keep_their_digits_in_float32(problem, rms, op):
    """Identical keys, beta = 2, no decay: nothing damps a rounding, so the bounds are wider than elsewhere.

    One unit in the last place of |k|^2, which depends on the order a processor sums in, is met again at every token. Unstable
    inversions lose all digits here.
    """
    given = problem(op, 65, key_size=16, value_size=8, regimes=(("identical", "zero", "two"),)).cast(jnp.float32)
    inputs = (given.arrays, given.gates, given.state)

    def gradients(inputs, **options):
        def objective(inputs):
            o, final = given.run(*inputs, **options)
            return jnp.sum(jnp.sin(o)) + jnp.sum(final), (o, final)

        return jax.jit(jax.grad(objective, has_aux=True))(inputs)

    found, results = gradients(inputs)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        expected, wanted = gradients(exact, backend="reference")
    assert all(rms(x, y) < 1e-4 for x, y in zip(results, wanted, strict=True))
    assert all(rms(x, y) < 5e-4 for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


@pytest.mark.parametrize("length", [65, 512, pytest.param(2048, marks=pytest.mark.slow)])
def test_reflections_along_one_key_lose_digits_with_the_length_as_the_card_says(rms, length):
    """What the recurrence keeps is lost in chunks, and gradients lose more: `docs/linear_attention.md`, *Exactness*."""
    largest = {
        # length: output and final state in chunks, gradients; the same of the recurrence
        65: ((5e-5, 1e-4), (3e-6, 1e-5)),
        512: ((8e-4, 5e-2), (1e-5, 1e-3)),
        2048: ((3e-3, 0.5), (2e-5, 1e-3)),
    }[length]
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(16)
    k = np.broadcast_to(shared / np.linalg.norm(shared), (1, length, 1, 16))
    q, v = (rng.standard_normal((1, length, 1, size)) for size in (16, 8))
    inputs = [x.astype(np.float32) for x in (q, k, v, np.full((1, length, 1), 2.0))]

    def gradients(inputs, backend):
        def objective(*inputs):
            o, final = kernels.delta_rule(*inputs, output_final_state=True, backend=backend)
            return jnp.sum(jnp.sin(o)) + jnp.sum(final), (o, final)

        return jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)

    with jax.enable_x64(True):
        expected, wanted = gradients([x.astype(np.float64) for x in inputs], "reference")
    for backend, (forward, backward) in zip(("xla", "reference"), largest, strict=True):
        found, results = gradients(inputs, backend)
        assert max(rms(x, y) for x, y in zip(results, wanted, strict=True)) < forward
        assert max(rms(x, y) for x, y in zip(found, expected, strict=True)) < backward


def test_an_error_in_a_row_of_small_numbers_is_seen(rms, row_rms):
    expected = np.array([[1.0, 2.0], [1e-9, 2e-9], [0.0, 0.0]])
    found = expected * np.array([[1.0], [3.0], [1.0]])
    assert rms(found, expected) < 1e-8 and row_rms(found, expected) == pytest.approx(2)


def test_long_sums_of_strong_decays_cost_no_digits_of_the_weak_ones(rms):
    """-20 a token on the first half of a chunk, -0.01 on the second: G is near -640 where its differences matter."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 64, 1, 16)).astype(np.float32) for _ in range(3))
    g = np.where(np.arange(64) < 32, -20.1, -0.013).astype(np.float32)[None, :, None]
    vector = np.broadcast_to(g[..., None], q.shape)
    with jax.enable_x64(True):
        expected, _ = kernels.simple_gla(*(x.astype(np.float64) for x in (q, k, v, g)), backend="reference")
    assert rms(jax.jit(kernels.simple_gla)(q, k, v, g)[0], expected) < 5e-7
    assert rms(jax.jit(kernels.gla)(q, k, v, vector)[0], expected) < 5e-7


@pytest.mark.parametrize("op", ("linear_attention", "simple_gla", "gla"))
def test_products_of_additive_forms_are_never_rounded_in_float32_and_in_bfloat16_are_left_to_the_device(
    problem, precisions, op
):
    """TPUs and GPUs round operands of float32 products unless told not to, a CPU does not: this is read off the program."""

    def found(dtype):
        given = problem(op, 40).cast(jnp.dtype(dtype))
        inputs = (given.arrays, given.gates, given.state)
        return precisions(jax.grad(lambda x: sum(jnp.sum(y) for y in given.run(*x, chunk_size=16))), inputs)

    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(found("float32")) > 5 and set(found("float32")) == {highest}
    assert None in found("bfloat16")


@pytest.mark.parametrize("op", ("simple_gla", "kda"))
def test_a_decay_of_minus_infinity_forgets_everything_before(problem, float64, op):
    given = problem(op, 40)
    given.gates["g"][:, 21] = -np.inf
    o, final = given.run(chunk_size=16)
    tail = tuple(x[:, 21:] for x in given.arrays)
    gates = {name: x[:, 21:] for name, x in given.gates.items()}
    alone, last = given.run(tail, gates, 0 * given.state, backend="reference")
    np.testing.assert_allclose(o[:, 21:], alone, atol=1e-12 * np.abs(alone).max())
    np.testing.assert_allclose(final, last, atol=1e-12 * np.abs(last).max())
    gradient = jax.jit(jax.grad(lambda g: jnp.sum(given.run(gates=given.gates | {"g": g}, chunk_size=16)[0])))(given.gates["g"])
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("spans", (1, 2))
def test_the_second_derivative_is_that_of_the_recurrence(problem, float64, monkeypatch, spans):
    monkeypatch.setattr(chunked, "spans_of", lambda call, size: spans)
    given = problem("kda", 9, key_size=3, value_size=2, regimes=(("random", "mild", "random"), ("correlated", "zero", "two")))
    inputs = (given.arrays, given.gates, given.state)

    def norm_of_gradient(inputs, **options):
        slope = jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in given.run(*x, **options)))(inputs)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(slope))

    expected = jax.jit(jax.grad(lambda x: norm_of_gradient(x, backend="reference")))(inputs)
    found = jax.jit(jax.grad(lambda x: norm_of_gradient(x, backend="xla", chunk_size=4)))(inputs)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-9 * np.abs(y).max())


def test_vmap_scan_and_remat_change_nothing(problem, float64):
    given = problem("gated_delta_rule", 20)
    inputs = (given.arrays, given.gates, given.state)

    def objective(inputs):
        return jnp.sum(jnp.sin(given.run(*inputs, chunk_size=8)[0]))

    def by_row(inputs):
        return jnp.sum(jax.vmap(lambda row: objective(jax.tree.map(lambda x: x[None], row)))(inputs))

    def scanned(inputs):
        body = jax.checkpoint(lambda total, _: (total + objective(inputs), None))
        return jax.lax.scan(body, 0.0, None, length=2)[0] / 2

    expected = jax.jit(jax.value_and_grad(objective))(inputs)
    for other in (by_row, scanned):
        found = jax.jit(jax.value_and_grad(other))(inputs)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12 * np.abs(y).max()), found, expected)


@pytest.mark.parametrize("op", GATES)
def test_remat_changes_no_gradient(problem, float64, op):
    given = problem(op, 7, regimes=(("random", "mild", "random"),))
    inputs = (given.arrays, given.gates, given.state)

    def objective(inputs):
        arrays, gates, state = inputs
        o, final = given.call(arrays, gates, initial_state=state, chunk_size=4)
        return jnp.sum(jnp.sin(o)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(final))

    expected, found = jax.jit(lambda x: (jax.grad(objective)(x), jax.grad(jax.checkpoint(objective))(x)))(inputs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12 * np.abs(y).max()), found, expected)


def test_segments_are_sequences_of_their_own(problem, float64):
    given = problem("kda", 48)
    segment_ids = np.repeat([[1, 2, 0]], 16, axis=1).repeat(len(given.state), axis=0)
    o, final = jax.jit(lambda *x: given.call(*x, segment_ids=segment_ids, chunk_size=32))(given.arrays, given.gates)
    alone = jax.jit(given.call)
    for part in range(3):
        cut = jax.tree.map(lambda x, i=16 * part: x[:, i : i + 16], (given.arrays, given.gates))
        expected, state = alone(*cut)
        np.testing.assert_allclose(o[:, 16 * part : 16 * part + 16], expected, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(final, state, atol=1e-12 * np.abs(state).max())


def test_the_final_state_continues_the_sequence(problem, float64):
    given = problem("lightnet", 40)
    whole, final = given.run()
    first, state = given.run(tuple(x[:, :20] for x in given.arrays))
    second, last = given.run(tuple(x[:, 20:] for x in given.arrays), state=state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-12)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), last, final)


def long_call(platform: str = "cpu", *, shape: tuple[int, ...] = (2, 8192, 4, 64), **sequences: jax.ShapeDtypeStruct):
    """The checked call of `linear_attention` on arrays of a shape [B,T,H,K], as if on a device of `platform`."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return dataclasses.replace(call_of("linear_attention", x, x, x, **sequences), platform=platform)


def test_long_rows_are_worked_on_in_spans_on_a_cpu_alone():
    assert spans_of(long_call(), 64) == 16 and spans_of(long_call(), 32) == 32
    assert spans_of(long_call(shape=(1, 32769, 1, 8)), 64) == 1  # small enough for the caches as it is
    assert spans_of(long_call(shape=(1, 32768, 1, 64)), 64) == 16 and spans_of(long_call(shape=(1, 32769, 1, 64)), 64) == 17
    assert spans_of(long_call(shape=(16, 512, 8, 64)), 64) == 1  # many rows: a span would be of a chunk or two
    assert spans_of(long_call("gpu"), 64) == spans_of(long_call("tpu"), 64) == 1
    bounds = jax.ShapeDtypeStruct((3,), jnp.int32)
    assert spans_of(long_call(shape=(1, 16384, 4, 64), cu_seqlens=bounds), 64) == 1


def test_a_row_long_enough_for_spans_has_the_same_results_in_them(monkeypatch, rms):
    given = samples.inputs("gated_delta_rule", 1, 4133, 2, 130)
    asked = []

    def run(spans):
        monkeypatch.setattr(chunked, "spans_of", lambda call, size: asked.append(spans(call, size)) or asked[-1])

        def objective(q, k, v, g, beta):
            o, final = kernels.gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True, backend="xla")
            return jnp.sum(o**2) + jnp.sum(final), (o, final)

        return jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3, 4), has_aux=True))(*given)

    found, expected = run(spans_of), run(lambda call, size: 1)
    assert asked[0] > 2 and asked[-1] == 1
    assert all(rms(x, y) < 1e-6 for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


def on_a_mesh(op: str) -> None:
    """Batch and heads split over four devices: the same numbers, the outputs stay split, no operand is sent anywhere."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 40, 2, 8)).astype(np.float32) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gates = (-np.abs(q), np.full((2, 40, 2), 0.5, np.float32)) if op == "kda" else ()
    segment_ids = np.sort(rng.integers(0, 3, (2, 40)), axis=1)
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))

    @jax.jit
    def run(arrays, segment_ids):
        def objective(arrays):
            o, _ = getattr(kernels, op)(*arrays, segment_ids=segment_ids, chunk_size=16)
            return jnp.sum(jnp.sin(o)), o

        return jax.grad(objective, has_aux=True)(arrays)

    arrays = (q, k, v, *gates)
    expected = run(arrays, segment_ids)
    placed = jax.device_put(arrays, split), jax.device_put(segment_ids, NamedSharding(mesh, PartitionSpec("data")))
    for x, y in zip(jax.tree.leaves(run(*placed)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
        assert x.sharding.is_equivalent_to(split, x.ndim)
    program = run.lower(*placed).compile().as_text()
    assert not [name for name in ("all-gather", "all-to-all", "collective-permute") if name in program]


def test_a_sharded_batch_and_sharded_heads_need_no_gathering():
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    program = "import importlib.util as u, sys; s = u.spec_from_file_location('t', sys.argv[1]); m = u.module_from_spec(s);"
    program += " s.loader.exec_module(m); m.on_a_mesh('kda'); m.on_a_mesh('lightnet');"
    program += " m.chunked.spans_of = lambda call, size: 2; m.on_a_mesh('kda')"
    done = subprocess.run(
        [sys.executable, "-c", program, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
