"""Micro-batches: the gradient of all their scored tokens, however these are spread, by a program of one size."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim
from trainer import config as configuration
from trainer.setup import assemble
from trainer.step import train_step

SCORED = (16, 0, 9, 0, 1, 0, 0, 2)  # tokens of each row: every second row has almost none, as after padding


@pytest.fixture
def part(tiny):
    """A step in some micro-batches as `(function, arguments)`, by an optimizer that shows the size of a gradient."""
    plain = {"direction": {"name": "sgd", "momentum": 0.0, "learning_rate": 1.0}, "clip_norm": None}
    setup = assemble(
        configuration.resolve_config(
            tiny(data__batch_size=len(SCORED), optimizer=plain | {"schedule": {"name": "constant", "warmup": 0}})
        )
    )
    batch = setup.dataset.examples.read(range(len(SCORED)))
    batch["weights"] = (np.arange(batch["tokens"].shape[1]) < np.array(SCORED)[:, None]).astype(np.float32)
    params = setup.initial_params()
    state = {"params": params, "optimizer": setup.transformation().init(params)}
    state["guard"] = {"skipped": jnp.int32(0), "halted": jnp.bool_(False)}
    rates = {name: jnp.float32(rate) for name, rate in optim.rates(setup.config.optimizer, 8)(1).items()}

    def of(count):
        option = dataclasses.replace(setup.config.train, accumulation=count)
        return train_step(setup.graph, setup.transformation(), option, None), (state, batch, rates)

    return of


def test_uneven_micro_batches_give_the_step_of_the_whole_batch(part):
    step, arguments = part(1)
    before = arguments[0]["params"]
    whole, expected = jax.jit(step)(*arguments)
    right = jax.tree.map(jnp.subtract, whole["params"], before)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(right))
    assert largest > 1e-2 and expected["tokens"] == sum(SCORED)
    for count in (2, 8):
        state, metrics = jax.jit(part(count)[0])(*arguments)
        for name in ("tokens", "nats", "objective", "grad_norm"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
        moved = jax.tree.map(jnp.subtract, state["params"], before)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), moved, right)


def test_micro_batches_are_one_scan_whose_program_does_not_grow_with_them(part):
    programs = {count: jax.make_jaxpr(part(count)[0])(*part(count)[1]).jaxpr for count in (1, 2, 4)}
    scans = {count: [e.params["length"] for e in programs[count].eqns if e.primitive.name == "scan"] for count in programs}
    assert scans[2].count(2) == scans[1].count(2) + 1 and scans[4].count(4) == scans[1].count(4) + 1
    assert str(programs[2]).count(" = ") == str(programs[4]).count(" = ") > 100
