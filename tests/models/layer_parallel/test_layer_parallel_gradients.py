"""Gradients through layer-parallel sweeps: those of the stack in order, and with fewer sweeps those of a plain loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import options
from models.depth.layer_parallel import LayerParallel
from models.depth.suffix import Suffix
from models.placements.placement import Context
from models.stack import Forward, Stack
from tests.models.layer_parallel.conftest import LENGTH, close, parallel, small


def test_gradients_flow_through_the_sweeps(config, awake, gradients, tokens):
    """SNLP-forward fine-tuning: as many sweeps as layers have the gradient of the stack in order."""
    model, rows = awake(small(config, layers=2)), tokens(2, LENGTH)
    expected = gradients(model, rows, depth={"name": "sequential", "unroll": False})
    found = gradients(model, rows, depth=parallel(layers=2, sweeps=2))
    for path, gradient in found.items():
        close(gradient, expected[path], 5e-5)


@pytest.mark.parametrize(
    ("placement", "correction"), [({"name": "mhc", "streams": 2}, "hcn"), ({"name": "blend"}, "scaled")], ids=["mhc", "blend"]
)
def test_gradients_of_fewer_sweeps_than_layers_are_those_of_a_plain_loop(config, awake, tokens, jit, placement, correction):
    """c_2 = f_2(h) + A_2 (f_1(h) - h), whose gradient is also that of what A_2 is made of."""
    model, rows = awake(small(config, layers=2, placement=placement)), tokens(2, LENGTH)
    graph, state = nnx.split(model)
    strategy = LayerParallel(options.LayerParallelDepth(layers=2, correction=correction))

    def parts(state: Any) -> tuple[Stack, jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        e = model.embedding(rows, jnp.float32)
        return model.stack(), e, jnp.stack([e, e], axis=2) if correction == "hcn" else e

    def weighted(h: jax.Array) -> jax.Array:
        """Streams by themselves: mixing leaves their sum as it is."""
        return jnp.sum(h * jnp.asarray(np.random.default_rng(0).standard_normal(h.shape), jnp.float32))

    def swept(state: Any) -> jax.Array:
        stack, e, h = parts(state)
        shared = {kind: mixer.prepare(LENGTH, None) for kind, mixer in stack.mixers.items()}
        return weighted(strategy.sweeps(Suffix(stack, 0, Forward(shared, e, None)), h)[-1])

    def by_hand(state: Any) -> jax.Array:
        stack, e, h = parts(state)
        halves = []
        for number, place in enumerate(stack.places):
            block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
            context = Context(block.mixer.prepare(LENGTH, None), jnp.int32(number), e)
            halves.append(block.halves(h, context))
        first, second = block.placement.transports(h, halves[1][0], context)
        moved = halves[0][1] - h
        moved = jnp.einsum("ij,jk,btkd->btid", second, first, moved) if correction == "hcn" else second * first * moved
        return weighted(halves[1][1] + moved)

    found, expected = jit(lambda state: (jax.grad(swept)(state), jax.grad(by_hand)(state)))(state)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(one, other, 1e-4)
