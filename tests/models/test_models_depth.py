"""How the stack is run changes nothing: written out, scanned, recomputed, asked for at call time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

import models
from models import options
from models.placements.placement import Context
from strata import ConfigError


def close(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=tolerance * max(1, np.abs(b[path]).max()), err_msg=path)


def test_unrolled_scanned_and_default_are_the_same_forward_and_backward(config, awake, run, gradients, tokens):
    model, rows, logits, found = awake(config(layers=3)), tokens(2, 8), {}, {}
    for unroll in (None, True, False):
        depth = {"name": "sequential", "unroll": unroll}
        logits[unroll], found[unroll] = run(model, rows, depth=depth), gradients(model, rows, depth=depth)
    for unroll in (None, True):
        np.testing.assert_allclose(logits[unroll], logits[False], atol=1e-6 * np.abs(logits[False]).max())
        close(found[unroll], found[False], 1e-5)


@pytest.mark.parametrize(("unroll", "layers"), [(True, 2), (False, 6)])
def test_recomputing_changes_no_gradient_and_saves_memory(config, awake, tokens, unroll, layers):
    rows, found, bytes_needed = tokens(4, 64), {}, {}
    for remat in ("none", "dots", "full"):
        model = awake(config(layers=layers, depth={"name": "sequential", "unroll": unroll}), remat=remat)
        graph, state = nnx.split(model)
        gradient = jax.grad(lambda state, graph=graph: jnp.mean(nnx.merge(graph, state)(rows) ** 2))
        program = jax.jit(gradient).lower(state).compile()
        found[remat] = {str(path): variable[...] for path, variable in nnx.to_flat_state(program(state))}
        bytes_needed[remat] = program.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full"):
        close(found[remat], found["none"], 1e-5)
    assert bytes_needed["full"] < bytes_needed["none"]
    if not unroll:
        assert bytes_needed["full"] < bytes_needed["dots"] < bytes_needed["none"]


def test_layers_run_in_the_order_of_their_keys(config, awake, run, tokens):
    model, rows = awake(config(layers=3)), tokens(1, 6)
    block = model.blocks["block0"]
    h = embedded = model.embedding(rows, jnp.float32)
    graph, state = nnx.split(block)
    for i in range(3):
        layer = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
        h = layer(h, Context(layer.mixer.prepare(6, None), jnp.int32(i), embedded))
    np.testing.assert_allclose(model.head(model.final_norm(h)), run(model, rows), atol=1e-5)


def test_another_depth_can_be_asked_for_at_call_time(config, awake, run, tokens):
    model, rows = awake(config()), tokens(2, 8)
    expected, tree = run(model, rows), {"name": "sequential", "unroll": False}
    for depth in (tree, ml_collections.ConfigDict(tree), options.SequentialDepth(unroll=False)):
        np.testing.assert_allclose(run(model, rows, depth=depth), expected, atol=1e-6 * np.abs(expected).max())
    scans = {
        unroll: str(jax.make_jaxpr(lambda u=unroll: model(rows, depth={"name": "sequential", "unroll": u}))()).count("scan[")
        for unroll in (True, False)
    }
    assert scans == {True: 0, False: 1}


@pytest.mark.parametrize(
    ("depth", "sentence"),
    [
        ({"name": "sequentail"}, "registered are .*sequential"),
        ({"unroll": True}, "registered are"),
        ({"name": "sequential", "unrol": True}, "did you mean depth.unroll"),
        ({"name": "sequential", "unroll": 3}, "true or false"),
        ("sequential", "a dict with a name"),
        (options.RMSNorm(), "a dict with a name"),
    ],
)
def test_a_depth_that_does_not_exist_is_refused(config, awake, tokens, depth, sentence):
    model = awake(config())
    with pytest.raises(ConfigError, match=sentence):
        jax.eval_shape(lambda: model(tokens(1, 4), depth=depth))


def test_a_deep_scanned_stack_is_no_larger_a_program(config):
    def lines(layers: int) -> int:
        model = models.abstract(config(layers=layers, depth={"name": "sequential", "unroll": False}), vocab_size=11)
        graph, state = nnx.split(model)
        rows = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return len(jax.jit(lambda state, rows: nnx.merge(graph, state)(rows)).lower(state, rows).as_text().splitlines())

    assert lines(48) == lines(3)
