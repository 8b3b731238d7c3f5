"""A backward pass that stops at a cut: the gradients above it are those of the whole pass, and there is less work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
import optim
from optim.roles import by_path, parameters

CASES = {
    "sequential": {"layers": 2},
    "peri": {"layers": 2, "placement": {"name": "peri"}},
    "recursive": {"layers": 4, "depth": {"name": "recursive", "loops": 2, "rank": 1}},
    "mhc": {"layers": 2, "placement": {"name": "mhc", "streams": 2}},
    "mix": {"layers": 2, "placement": {"name": "mix", "alpha": 0.5}},
    "hybrid": {"layers": 3, "mixer": {"name": "hybrid", "pattern": [{"name": "gated_delta_net"}, {"name": "attention"}]}},
    "layer_parallel": {"layers": 3, "depth": {"name": "layer_parallel", "layers": 2, "sweeps": 1}},
}


def objective(graph, batch):
    """`(parameters, cut) -> summed cross-entropy` of predicting the tokens reversed."""

    def nats(params, cut):
        model = nnx.merge(graph, nnx.State(params))
        h, _ = model.hidden(batch, cut=cut)
        return models.cross_entropy(h, model.output_kernel(), batch[:, ::-1], jnp.ones(batch.shape))[0]

    return nats


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_active_layers_are_those_of_the_whole_pass(case, config, awake, tokens, jit):
    model = awake(config(width=8, **CASES[case]))
    params, declared = nnx.to_pure_dict(nnx.state(model)), parameters(model)
    nats = objective(nnx.graphdef(model), tokens(2, 6))
    programs = [jit(jax.grad(lambda params, cut=cut: nats(params, cut))).lower(params).compile() for cut in (0, 1)]
    whole, part = (by_path(program(params)) for program in programs)
    for path, gradient in part.items():
        places = np.array(declared[path].positions, int)
        if not declared[path].stacked:
            assert not len(places) or not np.any(gradient), path
            continue
        np.testing.assert_allclose(gradient[places >= 1], whole[path][places >= 1], rtol=2e-4, atol=1e-5, err_msg=path)
        # A block that loops share is used again above the cut; the optimizer leaves out what its gradient says.
        assert case == "recursive" or not np.any(gradient[places < 1]), path
    assert not np.any(part["embedding.table"]) and np.any(whole["embedding.table"])
    np.testing.assert_allclose(part["head_kernel"], whole["head_kernel"], rtol=2e-4, atol=1e-5)


def test_every_layer_below_a_cut_saves_its_backward_pass(config, awake, tokens, jit):
    """Scans are written out, since the compiler counts a loop's body once."""
    layers = 4
    model = awake(config(width=16, layers=layers, depth={"name": "sequential", "unroll": True}))
    graph, batch, params = nnx.graphdef(model), tokens(2, 8), nnx.to_pure_dict(nnx.state(model))
    step = objective(graph, batch)
    flops = [
        jit(jax.grad(lambda params, cut=cut: step(params, cut))).lower(params).compile().cost_analysis()["flops"]
        for cut in range(layers)
    ]
    saved = -np.diff(flops)
    matrices = sum(x.size for x in jax.tree.leaves(params["blocks"]) if x.ndim > 2) / layers
    backward = 4 * matrices * batch.size  # products with the matrices alone: gradients of weights and of activations
    # Equal at every cut: the lowest active layer needs its whole backward pass too, for the gains before its matrices.
    np.testing.assert_allclose(saved, saved[-1], rtol=0.03)
    assert backward < saved[-1] < 1.5 * backward


def test_a_cut_inside_layers_that_run_in_parallel_freezes_those_below_and_gives_the_rest_their_gradient(
    config, awake, tokens, jit
):
    depth = {"name": "layer_parallel", "layers": 2, "sweeps": 1}
    model = awake(config(width=8, layers=3, depth=depth))
    params, declared = nnx.to_pure_dict(nnx.state(model)), parameters(model)
    step = objective(nnx.graphdef(model), tokens(2, 6))
    whole, part = (jit(jax.grad(lambda params, cut=cut: step(params, cut)))(params) for cut in (0, 2))
    recipe = {"sampling": {"name": "drop_muon", "buckets": 3}, "schedule": {"name": "constant"}, "clip_norm": None}
    tx = optim.build(recipe, model)
    moved, _ = jit(tx.update, static_argnames="cut")(part, tx.init(params), params, cut=2)
    after, before, whole = by_path(optax.apply_updates(params, moved)), by_path(params), by_path(whole)
    for path, gradient in by_path(part).items():
        if declared[path].stacked:
            np.testing.assert_allclose(gradient[2], whole[path][2], rtol=2e-4, atol=1e-5, err_msg=path)
            np.testing.assert_array_equal(after[path][:2], before[path][:2])
            assert np.any(after[path][2] != before[path][2]), path
    np.testing.assert_array_equal(after["embedding.table"], before["embedding.table"])


def test_the_norm_of_the_embedding_and_its_moments_keep_every_bit_below_a_cut(config, awake, jit):
    """Its gradient is zero there, but Adam would go on moving it."""
    model = awake(config(width=8, placement={"name": "peri"}))
    params = nnx.to_pure_dict(nnx.state(model))
    recipe = {"sampling": {"name": "drop_muon", "buckets": 2}, "schedule": {"name": "constant"}}
    tx = optim.build(recipe, model)
    state, update, found = tx.init(params), jit(tx.update, static_argnames="cut"), []
    for cut in (0, 1):
        moved, state = update(jax.tree.map(jnp.ones_like, params), state, params, cut=cut)
        params = optax.apply_updates(params, moved)
        found.append((params["embedding_norm"]["scale"], state.directions["all"], params["final_norm"]["scale"]))
    (scale, adam, final), (later_scale, later_adam, later_final) = found
    assert np.any(scale != model.embedding_norm.scale[...]) and np.any(final != later_final)
    np.testing.assert_array_equal(scale, later_scale)
    for moments, later in ((adam.mu, later_adam.mu), (adam.nu, later_adam.nu)):
        np.testing.assert_array_equal(moments["embedding_norm.scale"], later["embedding_norm.scale"])
