"""What is recomputed in the backward pass follows the policy that was asked for in every depth strategy."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

import models
from tests.traced import equations

DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
DEPTHS = {
    "scanned": {"name": "sequential", "unroll": False},
    "written out": {"name": "sequential", "unroll": True},
    "looped": {"name": "recursive", "loops": 2},
    "layer-parallel": {"name": "layer_parallel", "layers": 4},
}


@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize(("remat", "expected"), [("none", set()), ("full", {None}), ("dots", {DOTS})])
def test_every_strategy_recomputes_by_the_policy_that_is_named(config, tokens, depth, remat, expected):
    graph, state = nnx.split(models.abstract(config(layers=4, depth=depth), vocab_size=11, remat=remat))
    rows = tokens(1, 4)
    traced = jax.make_jaxpr(lambda state: nnx.merge(graph, state)(rows))(state)
    recomputed = {
        each.params["policy"] for each in equations(traced) if each.primitive.name in ("remat", "checkpoint", "remat2")
    }
    assert recomputed == expected
