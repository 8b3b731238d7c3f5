"""The TPU kernels, interpreted: the float64 recurrence in every regime; what they cannot do they refuse."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.arguments import Tensors, checked
from kernels.ops import GATES
from kernels.registry import choose, refusal
from kernels.tpu import compiled
from kernels.tpu.limits import LARGEST_SIZE, USUAL_SIZE, heads_a_step
from strata.errors import ConfigError

REGIMES = (
    ("random", "mixed", "random"),
    ("correlated", "mild", "one"),
    ("identical", "-20", "two"),
    ("correlated", "zero", "two"),
)
UNDAMPED = (("identical", "zero", "two"),)
TOLERANCE = {"float32": (2e-6, 1e-5), "bfloat16": (5e-3, 8e-3), "float16": (5e-4, 1e-3)}
"""Of the forward pass and of gradients, by row. float16 is computed in float32 and rounded once."""
REFLECTIONS = {"correlated": (6e-6, 2e-5), "identical": (4e-5, 5e-5)}
"""In float32 where every token takes back twice what is there and no decay damps a rounding: it grows with the chunk and with
T; docs/linear_attention.md."""
COVERING = [
    # op, length, sequences, chunk size, dtype, heads of k (of v twice as many)
    ("linear_attention", 33, "segments", 16, "float32", 1),
    ("simple_gla", 40, "segments", 16, "bfloat16", 1),
    ("gla", 40, "segments", 16, "float32", 1),
    ("gated_delta_rule", 40, "segments", 32, "float32", 1),
    ("kda", 33, "one", 32, "bfloat16", 1),
    ("delta_rule", 65, "one", 32, "bfloat16", 1),
    ("gated_delta_rule", 65, "segments", 32, "bfloat16", 1),
    # Grid steps of other heads: three of six, or two of four, a step.
    ("simple_gla", 40, "segments", 32, "float32", 3),
    ("kda", 33, "segments", 16, "float32", 2),
    # Chunks of the size that runs on a TPU; what is left of the second one is one token.
    ("delta_rule", 129, "one", None, "float32", 1),
    ("gla", 70, "segments", 64, "bfloat16", 1),
    ("retention", 70, "one", 64, "float32", 1),
    ("lightnet", 40, "segments", 32, "float32", 1),
    # Sequences in chunks of their own, some empty, one of a single token; the last chunks hold none.
    ("retention", 65, "packed", 16, "float32", 1),
    ("gla", 100, "packed", 32, "bfloat16", 1),
    ("delta_rule", 33, "packed", 16, "bfloat16", 2),
    ("gated_delta_rule", 100, "packed", 32, "float32", 1),
    ("kda", 65, "packed", 16, "float32", 1),
    ("lightnet", 40, "packed", 16, "float32", 1),
    ("linear_attention", 1, "packed", 16, "float32", 1),
    ("gla", 40, "segments", 16, "float16", 1),
    ("gated_delta_rule", 40, "packed", 32, "float16", 1),
    ("lightnet", 33, "one", 16, "float16", 1),
]
EVERYTHING = list(
    itertools.product(GATES, (1, 63, 64, 65, 200), ("one", "segments", "packed"), (32, None), ("float32", "bfloat16"))
)


def tolerance(op: str, regime: tuple[str, str, str], dtype: str) -> tuple[float, float]:
    """Of the forward pass and of gradients."""
    keys, gate, write = regime
    decay, delta = GATES[op]
    reflects = delta and write == "two" and (decay == "none" or gate == "zero")
    return REFLECTIONS[keys] if reflects and dtype == "float32" else TOLERANCE[dtype]


def check_kernel(
    problem,
    row_rms,
    of_regime,
    op: str,
    length: int,
    sequences: str,
    chunk_size: int | None,
    dtype: str,
    heads: int = 1,
    regimes=REGIMES,
    sizes: tuple[int, int] = (16, 8),
) -> None:
    sizes = {"heads": heads, "value_heads": 2 * heads} | dict(zip(("key_size", "value_size"), sizes, strict=True))
    given = problem(op, length, sequences, **sizes, regimes=regimes).cast(jnp.dtype(dtype))
    inputs = (given.arrays, given.gates, given.state)
    shapes = [given.arrays[2].shape, *(x.shape for x in jax.tree.leaves(given.state))]
    weight, *weights = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in shapes)

    def gradients(inputs, **options):
        def objective(inputs):
            o, final = given.run(*inputs, **options)
            states = zip(weights, jax.tree.leaves(final), strict=True)
            return jnp.sum(o * weight.astype(o.dtype)) + sum(jnp.sum(w * x) for w, x in states), (o, final)

        slope, results = jax.jit(jax.grad(objective, has_aux=True))(inputs)
        return jax.tree.leaves(results), jax.tree.leaves(slope)

    results, slopes = gradients(inputs, backend="tpu", interpret=True, chunk_size=chunk_size)
    assert results[0].dtype == dtype and results[1].dtype == jnp.float32
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        expected, expected_slopes = gradients(exact, backend="reference")
    # A gate's gradient is two numbers in bfloat16 rows of one token, and a sum of few may cancel: rows are compared together.
    shown = regimes[:1] if length == 1 and dtype == "bfloat16" else regimes
    for number, regime in enumerate(shown):
        forward, backward = tolerance(op, regime, dtype)
        bounds = [forward] * len(results) + [backward] * len(slopes)
        pair = (of_regime(*both, sequences, number, len(shown)) for both in ((results, slopes), (expected, expected_slopes)))
        for found, wanted, bound in zip(*pair, bounds, strict=True):
            assert row_rms(found, wanted) < bound, regime


@pytest.mark.parametrize("op,length,sequences,chunk_size,dtype,heads", COVERING)
def test_interpreted_kernels_are_close_to_the_float64_recurrence(
    problem, row_rms, of_regime, op, length, sequences, chunk_size, dtype, heads
):
    check_kernel(problem, row_rms, of_regime, op, length, sequences, chunk_size, dtype, heads)


@pytest.mark.parametrize(
    "op,dtype",
    [("delta_rule", "float32"), ("delta_rule", "bfloat16"), ("gated_delta_rule", "bfloat16"), ("kda", "bfloat16")],
)
def test_reflections_along_one_key_keep_their_digits(problem, row_rms, of_regime, op, dtype):
    check_kernel(problem, row_rms, of_regime, op, 65, "one", 32, dtype, regimes=UNDAMPED)


def test_a_second_derivative_is_refused_with_the_way_out():
    q = jnp.ones((1, 16, 2, 8))

    def norm_of_gradient(q, **options):
        slope = jax.grad(lambda q: jnp.sum(jnp.sin(kernels.linear_attention(q, q, q, **options)[0])))(q)
        return jnp.sum(slope**2)

    with pytest.raises(ConfigError, match='has the first alone: give the op backend="xla"'):
        jax.grad(lambda q: norm_of_gradient(q, backend="tpu", interpret=True))(q)
    assert np.isfinite(jax.grad(lambda q: norm_of_gradient(q, backend="xla"))(q)).all()


@pytest.mark.parametrize("op,sequences", [("gla", "segments"), ("delta_rule", "packed"), ("kda", "one")])
def test_values_may_be_larger_than_keys(problem, row_rms, of_regime, op, sequences):
    check_kernel(problem, row_rms, of_regime, op, 33, sequences, 16, "float32", sizes=(8, 24))


@pytest.mark.parametrize("op", ("simple_gla", "kda"))
def test_a_decay_of_minus_infinity_forgets_everything_before(problem, op):
    given = problem(op, 40, key_size=8, value_size=16).cast(jnp.dtype("float32"))
    given.gates["g"] = np.array(given.gates["g"])
    given.gates["g"][:, 21] = -np.inf
    options = {"backend": "tpu", "interpret": True, "chunk_size": 16}
    o, final = given.run(**options)
    tail = tuple(x[:, 21:] for x in given.arrays)
    gates = {name: x[:, 21:] for name, x in given.gates.items()}
    alone, last = given.run(tail, gates, 0 * given.state, backend="reference")
    np.testing.assert_allclose(o[:, 21:], alone, atol=5e-6 * np.abs(alone).max())
    np.testing.assert_allclose(final, last, atol=5e-6 * np.abs(last).max())
    gradient = jax.grad(lambda g: jnp.sum(given.run(gates=given.gates | {"g": g}, **options)[0]))(given.gates["g"])
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, 21])


def test_the_scheduler_is_told_the_work_of_a_kernel(equations):
    batch, length, heads, keys, values, chunk = 2, 64, 2, 8, 16, 32
    q, v = jnp.ones((batch, length, heads, keys)), jnp.ones((batch, length, heads, values))
    gates = {"g": -jnp.ones((batch, length, heads)), "beta": jnp.ones((batch, length, heads))}

    def found(op, **given):
        options = {"backend": "tpu", "interpret": True, "chunk_size": chunk}
        every = equations(jax.grad(lambda q: jnp.sum(getattr(kernels, op)(q, q, v, **given, **options)[0])), q)
        return {each.params["name"]: each.params["cost_estimate"] for each in every if each.primitive.name == "pallas_call"}

    plain = found("linear_attention")
    assert set(plain) == {"none_decay_additive_forward", "none_decay_additive_backward"}
    forward, backward = plain.values()
    # q k^T, the weights' sum of v, and a product into the state and out of it: a multiplication and an addition each.
    assert forward.flops == batch * length * heads * 2 * (chunk * (keys + values) + 2 * keys * values)
    tensors = batch * length * heads * (2 * keys + values) + batch * heads * keys * values  # q, k, v and the initial state
    assert forward.bytes_accessed == 2 * 4 * tensors and forward.transcendentals == 0
    assert backward.flops == 3 * forward.flops and backward.bytes_accessed > forward.bytes_accessed
    gated = found("gated_delta_rule", **gates)["scalar_decay_delta_rule_forward"]
    assert gated.flops > forward.flops and gated.transcendentals == batch * length * heads * chunk


@pytest.mark.full
@pytest.mark.parametrize("op,length,sequences,chunk_size,dtype", EVERYTHING)
def test_interpreted_kernels_in_the_full_product(problem, row_rms, of_regime, op, length, sequences, chunk_size, dtype):
    check_kernel(problem, row_rms, of_regime, op, length, sequences, chunk_size, dtype)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"interpret": None}, "the default device is cpu"),
        ({"dtype": "float64"}, "the kernels take bfloat16 and float32"),
        ({"interpret": type("InterpretGPUParams", (), {})()}, "interpret= must be True here"),
        ({"size": 512}, "must fit VMEM: at most 256"),
        ({"chunk_size": 8}, "the kernels take 16 to 128"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(change, reason):
    size, dtype = change.pop("size", 8), change.pop("dtype", jnp.float32)
    q = jax.ShapeDtypeStruct((2, 8, 2, size), dtype)
    with pytest.raises(ConfigError, match=reason):
        kernels.explain("linear_attention", q, q, q, backend="tpu", **({"interpret": True} | change))


def test_what_overflows_the_memory_of_a_v5e_at_the_largest_size_has_fewer_heads_a_step_or_is_refused():
    def heads(op: str, dtype: str, key_size: int, value_size: int) -> int:
        return heads_a_step(*GATES[op], 16, dtype, key_size, value_size)

    assert [heads("simple_gla", "float32", *sizes) for sizes in ((128, 128), (256, 128), (128, 256))] == [4, 2, 2]
    assert [heads("gla", dtype, 256, 256) for dtype in ("bfloat16", "float32")] == [2, 1]
    assert heads("gated_delta_rule", "bfloat16", 256, 256) == 2
    q, small = (jax.ShapeDtypeStruct((2, 256, 2, size), jnp.float32) for size in (256, 128))
    taken = {"backend": "tpu", "interpret": True}
    gates = {"g": jax.ShapeDtypeStruct((2, 256, 2, 256), jnp.float32), "beta": jax.ShapeDtypeStruct((2, 256, 2), jnp.float32)}
    with pytest.raises(ConfigError, match="K = 256, V = 128 in float32; kda must fit VMEM: at most 128 each"):
        kernels.explain("kda", q, q, small, **gates, **taken)
    half = jax.ShapeDtypeStruct(q.shape, jnp.bfloat16)
    assert kernels.explain("kda", half, half, half, **gates, **taken).backend == "tpu"
    assert kernels.explain("gla", q, q, q, g=gates["g"], **taken).backend == "tpu"


def test_every_form_that_is_served_at_the_largest_size_was_compiled_there_for_every_device():
    large = [name for name, target in compiled.TARGETS.items() if target.size == LARGEST_SIZE]
    assert [name.removesuffix("_256") for name in large] == ["v5e", "v5p", "v6e", "TPU7x"]
    served = {name for name in compiled.names("v5e") if " packed_" not in name}
    for target in large:
        missing = served - set(compiled.recorded()["bundles"][target])
        assert missing == {f"vector_decay_delta_rule {way} float32" for way in compiled.ways(target)}


def test_auto_takes_an_interpreted_kernel_when_interpretation_is_asked_for():
    q = jax.ShapeDtypeStruct((2, 8, 2, 8), jnp.float32)
    assert kernels.explain("linear_attention", q, q, q, interpret=True).backend == "tpu"


def tpu_call(size=USUAL_SIZE, **changes):
    """A call of linear attention on one TPU, K = V = `size`, with fields replaced."""
    q = jax.ShapeDtypeStruct((2, 8, 2, size), jnp.float32)
    options = {"scale": None, "output_final_state": False, "chunk_size": None, "interpret": None}
    call = checked("linear_attention", Tensors(q, q, q), decay="none", delta=False, **options)
    return dataclasses.replace(call, **{"platform": "tpu", "devices": 1} | changes)


def test_auto_takes_the_kernels_on_one_tpu_and_the_chunked_form_on_a_mesh():
    assert choose(tpu_call()).backend == "tpu"
    mesh = tpu_call(devices=4)
    assert choose(mesh).backend == "xla"
    assert "within jax.shard_map" in choose(mesh).refusals["tpu"]
    assert "by name only" in choose(mesh).refusals["reference"]
    assert refusal(mesh, "tpu") is None


def test_auto_takes_packed_rows_at_the_size_at_which_they_were_compiled():
    assert choose(tpu_call(LARGEST_SIZE)).backend == choose(tpu_call(sequences=3)).backend == "tpu"
    large = tpu_call(LARGEST_SIZE, sequences=3)
    assert choose(large).backend == "xla" and refusal(large, "tpu") is None
    assert "its kernels of packed rows were compiled at K = V = 128 in chunks of 128" in choose(large).refusals["tpu"]


def test_bundle_counts_are_those_of_the_kernels_as_they_are():
    record = compiled.recorded()
    assert set(record["bundles"]) == set(compiled.TARGETS)
    for target, counts in record["bundles"].items():
        assert set(counts) == set(compiled.names(target)) and all(count > 0 for count in counts.values())
    assert record["source"] == compiled.source_hash(), "pip install libtpu; python -m kernels.tpu.compiled --write"


def test_what_is_compiled_is_hashed_beyond_the_sources(monkeypatch):
    before = compiled.source_hash()
    monkeypatch.setattr(compiled, "CHUNK", 64)
    chunk = compiled.source_hash()
    monkeypatch.setattr(compiled, "heads_a_step", lambda *choices: 1)
    assert len({before, chunk, compiled.source_hash()}) == 3


def test_a_grown_bundle_count_is_named():
    before = {"v6e": {"a": 10, "b": 10}}
    assert compiled.grown({"v6e": {"a": 11, "b": 9, "c": 5}}, before) == ["v6e: a has 11 bundles, was 10"]


def test_a_part_compiled_alone_replaces_only_itself_while_sources_and_versions_are_the_same():
    versions = {"jax": "1", "libtpu": "1"}
    record = {"source": "old", "versions": versions, "bundles": {"v5e": {"a": 1, "b": 2}, "v6e": {"a": 3}}}
    found = {"TPU7x": {"a": 6}, "v5e": {"b": 5}}
    kept = compiled.merged(found, record, "old", versions)["bundles"]
    assert kept == {"v5e": {"a": 1, "b": 5}, "v6e": {"a": 3}, "TPU7x": {"a": 6}}
    assert list(kept) == [name for name in compiled.TARGETS if name in kept]
    alone = {"bundles": {"v5e": {"b": 5}, "TPU7x": {"a": 6}}}
    earlier = {"earlier": {"v5e": {"a": 1}, "v6e": {"a": 3}}}
    assert compiled.merged(found, record, "new", versions) == alone | earlier
    assert compiled.merged(found, record, "old", versions | {"libtpu": "2"}) == alone | earlier
    assert compiled.merged(found, {}, "new", versions) == alone


def test_growth_is_seen_across_a_change_of_sources_compiled_in_parts():
    versions = {"jax": "1", "libtpu": "1"}
    record = {"source": "old", "versions": versions, "bundles": {"v5e": {"a": 1}, "v6e": {"a": 3}}}
    record = {"source": "new", "versions": versions} | compiled.merged({"v5e": {"a": 1}}, record, "new", versions)
    assert compiled.grown({"v6e": {"a": 4}}, compiled.known(record)) == ["v6e: a has 4 bundles, was 3"]
    whole = compiled.merged({"v6e": {"a": 4}}, record, "new", versions)
    assert whole == {"bundles": {"v5e": {"a": 1}, "v6e": {"a": 4}}}
