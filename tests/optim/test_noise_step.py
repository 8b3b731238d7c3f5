"""LANTON's independent noise in the training step: the difference of the gradients of two halves of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from trainer import config as configuration
from trainer.setup import Setup, abstract_params, assemble
from trainer.step import initial_state

SCORED = (16, 1, 9, 2)  # tokens of each row: every second row has few, so that a wrong count of tokens shows
CONFIG = {
    "data": {"name": "bigram", "sequence_length": 16, "batch_size": len(SCORED), "vocabulary": 12, "validation_examples": 8},
    "model": {"width": 16, "layers": 2, "heads": 2},
    "optimizer": {
        "direction": {"name": "sgd"},
        "layerwise": {"name": "lanton", "estimator": "independent", "interval": 1},
        "schedule": {"name": "constant"},
        "clip_norm": None,
    },
    "train": {"steps": 4},
}


class Shown(NamedTuple):
    """State of a transformation that moves nothing: what its last update was given."""

    count: jax.Array
    gradients: Any
    difference: Any


def showing():
    def init(params):
        return Shown(jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(gradients, state, params, *, gradient_difference, rates, grad_norm):
        return jax.tree.map(jnp.zeros_like, params), Shown(state.count + 1, gradients, gradient_difference)

    return optax.GradientTransformationExtraArgs(init, update)


def mean_gradient(setup, batch):
    """A function from parameters and weights [B, T] to the gradient of the nats a scored token, by the model's own logits."""

    def loss(params, weights):
        model = nnx.merge(setup.graph, nnx.State(params))
        log = jax.nn.log_softmax(model(batch["tokens"], segment_ids=batch["segment_ids"]))
        nats = -jnp.take_along_axis(log, batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.sum(nats * weights) / jnp.sum(weights)

    return jax.jit(jax.grad(loss))


def close(found, right):
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(right))
    assert largest > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), found, right)


def test_the_difference_is_that_of_the_means_of_every_second_row_over_the_root_of_two(monkeypatch):
    monkeypatch.setattr(Setup, "transformation", lambda self: showing())
    setup = assemble(configuration.resolve_config(CONFIG))
    batch = setup.dataset.examples.read(range(len(SCORED)))
    batch["weights"] = (np.arange(batch["tokens"].shape[1]) < np.array(SCORED)[:, None]).astype(np.float32)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), abstract_params(setup.model))
    gradient, second = mean_gradient(setup, batch), np.arange(len(SCORED))[:, None] % 2
    halves = [gradient(params, batch["weights"] * (second == i)) for i in (0, 1)]
    whole = gradient(params, batch["weights"])
    with jax.set_mesh(setup.mesh):
        state = initial_state(params, showing())
        after, metrics = setup.jitted_train_step()(state, setup.put_batch(batch, len(SCORED)), {})
    assert metrics["tokens"] == sum(SCORED)
    close(after["optimizer"].difference, jax.tree.map(lambda a, b: (a - b) / 2**0.5, *halves))
    close(after["optimizer"].gradients, whole)
