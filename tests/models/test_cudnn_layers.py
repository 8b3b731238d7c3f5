"""cuDNN attention in layers that run at once, and under Newton's method: traced here, computed by XLA in its place."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.mixers import softmax
from models.mixers.attention import Attention
from strata import ConfigError
from tests.traced import equations

PARALLEL = {"name": "layer_parallel", "layers": 3, "sweeps": 2}


@pytest.fixture(autouse=True)
def served(monkeypatch) -> None:
    """cuDNN can serve, as far as Strata can tell."""
    monkeypatch.setattr(softmax, "why_not_cudnn", lambda *_: None)


@pytest.fixture
def traceable(monkeypatch) -> None:
    """JAX traces a call of cuDNN although there is none here, by a function that it keeps private and may move."""
    where = "jax._src.cudnn.fused_attention_stablehlo"
    cudnn = pytest.importorskip(where, reason=f"this jax has no {where}", exc_type=ImportError)
    if not hasattr(cudnn, "check_cudnn_version"):
        pytest.skip(f"this jax has no check_cudnn_version in {where}")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize(("batch", "remat"), [(1, "none"), (2, "none"), (2, "full")])
def test_the_mask_fits_what_cudnn_is_given_when_layers_run_at_once(traceable, config, batch, remat):
    model = models.abstract(config(width=32, layers=4, kv_heads=1), vocab_size=11, precision="bfloat16", remat=remat)
    graph, state = nnx.split(model)
    ids = jax.ShapeDtypeStruct((batch, 8), jnp.int32)
    for depth in ({"name": "sequential"}, PARALLEL):

        def total(state: Any, tokens: jax.Array, segment_ids: jax.Array, depth: Any = depth) -> jax.Array:
            h, _ = nnx.merge(graph, state).hidden(tokens, segment_ids=segment_ids, depth=depth)
            return jnp.sum(h.astype(jnp.float32))

        traced = equations(jax.make_jaxpr(jax.grad(total))(state, ids, ids))
        calls = [call.invars[:4] for call in traced if call.primitive.name.startswith("dot_product_attention")]
        calls = [[x.aval.shape for x in operands] for operands in calls]  # of q, k, v and the bias
        assert len(calls) >= 4
        assert all(bias[0] in (1, q[0]) and q[0] == k[0] == v[0] for q, k, v, bias in calls)
        assert all(q[2] == 2 * k[2] for q, k, _, _ in calls)


def states_and_gradient(model: nnx.Module, depth: Any, tokens: jax.Array, segment_ids: jax.Array) -> Any:
    """Hidden states, a weighted sum of them, and its gradient."""
    graph, state = nnx.split(model)

    def total(state: Any) -> Any:
        h, _ = nnx.merge(graph, state).hidden(tokens, segment_ids=segment_ids, depth=depth)
        return jnp.sum(h * jnp.cos(jnp.arange(h.size, dtype=h.dtype).reshape(h.shape))), h

    return jax.value_and_grad(total, has_aux=True)(state)


def test_layers_that_run_at_once_are_heads_of_one_call_and_nothing_changes(config, awake, tokens, monkeypatch, jit):
    """In float32, by JAX's own attention in place of the kernel; each of two rows has two documents of its own."""
    plain, calls = jax.nn.dot_product_attention, []

    def attend(q, k, v, *, mask, is_causal, implementation):
        assert implementation == "cudnn"
        calls.append(q.shape)
        return plain(q, k, v, mask=mask, is_causal=is_causal, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    ids, rows = jnp.array([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2]]), tokens(2, 6)
    made = [
        awake(config(layers=4, width=32, heads=4, kv_heads=2, mixer={"name": "attention", "implementation": name}))
        for name in ("cudnn", "reference")
    ]
    got, expected = (jit(functools.partial(states_and_gradient, model, PARALLEL))(rows, ids) for model in made)
    assert (2, 6, 12, 8) in calls and (2, 6, 4, 8) in calls
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(np.abs(b).max())))


EXACT = {"name": "layer_parallel", "layers": 2, "correction": "exact"}


def traced(model: nnx.Module, tokens: jax.Array) -> Any:
    return jax.eval_shape(functools.partial(states_and_gradient, model, EXACT), tokens, jnp.ones_like(tokens))


def test_jacobians_are_by_xla_where_attention_is_cudnns(traceable, config, tokens):
    fields = config(width=32, depth=EXACT)
    traced(models.abstract(fields, vocab_size=11, precision="bfloat16"), tokens(1, 8))
    option = models.abstract(fields, vocab_size=11).options
    said = Attention.explain(option.mixer, option, jnp.dtype("bfloat16"), 8)
    assert said.startswith("attention: cudnn (fused") and "; for Jacobians xla (cuDNN cannot serve: it has no second" in said


def test_cudnn_by_name_is_refused_where_jacobians_are_taken(traceable, config, tokens):
    mixer = {"name": "attention", "implementation": "cudnn"}
    model = models.abstract(config(width=32, mixer=mixer), vocab_size=11, precision="bfloat16")
    with pytest.raises(ConfigError, match="'cudnn' cannot serve: it has no second derivative.*'exact'"):
        traced(model, tokens(1, 8))
    option = models.abstract(config(width=32, mixer=mixer, depth=EXACT), vocab_size=11).options
    with pytest.raises(ConfigError, match="no second derivative"):
        Attention.explain(option.mixer, option, jnp.dtype("bfloat16"), 8)
