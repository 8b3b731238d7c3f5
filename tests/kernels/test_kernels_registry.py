"""Back-ends serve or say why not; wrong calls are refused with every mistake."""

from __future__ import annotations

import os
import subprocess
import sys

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


def chosen_on_a_mesh() -> None:
    """What `auto` takes of an interpreted kernel and of `xla` on four devices, outside `jax.shard_map` and in its forms."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
    taken = []

    def run(q):
        # As on a TPU: interpretation asked for stands for a device that has the kernels.
        try:
            taken.append(kernels.explain("linear_attention", q, q, q, interpret=True).backend)
            return kernels.linear_attention(q, q, q, interpret=True)[0]
        except ConfigError:
            taken.append("refused")
            return q

    q, both, one = np.ones((2, 8, 2, 8), np.float32), {"data", "tensor"}, {"data"}
    spec = jax.sharding.PartitionSpec("data")
    jax.jit(run)(q)
    for axes, check in ((both, False), (both, True), (one, False)):
        split = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=check)
        assert jax.jit(split)(q).shape == q.shape
    assert taken == ["refused", "tpu", "refused", "refused"], taken


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
    with pytest.raises(ConfigError, match=r"initial z has shape \[2, 4\]; expected \[B or N, H, K\] = \[2, 2, 4\]"):
        kernels.lightnet(q, q, v, initial_state=(jnp.zeros((2, 4, 4, 6)), jnp.zeros((2, 4))))
