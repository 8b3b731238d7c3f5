"""What the decoding benchmark runs is what it says: steps of an op, and softmax attention over a full cache."""

import json

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from benchmarks import decode, linear_attention
from kernels.samples import inputs


def test_a_decoder_of_an_op_gives_what_the_op_gives():
    found = decode.linear("kda", batch=2, heads=2, size=4, dtype="float32", count=5)()
    wanted, _ = kernels.kda(*inputs("kda", 2, 5, 2, 4), backend="reference")
    np.testing.assert_allclose(jnp.moveaxis(found, 0, 1), wanted, rtol=1e-5, atol=1e-6)


def test_the_attention_decoder_looks_at_the_whole_cache_and_no_further():
    decoder = decode.attention(12, batch=2, heads=2, size=4, dtype="float32", count=3)
    q, k, v = inputs("linear_attention", 2, 3, 2, 4)
    keys, values = inputs("linear_attention", 2, 12, 2, 4, seed=1)[1:]
    keys, values = keys.at[:, 9:].set(k), values.at[:, 9:].set(v)
    padded = jnp.concatenate([jnp.zeros((2, 9, 2, 4)), q], axis=1)
    wanted = jax.nn.dot_product_attention(padded, keys, values, is_causal=True)[:, 9:]
    np.testing.assert_allclose(jnp.moveaxis(decoder(), 0, 1), wanted, rtol=1e-5, atol=1e-6)


def test_the_benchmark_compares_every_op_with_every_context(tmp_path):
    words = ["--ops", "kda", "lightnet", "--contexts", "16", "32", "--heads", "2", "--size", "4", "--tokens", "2"]
    decode.main([*words, "--rounds", "2", "--seconds", "0.001", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("decode-*.json")
    found = json.loads(path.read_text())["contestants"]
    assert set(found) == {"attention, 16", "attention, 32", "kda", "lightnet"}
    assert set(found["kda"]["tokens_per_second_over_attention"]) == {"16", "32"}
    assert found["attention, 16"]["tokens_per_cpu_second_over_attention"]["16"]["median"] == 1
    assert found["attention, 32"]["bytes"] == 2 * found["attention, 16"]["bytes"] == 2 * 32 * 2 * 4 * 4
    assert all(x["tokens_per_second"]["median"] > 0 for x in found.values())


def test_gates_have_the_names_that_the_ops_give_them():
    assert {op: linear_attention.gate_names(op) for op in ("linear_attention", "retention", "gla", "delta_rule", "kda")} == {
        "linear_attention": (),
        "retention": (),
        "gla": ("g",),
        "delta_rule": ("beta",),
        "kda": ("g", "beta"),
    }
