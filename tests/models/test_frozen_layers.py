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
    "layer_parallel": {"layers": 3, "depth": {"name": "layer_parallel", "layers": 2, "sweeps": 1}},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_active_layers_are_those_of_the_whole_pass_and_there_is_less_work(case, config, awake, tokens, jit):
    model = awake(config(width=8, **CASES[case]))
    graph, batch = nnx.graphdef(model), tokens(2, 6)
    params, declared = nnx.to_pure_dict(nnx.state(model)), parameters(model)

    def nats(params, cut):
        model = nnx.merge(graph, nnx.State(params))
        h, _ = model.hidden(batch, cut=cut)
        return models.cross_entropy(h, model.output_kernel(), batch[:, ::-1], jnp.ones(batch.shape))[0]

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
    more, less = (program.cost_analysis()["flops"] for program in programs)
    assert less < more


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
