"""The Hopper kernels against the float64 recurrence: in the GPU interpreter with race detection, or on a Hopper GPU.

They are written for one version of JAX; with others everything that runs a kernel is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.arguments import Tensors, checked
from kernels.mosaic_gpu import compiled, interpreter, limits
from kernels.ops import GATES
from kernels.registry import choose, refusal
from strata.errors import ConfigError

ON_GPU = jax.default_backend() == "gpu"
FITS = limits.VERSIONS[0] <= limits.version() < limits.VERSIONS[1]
needs_jax = pytest.mark.skipif(not FITS, reason=f"jax {jax.__version__}: the Hopper kernels are written for jax 0.11.2")
REGIMES = (("random", "mixed", "random"), ("correlated", "mild", "one"), ("identical", "-20", "two"))
DTYPES = ("float32", "bfloat16")
"""That have kernels of their own."""
TOLERANCE = {"float32": (2e-6, 1e-5), "bfloat16": (5e-3, 8e-3), "float16": (5e-4, 1e-3)}
"""Of the forward pass and of gradients, by row. float16 is computed in float32 and rounded once."""
COVERING = [
    # op, length, sequences, dtype, K, V
    ("linear_attention", 65, "one", "bfloat16", 16, 8),
    ("retention", 64, "one", "float32", 128, 64),
    ("simple_gla", 130, "segments", "float32", 16, 8),
    ("gla", 64, "one", "bfloat16", 16, 8),
    ("gla", 65, "segments", "float32", 16, 136),
    ("gla", 200, "segments", "bfloat16", 16, 8),
    ("delta_rule", 65, "one", "bfloat16", 16, 8),
    ("gated_delta_rule", 65, "segments", "float32", 16, 8),
    ("gated_delta_rule", 64, "one", "bfloat16", 128, 128),
    ("kda", 65, "segments", "float32", 16, 8),
    ("kda", 65, "one", "bfloat16", 16, 136),
    ("kda", 128, "segments", "bfloat16", 128, 64),
    # Pairs of tiles of V: two warpgroups compute, one brings, with one slot and with two, each filled again.
    ("gla", 200, "segments", "bfloat16", 16, 128),
    ("kda", 130, "one", "bfloat16", 128, 128),
    ("gated_delta_rule", 200, "packed", "bfloat16", 16, 72),
    ("linear_attention", 130, "one", "bfloat16", 16, 200),
    # Sequences in chunks of their own, some empty, one of a single token.
    ("simple_gla", 200, "packed", "bfloat16", 16, 8),
    ("gated_delta_rule", 100, "packed", "float32", 16, 8),
    ("kda", 65, "packed", "bfloat16", 16, 8),
    ("gla", 65, "one", "float16", 16, 8),
]
KERNELS = ("pairs", "states", "outputs", "dstates", "gradients")
EVERYTHING = [
    case
    for case in itertools.product(GATES, (1, 63, 64, 65, 200), ("one", "segments", "packed"), DTYPES, (16, 64, 128), (8, 128))
    # Delta rules in float32 are served up to K = 64.
    if not (GATES[case[0]][1] and case[3] == "float32" and case[4] > limits.TILE)
]


def check_kernels(problem, row_rms, of_regime, op, length, sequences, dtype, key_size, value_size, regimes=REGIMES) -> None:
    given = problem(op, length, sequences, key_size=key_size, value_size=value_size, regimes=regimes).cast(jnp.dtype(dtype))
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

    options = {} if ON_GPU else {"interpret": interpreter.parameters()}
    with contextlib.nullcontext() if ON_GPU else interpreter.session():
        results, slopes = jax.block_until_ready(gradients(inputs, backend="mosaic_gpu", **options))
        if ON_GPU:
            again = gradients(inputs, backend="mosaic_gpu")
            jax.tree.map(np.testing.assert_array_equal, (results, slopes), again)
    assert results[0].dtype == dtype and results[1].dtype == jnp.float32
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        expected, expected_slopes = gradients(exact, backend="reference")
    forward, backward = (5e-3, 5e-3) if ON_GPU and dtype != "bfloat16" else TOLERANCE[dtype]
    bounds = [forward] * len(results) + [backward] * len(slopes)
    for number in range(len(regimes)):
        pair = (of_regime(*both, sequences, number, len(regimes)) for both in ((results, slopes), (expected, expected_slopes)))
        for found, wanted, bound in zip(*pair, bounds, strict=True):
            assert row_rms(found, wanted) < bound, regimes[number]


@needs_jax
@pytest.mark.hopper
@pytest.mark.parametrize("op,length,sequences,dtype,key_size,value_size", COVERING)
def test_kernels_are_close_to_the_float64_recurrence(
    problem, row_rms, of_regime, op, length, sequences, dtype, key_size, value_size
):
    check_kernels(problem, row_rms, of_regime, op, length, sequences, dtype, key_size, value_size)


@needs_jax
@pytest.mark.hopper
@pytest.mark.parametrize("op,dtype", [("simple_gla", "float32"), ("gla", "bfloat16"), ("kda", "float32")])
def test_a_sequence_in_pieces_is_the_same_sequence(monkeypatch, problem, row_rms, of_regime, op, dtype):
    from kernels.mosaic_gpu import split
    from kernels.mosaic_gpu.layout import Size

    monkeypatch.setattr(split, "SHORTEST", 1)
    assert split.pieces(Size(batch=1, heads=2, chunks=4, key_tiles=1, value_tiles=1)) == 4
    check_kernels(problem, row_rms, of_regime, op, 200, "segments", dtype, 16, 8, REGIMES[1:2])


@needs_jax
def test_only_sequences_with_too_few_heads_are_split():
    from kernels.mosaic_gpu import split
    from kernels.mosaic_gpu.layout import Size

    pieces = {(2, 16384, 16): 4, (1, 16384, 16): 8, (1, 8192, 96): 1, (8, 4096, 16): 1, (1, 1024, 16): 4, (1, 512, 16): 1}
    for (batch, length, heads), count in pieces.items():
        size = Size(batch=batch, heads=heads, chunks=length // limits.TILE, key_tiles=2, value_tiles=2)
        assert split.pieces(size) == count


@needs_jax
@pytest.mark.full
@pytest.mark.parametrize("op,length,sequences,dtype,key_size,value_size", EVERYTHING)
def test_kernels_in_the_full_product(problem, row_rms, of_regime, op, length, sequences, dtype, key_size, value_size):
    check_kernels(problem, row_rms, of_regime, op, length, sequences, dtype, key_size, value_size)


@needs_jax
@pytest.mark.hopper
@pytest.mark.parametrize("op,dtype", [("delta_rule", "bfloat16"), ("gated_delta_rule", "bfloat16"), ("kda", "bfloat16")])
@pytest.mark.parametrize("keys", ["correlated", "identical"])
def test_reflections_without_a_decay_keep_their_digits(problem, row_rms, of_regime, op, dtype, keys):
    check_kernels(problem, row_rms, of_regime, op, 65, "one", dtype, 16, 8, ((keys, "zero", "two"),))


@needs_jax
@pytest.mark.hopper
@pytest.mark.skipif(ON_GPU, reason="the interpreter runs on a CPU")
@pytest.mark.parametrize("ordered", [True, False])
def test_a_race_is_an_error_whichever_kernel_of_several_has_it(ordered):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(out, shared, barrier, *, ordered):
        thread = jax.lax.axis_index("thread")

        @pl.when(thread == 0)
        def write():
            shared[...] = jnp.ones((128,), jnp.float32)

        if ordered:
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        @pl.when(thread == 1)
        def read():
            out[...] = shared[...] + 1.0

    def kernel(ordered):
        return plgpu.kernel(
            functools.partial(body, ordered=ordered),
            out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
            scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier(num_arrivals=2)],
            num_threads=2,
            thread_name="thread",
            interpret=interpreter.parameters(),
        )

    def run():
        with interpreter.session():
            jax.block_until_ready(kernel(ordered)())
            jax.block_until_ready(kernel(True)())  # what JAX keeps of it says nothing of the kernel before

    if ordered:
        run()
    else:
        with pytest.raises(RuntimeError, match="a kernel has a race"):
            run()


def call_of(**changes):
    """A call of linear attention, with fields replaced."""
    q = jax.ShapeDtypeStruct((2, 8, 2, 8), jnp.bfloat16)
    options = {"scale": None, "output_final_state": False, "chunk_size": None, "interpret": None}
    call = checked("linear_attention", Tensors(q, q, q), decay="none", delta=False, **options)
    return dataclasses.replace(call, **{"platform": "gpu", "capability": "9.0", "devices": 1} | changes)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"platform": "cpu"}, "the default device is cpu; the kernels need a Hopper GPU"),
        ({"capability": "8.0"}, "compute capability 8.0; the kernels need 9.0"),
        ({"dtype": "float64"}, "the kernels take bfloat16 and float32"),
        ({"dtype": "float16", "delta": True, "key_size": 128}, "K = 128 in float32"),
        ({"chunk_size": 32}, "chunk_size = 32; the kernels take 64"),
        ({"key_size": 256}, "must fit the registers: at most K = 128 and V = 256"),
        ({"dtype": "float32", "delta": True, "key_size": 128}, "K = 128 in float32"),
        (
            {"dtype": "float32", "decay": "vector", "value_size": 130},
            "V = 130: linear_attention in float32 would spill registers",
        ),
        ({"interpret": True}, "interpret= must be parameters of the GPU interpreter"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(monkeypatch, change, reason):
    monkeypatch.setattr(limits, "version", lambda: limits.VERSIONS[0])
    assert reason in refusal(call_of(**change), "mosaic_gpu")
    with pytest.raises(ConfigError, match='backend="mosaic_gpu" cannot serve this call'):
        choose(call_of(**change), "mosaic_gpu")


def test_they_serve_by_name_on_a_hopper_gpu_with_the_jax_they_are_written_for(monkeypatch):
    monkeypatch.setattr(limits, "version", lambda: limits.VERSIONS[0])
    assert choose(call_of(), "mosaic_gpu").backend == "mosaic_gpu"
    assert choose(call_of(decay="vector", value_size=256), "mosaic_gpu").backend == "mosaic_gpu"
    assert choose(call_of()).backend == "xla"
    monkeypatch.setattr(limits, "version", lambda: (0, 10, 2))
    assert "jax 0.10.2 is installed" in refusal(call_of(), "mosaic_gpu")


def test_spills_and_grown_register_counts_are_named():
    before = {key: {"registers": 10, "spilled": 0} for key in ("scalar_a bfloat16", "none_b float32")}
    found = {
        "scalar_a bfloat16": {"registers": 11, "spilled": 0},
        "none_b float32": {"registers": 9, "spilled": 8},
    }
    assert compiled.worse(found, before) == ["none_b float32 spills 8 bytes", "scalar_a bfloat16 has 11 registers, was 10"]


def test_a_specialised_kernel_that_would_wait_for_registers_for_ever_is_an_error(tmp_path):
    assert limits.WORKERS * limits.COMPUTING + limits.BRINGING <= (limits.WORKERS + 1) * limits.STARTING
    text = (
        "ptxas info    : Compiling entry function 'scalar_a_mosaic_gpu_kernel' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used {} registers\n"
    )
    (tmp_path / "a.ptx").write_text("setmaxnreg.inc.sync.aligned.u32 208;")
    (tmp_path / "a.ptxas").write_text(text.format(limits.STARTING))
    assert compiled.report(tmp_path) == {"scalar_a": {"registers": limits.STARTING, "spilled": 0}}
    for wrong in (text.format(160), text.format(limits.STARTING) + "'setmaxnreg' ignored"):
        (tmp_path / "a.ptxas").write_text(wrong)
        with pytest.raises(SystemExit, match="would hang"):
            compiled.report(tmp_path)


@needs_jax
def test_pairs_of_tiles_share_a_block_and_two_slots_are_taken_where_they_fit():
    from kernels.mosaic_gpu import states
    from kernels.mosaic_gpu.layout import Form, Size

    def block(decay, delta, dtype, key_tiles, value_tiles, keys, squares):
        form = Form(decay, delta, True, False, 1.0, 1, dtype == "float32", None)
        return states.arrangement(form, Size(1, 1, 4, key_tiles, value_tiles), keys, squares)[:3]

    assert block("scalar", False, "bfloat16", 2, 2, 1, 0) == (2, 2, 14)
    assert block("scalar", False, "bfloat16", 2, 3, 1, 0) == (1, 2, 9)
    assert block("scalar", False, "float32", 2, 2, 1, 0) == (1, 1, 18)
    assert block("scalar", True, "bfloat16", 1, 2, 2, 2) == (2, 2, 24)  # dstates
    assert block("scalar", True, "bfloat16", 2, 2, 2, 2) == (2, 1, 22)
    assert block("vector", True, "bfloat16", 2, 2, 2, 1) == (2, 1, 20)  # states
    assert block("vector", True, "bfloat16", 2, 1, 2, 1) == (1, 2, 20)


@needs_jax
def test_tiles_that_belong_to_another_warpgroup_are_not_handed_out():
    from kernels.mosaic_gpu.layout import Form
    from kernels.mosaic_gpu.tiles import Pool

    form = Form("none", False, False, False, 1.0, 1, False, None)
    pool = Pool(form, np.empty((10, 64, 64)), begin=2, end=4, shift=6)
    assert [pool.take().start, pool.take().start] == [8, 9]
    with pytest.raises(AssertionError, match="5 tiles of a pool that ends at 4"):
        pool.take()


def test_register_counts_are_those_of_the_kernels_as_they_are_and_no_kernel_spills():
    record = compiled.recorded()
    assert record["source"] == compiled.source_hash(), "python -m kernels.mosaic_gpu.compiled --write; see its docstring"
    assert not compiled.spilling(record["kernels"])
    cases = list(compiled.cases(DTYPES))
    # Six forms with rows of three kinds, of two widths and in bfloat16 of three, but for two wide forms that are refused.
    assert len(cases) == 6 * 3 * (3 + 2) - 2 * 3
    names = {
        f"{compiled.name(decay, delta)}_{kernel} {dtype}{'' if variant == 'usual' else f' {variant}'}"
        for decay, delta, dtype, variant in cases
        for kernel in KERNELS
    }
    assert set(record["kernels"]) == names


def test_a_part_compiled_alone_replaces_only_itself_while_sources_and_versions_are_the_same():
    versions = {"jax": "1"}
    one, two, three = ({"registers": count, "spilled": 0} for count in (1, 2, 3))
    record = {"source": "old", "versions": versions, "kernels": {"a": one, "b": two}}
    assert compiled.merged({"b": three}, record, "old", versions) == {"kernels": {"a": one, "b": three}}
    changed = compiled.merged({"b": three}, record, "new", versions)
    assert changed == {"kernels": {"b": three}, "earlier": {"a": one}}
    assert compiled.merged({"b": three}, record, "old", {"jax": "2"}) == changed
    assert compiled.worse({"a": two}, compiled.known(changed)) == ["a has 2 registers, was 1"]


def test_too_few_threads_for_the_interpreter_are_refused_where_it_would_hang(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(ConfigError, match="XLA has 2 threads here.*set NPROC=16"):
        interpreter.parameters()


def test_an_interpreter_that_is_not_there_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.pallas.mosaic_gpu.interpret", None)
    with pytest.raises(ConfigError, match="has no GPU interpreter"), interpreter.session():
        pass
