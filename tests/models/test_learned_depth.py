"""A depth strategy with parameters of its own, registered from outside: they are assigned, trained, saved; it decodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
import optim
import trainer
from models.depth.sequential import run, step
from models.layers.parameter import parameter
from models.options import Depth
from strata import ConfigError, option, options, register, registry


@options
class MixedLoopsOptions(Depth):
    """The mean of the states after every loop, with learned weights."""

    loops: int = option(2, "times that the blocks are run through", least=1)


class MixedLoops(nnx.Module):
    def __init__(self, option, model, *, rngs):
        del model
        self.option = option
        self.weights = parameter(rngs, (option.loops,), nnx.initializers.zeros, role="vector", axes=("loop",))

    def __call__(self, stack, h, forward, progress=None):
        del progress
        length, states = len(stack) // stack.loops, []
        for loop in range(stack.loops):
            h, _ = run(stack, h, forward, first=loop * length, stop=(loop + 1) * length)
            states.append(h)
        return self._mean(states), {}

    def step(self, stack, h, forward, caches):
        length, states = len(stack) // stack.loops, []
        for loop in range(stack.loops):
            h, caches = step(stack, h, forward, caches, first=loop * length, stop=(loop + 1) * length)
            states.append(h)
        return self._mean(states), caches

    def _mean(self, states):
        weights = jax.nn.softmax(self.weights[...])
        return sum(weights[i].astype(state.dtype) * state for i, state in enumerate(states))


DEPTH = {"name": "mixed_loops", "loops": 2}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """For these tests only: what is registered is compared with what others cover."""
    monkeypatch.setitem(registry._components, "model.depth", dict(registry._components["model.depth"]))
    register("model.depth", "mixed_loops", implementation=f"{__name__}:MixedLoops")(MixedLoopsOptions)


def test_its_parameters_are_declared_assigned_and_trained(config, tmp_path):
    model = models.abstract(config(layers=4, depth=DEPTH), vocab_size=11)
    rows = {row.path: row for row in optim.assignment({"direction": {"name": "muon"}, "schedule": {"name": "constant"}}, model)}
    assert rows["depth.weights"].role == "vector"
    run = {
        "data": {"name": "bigram", "sequence_length": 8, "batch_size": 2, "vocabulary": 9, "validation_examples": 2},
        "model": config(layers=4, depth=DEPTH, output_init="normal", head_std=0.02),
        "optimizer": {"schedule": {"name": "constant"}},
        "train": {"steps": 2},
        "evaluate": {"every": 0, "batches": 1},
        "log": {"sample_tokens": 0},
    }
    trainer.train(run, tmp_path)
    assert np.abs(trainer.load(tmp_path).params["depth"]["weights"]).max() > 0


def test_it_decodes_as_it_runs_and_other_strategies_run_on_its_weights(config, awake, jit, tokens):
    model, rows = awake(config(layers=4, depth=DEPTH)), tokens(2, 5)

    @jit
    def both(state, rows):
        model = nnx.merge(graph, state)
        cache, parts = model.init_cache(2, 5), []
        for part in (rows[:, :3], rows[:, 3:]):
            logits, cache = model.step(part, cache)
            parts.append(logits)
        return model(rows), jnp.concatenate(parts, 1), model(rows, depth={"name": "sequential"})

    graph, state = nnx.split(model)
    whole, decoded, plain = both(state, rows)
    np.testing.assert_allclose(decoded, whole, atol=1e-5)
    assert np.abs(plain - whole).max() > 1e-3
    with pytest.raises(ConfigError, match="runs only as it was trained"):
        model(rows, depth=DEPTH | {"loops": 1})
    with pytest.raises(ConfigError, match="runs only as it was trained"):
        awake(config(layers=4))(rows, depth=DEPTH)
