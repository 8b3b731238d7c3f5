"""Back-ends serve or say why not; wrong calls are refused with every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.registry import BACKENDS, OPS
from strata.errors import ConfigError

Q = jax.ShapeDtypeStruct((2, 8, 2, 4), jnp.float32)
V = jax.ShapeDtypeStruct((2, 8, 4, 6), jnp.float32)
GATE = jax.ShapeDtypeStruct((2, 8, 4), jnp.float32)


def zeros(*structs):
    return [jnp.zeros(x.shape, x.dtype) for x in structs]


def test_importing_the_package_or_the_registry_does_not_import_jax(root):
    program = "import sys, kernels, kernels.registry; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_every_promised_name_is_there():
    for name in kernels.__all__:
        assert callable(getattr(kernels, name))
    assert {*OPS, *(f"{op}_step" for op in OPS)} <= set(kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'gdn'"):
        kernels.gdn  # noqa: B018


def test_auto_takes_the_chunked_back_end_on_cpu_and_says_why_not_the_others():
    choice = kernels.explain("gated_delta_rule", Q, Q, V, g=GATE, beta=GATE)
    assert choice.backend == "xla"
    assert set(choice.refusals) == set(BACKENDS) - {"xla"}
    assert "back-end: xla" in str(choice) and "not tpu:" in str(choice) and "not mosaic_gpu:" in str(choice)


def test_interpret_false_is_the_same_as_not_asking():
    assert kernels.explain("linear_attention", Q, Q, V, interpret=False).backend == "xla"
    assert kernels.linear_attention(*zeros(Q, Q, V), interpret=False)[0].shape == V.shape
    with pytest.raises(ConfigError, match="the default device is cpu"):
        kernels.explain("linear_attention", Q, Q, V, backend="tpu", interpret=False)


def test_explain_refuses_ops_and_options_that_there_are_not():
    with pytest.raises(ConfigError, match="no op 'gated_delta'; did you mean gated_delta_rule"):
        kernels.explain("gated_delta", Q, Q, V)
    with pytest.raises(ConfigError, match="no option 'chunksize'; did you mean chunk_size") as caught:
        kernels.explain("linear_attention", Q, Q, V, chunksize=3, decay=5)
    assert "no option 'decay'" in str(caught.value)
    assert kernels.explain("lightning_attention", Q, Q, V, layer=1, layers=2).backend == "xla"
    with pytest.raises(ConfigError, match=r"decay has shape \[3\]; expected \[4\]"):
        kernels.explain("retention", Q, Q, V, decay=jnp.zeros(3))


def test_explain_answers_for_the_call_that_lightnet_makes():
    q, v = (jax.ShapeDtypeStruct(x.shape, jnp.float16) for x in (Q, V))
    assert kernels.explain("lightnet", q, q, v, backend="tpu", interpret=True).backend == "tpu"
    assert kernels.explain("lightnet", q, q, v, g=jax.ShapeDtypeStruct((2, 8, 4, 4), jnp.float32)).backend == "xla"
    o, _ = kernels.lightnet(*zeros(q, q, v), backend="tpu", interpret=True)
    assert o.dtype == jnp.float16


def test_explain_says_where_float16_is_computed_in_float32():
    half = jax.ShapeDtypeStruct(Q.shape, jnp.float16)
    chosen = kernels.explain("linear_attention", half, half, half, backend="tpu", interpret=True)
    assert str(chosen).endswith(", computed in float32") and chosen.converted == "float32"
    plain = kernels.explain("linear_attention", half, half, half)
    assert plain.backend == "xla" and plain.converted is None and "computed in" not in str(plain)


def chosen_on_a_mesh() -> None:
    """What `auto` takes of an interpreted kernel and of `xla` on four devices, outside `jax.shard_map` and in its forms."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
    taken = []

    def run(q):
        # As on a TPU: interpretation asked for stands for a device that has the kernels.
        try:
            taken.append(kernels.explain("linear_attention", q, q, q, interpret=True).backend)
            return kernels.linear_attention(q, q, q, interpret=True)[0]
        except ConfigError as error:
            taken.append("check_vma" if "give it check_vma=False" in str(error) else "refused")
            return q

    q, both, one = np.ones((2, 8, 2, 8), np.float32), {"data", "tensor"}, {"data"}
    spec = jax.sharding.PartitionSpec("data")
    jax.jit(run)(q)
    for axes, check in ((both, False), (both, True), (one, False)):
        split = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=check)
        assert jax.jit(split)(q).shape == q.shape
    assert taken == ["refused", "tpu", "check_vma", "refused"], taken
    named = jax.shard_map(
        lambda q: kernels.linear_attention(q, q, q, backend="tpu", interpret=True)[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    try:
        jax.jit(named)(q)
    except ConfigError as error:
        assert 'backend="tpu" cannot serve this call: JAX refuses Pallas kernels within' in str(error)
    else:
        raise AssertionError("not refused")


def test_auto_takes_a_pallas_kernel_where_shard_map_has_split_the_call_and_only_there(root):
    program = "import importlib.util as u, sys; s = u.spec_from_file_location('t', sys.argv[1]); m = u.module_from_spec(s);"
    program += " s.loader.exec_module(m); m.chosen_on_a_mesh()"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", program, __file__], env=os.environ | flags, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("backend", ["tpu", "mosaic_gpu"])
def test_a_back_end_asked_for_by_name_serves_or_raises_with_its_reason(backend):
    q, v = zeros(Q, V)
    with pytest.raises(ConfigError, match=f'backend="{backend}" cannot serve this call: '):
        kernels.linear_attention(q, q, v, backend=backend)


def test_an_unknown_back_end_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=f"expected one of auto, {', '.join(BACKENDS)}"):
        kernels.explain("linear_attention", Q, Q, V, backend="triton")


def test_interpret_is_refused_where_there_is_no_pallas_kernel():
    with pytest.raises(ConfigError, match="interpret"):
        kernels.explain("linear_attention", Q, Q, V, backend="xla", interpret=True)


def test_all_mistakes_of_a_call_are_listed_at_once():
    q, v = zeros(Q, V)
    with pytest.raises(ConfigError) as caught:
        kernels.kda(q, q.astype(jnp.bfloat16), v, v, jnp.zeros((2, 8, 2), int), chunk_size=48, scale=jnp.ones(()))
    text = str(caught.value)
    assert "q, k, v have dtypes float32, bfloat16, float32; expected one dtype" in text
    assert "g has shape [2, 8, 4, 6]; expected [2, 8, 4, 4]" in text
    assert "beta has shape [2, 8, 2]; expected [2, 8, 4]" in text
    assert "beta has dtype int32; expected a floating one" in text
    assert "chunk_size = 48; expected a power of two" in text
    assert "scale is a" in text


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"v": np.zeros((2, 8, 3, 6), np.float32)}, "v has 3 heads; expected a multiple of the 2 heads of q and k"),
        ({"k": np.zeros((2, 8, 2, 5), np.float32)}, r"k has shape \[2, 8, 2, 5\]; expected that of q"),
        ({"v": np.zeros((2, 9, 2, 6), np.float32)}, r"v has shape \[2, 9, 2, 6\]; expected B, T = \[2, 8\]"),
        ({"q": np.zeros((8, 2, 4), np.float32)}, r"q has shape \[8, 2, 4\]; expected \[B, T, H, K\]"),
        ({"q": np.zeros((2, 8, 2, 4), np.int32)}, "q has dtype int32; expected one of bfloat16"),
        ({"initial_state": np.zeros((2, 2, 4, 6), np.float32)}, r"initial_state has shape .* expected \[2, 4, 4, 6\]"),
        ({"segment_ids": np.zeros((8,), np.int32)}, r"segment_ids has shape \[8\]; expected B, T = \[2, 8\]"),
        ({"segment_ids": np.zeros((2, 8), np.float32)}, "segment_ids has dtype float32; expected an integer"),
        ({"cu_seqlens": np.array([0, 8])}, "cu_seqlens needs the sequences packed into one row; q has B = 2"),
        ({"cu_seqlens": np.array([0, 9])}, "expected 0 = first <= ... <= last = T = 8"),
        ({"cu_seqlens": np.array([0, 8]), "segment_ids": np.zeros((2, 8), np.int32)}, "two ways to say the same"),
    ],
)
def test_a_wrong_call_is_refused_with_what_was_expected(change, sentence):
    q, v = zeros(Q, V)
    given = {"q": q, "k": q, "v": v} | change
    with pytest.raises(ConfigError, match=sentence):
        kernels.linear_attention(**given)


def test_a_wrong_initial_weight_of_lightnet_is_refused():
    q, v = zeros(Q, V)
    state = (jnp.zeros((2, 4, 4, 6)), jnp.zeros((2, 4)))
    for call in (kernels.lightnet, lambda *x, **options: kernels.explain("lightnet", *x, **options)):
        with pytest.raises(ConfigError, match=r"initial z has shape \[2, 4\]; expected \[B or N, H, K\] = \[2, 2, 4\]"):
            call(q, q, v, initial_state=state)


@pytest.mark.parametrize(
    "state,sentence",
    [
        ((np.ones((2, 4, 4, 6), np.float32), None), "initial_state must be a pair of arrays"),
        ((None, np.ones((2, 2, 4), np.float32)), "initial_state must be a pair of arrays"),
        (np.ones((2, 4, 4, 6), np.float32), "initial_state must be a pair of arrays"),
        ((np.ones((2, 4, 4, 6), np.float32), np.zeros((2, 2, 4), np.int32)), "initial z has dtype int32; expected a floating"),
        ((np.ones((2, 4, 4, 5), np.float32), np.zeros((2, 2, 4), np.float32)), r"initial_state has shape \[2, 4, 4, 5\]"),
        (([[0.0]], np.zeros((2, 2, 4), np.float32)), "initial_state is a list; expected an array of shape"),
    ],
)
def test_half_a_state_of_lightnet_or_another_thing_is_refused_by_the_op_and_its_step(state, sentence):
    q, v = zeros(Q, V)
    with pytest.raises(ConfigError, match=sentence):
        kernels.lightnet(q, q, v, initial_state=state)
    with pytest.raises(ConfigError, match=sentence.replace("initial_state", "state").replace("initial z", "z of the state")):
        kernels.lightnet_step(q[:, 0], q[:, 0], v[:, 0], state)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint8, np.int8, np.int64])
def test_offsets_of_any_integers_are_checked_and_read_as_what_they_say(dtype):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 130, 1, 4)).astype(np.float32)[:, :120]
    with pytest.raises(ConfigError, match=r"cu_seqlens = \[0, 60, 30, 120\]; expected 0 = first"):
        kernels.linear_attention(q, q, q, cu_seqlens=np.array([0, 60, 30, 120], dtype))
    offsets = np.array([0, 60, 60, 120])
    for op in (kernels.linear_attention, kernels.lightnet):
        for backend in ("xla", "reference"):
            found = op(q, q, q, cu_seqlens=offsets.astype(dtype), backend=backend)[0]
            np.testing.assert_array_equal(found, op(q, q, q, cu_seqlens=offsets.astype(np.int32), backend=backend)[0])


def refuse(sentence: str, function, *arguments, **options) -> None:
    with pytest.raises(ConfigError, match=sentence):
        function(*arguments, **options)


def test_what_is_no_array_of_the_right_size_is_refused_and_not_met_inside():
    q, v = (np.zeros(x.shape, np.float32) for x in (Q, V))
    refuse(r"decay is a list; expected an array of shape \[4\]", kernels.retention, q, q, v, decay=[-0.1] * 4)
    refuse("decay is a float", kernels.retention, q, q, v, decay=-0.1)
    for op in (kernels.retention, kernels.lightning_attention, kernels.lightnet, kernels.linear_attention):
        refuse(r"v has shape \[3\]; expected \[B, T, HV, V\]", op, q, q, np.ones(3, np.float32))
        refuse(r"k is a float; expected an array \[B, T, H, K\]", op, q, 1.0, v)
        refuse("q is a list", op, q.tolist(), q, v)
        refuse(r"v has shape \[2, 8, 0, 6\]; it must not be empty", op, q, q, v[:, :, :0])
    refuse("segment_ids is a list; expected an array of integers", kernels.gla, q, q, v, q, segment_ids=[[0] * 8] * 2)
    refuse("cu_seqlens is a list", kernels.linear_attention, q[:1], q[:1], v[:1], cu_seqlens=[0, 8])
    refuse("initial_state is a list", kernels.linear_attention, q, q, v, initial_state=[0.0])
    refuse("layer = 3; expected 0 <= layer < layers = 2", kernels.lightning_attention, q, q, v, layer=3, layers=2)
    refuse("layer = 3", kernels.explain, "lightning_attention", q, q, v, layer=3, layers=2)
    refuse("lower is a list; expected an array", kernels.triangular_inverse, [[0.0, 0.0], [1.0, 0.0]])
    refuse("lower is a int32", kernels.triangular_inverse, np.ones((3, 3), np.int32))
    refuse("operand_dtype = int8", kernels.triangular_inverse, np.ones((3, 3), np.float32), operand_dtype="int8")


@pytest.mark.parametrize(
    "options,sentence",
    [
        ({"chunk_size": True}, "chunk_size = True; expected a power of two"),
        ({"chunk_size": 4.0}, "chunk_size = 4.0; expected a power of two"),
        ({"scale": float("nan")}, "scale = nan; expected a finite number"),
        ({"scale": np.inf}, "scale = inf; expected a finite number"),
        ({"scale": True}, "scale is a bool; expected a Python number"),
    ],
)
def test_a_size_or_a_scale_that_is_no_such_number_is_refused(options, sentence):
    refuse(sentence, kernels.explain, "linear_attention", Q, Q, V, **options)


def test_a_chunk_size_may_be_an_integer_of_numpy():
    tuned = kernels.explain("linear_attention", Q, Q, V, chunk_size=np.int64(4)).tuned
    assert tuned == (4, "asked for") and type(tuned.chunk_size) is int


def test_a_step_answers_with_the_shapes_of_a_step():
    q, v = (np.zeros((x.shape[0], *x.shape[2:]), np.float32) for x in (Q, V))
    refuse(
        r"kernels.linear_attention_step .*\n  q has shape \[2, 4\]; expected \[B, H, K\]",
        kernels.linear_attention_step,
        q[0],
        q,
        v,
        None,
    )
    refuse(r"g has shape \[2, 3\]; expected \[2, 4\]", kernels.simple_gla_step, q, q, v, v[:, :3, 0], None)
    refuse(r"beta is missing; expected shape \[2, 4\]", kernels.delta_rule_step, q, q, v, None, None)
    refuse(r"k has shape \[2, 2, 3\]; expected that of q, \[2, 2, 4\]", kernels.lightnet_step, q, q[..., :3], v, None)
    refuse(r"state has shape \[2, 4, 6\]; expected \[2, 4, 4, 6\]", kernels.linear_attention_step, q, q, v, v)
    refuse("state is a list", kernels.linear_attention_step, q, q, v, [0.0])
    refuse("decay is a list", kernels.retention_step, q, q, v, None, decay=[-0.1] * 4)
    refuse(r"v has shape \[6\]; expected \[B, HV, V\]", kernels.lightning_attention_step, q, q, v[0, 0], None)


def test_weights_of_wrong_shapes_are_refused_with_the_shapes_that_there_are():
    q, v = (np.zeros(x.shape, np.float32) for x in (Q, V))
    eye, gain = np.eye(4, dtype=np.float32), np.ones((3, 6), np.float32)
    wide = np.stack([eye] * 3)
    expected = r"of shape \[3, 4, 4\]; expected an array \[K, K\] = \[4, 4\] or \[H, K, K\] = \[2, 4, 4\]"
    refuse(f"kernels.hedgehog cannot run:\n  weight is {expected}", kernels.hedgehog, q, wide)
    refuse(
        r"bias is of shape \[3\]; expected an array \[K\] = \[4\] or \[H, K\]", kernels.hedgehog, q, eye, np.ones(3, np.float32)
    )
    refuse("x is a list", kernels.hedgehog, q.tolist(), eye)
    refuse(f"key_weight is {expected}", kernels.hedgehog_attention, q, q, v, eye, wide)
    refuse("query_weight is a list", kernels.hedgehog_attention_step, q[:, 0], q[:, 0], v[:, 0], eye.tolist(), eye, None)
    refuse("query_weight has dtype int32", kernels.hedgehog_attention, q, q, v, eye.astype(np.int32), eye)
    refuse(r"gain is of shape \[3, 6\]; expected an array \[HV, V\] = \[4, 6\]", kernels.transnormer_attention, q, q, v, gain)
    refuse("gain is of shape", kernels.transnormer_attention_step, q[:, 0], q[:, 0], v[:, 0], None, gain)


def test_a_call_is_of_the_device_that_jax_default_device_names(monkeypatch):
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    cpu, real = jax.local_devices()[0], jax.local_devices
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [tpu] if backend is None else real(backend=backend))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q = jax.ShapeDtypeStruct((2, 8, 2, 128), jnp.bfloat16)
    assert kernels.explain("linear_attention", q, q, q).backend == "tpu"
    for device in (cpu, "cpu"):
        with jax.default_device(device):
            assert kernels.explain("linear_attention", q, q, q).backend == "xla"
    # At sizes that were never compiled they serve by name alone.
    wide = jax.ShapeDtypeStruct((2, 8, 2, 129), jnp.bfloat16)
    for v, how in ((wide, {}), (q, {"chunk_size": 64})):
        choice = kernels.explain("linear_attention", q, q, v, **how)
        assert choice.backend == "xla" and "were compiled at K = V = 128 and 256" in choice.refusals["tpu"]
        assert kernels.explain("linear_attention", q, q, v, backend="tpu", **how).backend == "tpu"


def scopes(function, *arguments):
    """The name stack of every operation of a traced function."""
    return jax.jit(function).lower(*arguments).as_text(debug_info=True)


@pytest.mark.parametrize("op", OPS)
def test_an_op_and_its_step_have_names_of_their_own_for_the_profiler(problem, op):
    given = problem(op, 5).cast(jnp.float32)
    call = getattr(kernels, op)
    assert f"/{op}_xla/" in scopes(lambda q, k, v, gates: call(q, k, v, **gates), *given.arrays, given.gates)
    interpreted = scopes(
        lambda q, k, v, gates: call(q, k, v, **gates, backend="tpu", interpret=True), *given.arrays, given.gates
    )
    assert f"/{op}_tpu/" in interpreted and f"/{op}_xla/" not in interpreted
    token = [x[:, 0] for x in given.arrays]
    gates = {name: x[:, 0] for name, x in given.gates.items()}
    step = getattr(kernels, f"{op}_step")
    assert f"/{op}_step/" in scopes(
        lambda q, k, v, gates, state: step(q, k, v, **gates, state=state), *token, gates, given.state
    )
