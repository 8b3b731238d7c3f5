"""Any direction x layerwise rate x layer sampling x schedule updates, resumes bit for bit and says what it does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optim

STEPS = 4
KINDS = ["up=up"]
DIRECTIONS = {
    "adamw": {},
    "muon": {"weight_decay": 0.1},
    "normuon": {
        "weight_decay": 0.1,
        "newton_schulz": {"name": "measured", "every": 1, "choose_at": 2, "candidates": ["jordan2", "jordan3"]},
    },
    "sgd": {"weight_decay": 0.1},
    "lmo": {"weight_decay": 0.1},
    "optax": {"weight_decay": 0.1, "transformation": "optax.scale_by_lion", "schedule": {"name": "inverse_sqrt"}},
    "muon ": {
        "weight_decay": 0.1,
        "form": "sharp",
        "newton_schulz": {"name": "predicted", "kinds": KINDS, "candidates": ["jordan2"]},
    },
}
LAYERWISE = {
    "": None,
    "llr": {"smallest": 3, "interval": 2, "ramp": 2, "adapt": 1.0},
    "frozen": {"smallest": 3},
    "temp_balance": {"smallest": 3, "ends": True, "interval": 2},
    "alpha_decay": {"smallest": 3, "interval": 2},
    "by_type": {"kinds": KINDS},
    "lanton": {"interval": 1},
}
SAMPLING = {"": None, "drop_muon": {"buckets": 2}, "drop_muon ": {"buckets": 2, "distribution": "shifted"}}
SCHEDULES = {
    "constant": {"warmup": 2},
    "cosine": {},
    "wsd": {"shape": "inverse", "final": 0.1, "decay": 0.5},
    "wsd_s": {"budgets": [2, STEPS], "decay": 0.5},
    "cyclic_cosine": {"budgets": [2, STEPS]},
    "infinite": {"cooldown": 1, "anneal": 1},
    "linear": {},
}
AXES = (DIRECTIONS, LAYERWISE, SAMPLING, SCHEDULES)
# What every change must pass; the rest differs from these in numbers more than in code.
FEWER = (
    ["adamw", "muon ", "normuon", "lmo", "optax"],
    ["", "llr", "alpha_decay", "by_type", "lanton"],
    ["", "drop_muon"],
    ["constant", "wsd", "wsd_s", "cyclic_cosine", "infinite"],
)


def covering(axes: Sequence[Iterable[str]]) -> list[tuple[str, ...]]:
    """Rows in which every two choices of two axes meet at least once: greedy, the same every time."""
    pairs = list(itertools.combinations(range(len(axes)), 2))
    missing = {(i, one, j, other) for i, j in pairs for one in axes[i] for other in axes[j]}

    def covered(row: tuple[str, ...]) -> set:
        return {(i, row[i], j, row[j]) for i, j in pairs}

    every, rows = list(itertools.product(*axes)), []
    while missing:
        rows.append(max(every, key=lambda row: len(covered(row) & missing)))
        missing -= covered(rows[-1])
    return rows


class Tiny(nnx.Module):
    """Two layers of one matrix and one gain, an embedding and a head."""

    def __init__(self):
        key = jax.random.key(0)
        self.embedding = nnx.Param(jax.random.normal(key, (5, 3)), role="embedding", axes=("vocab", "embed"))
        self.up = nnx.Param(jax.random.normal(key, (2, 3, 4)), role="matrix", axes=("layer", "embed", "mlp"))
        self.gain = nnx.Param(jnp.ones((2, 3)), role="vector", axes=("layer", "embed"))
        self.head = nnx.Param(jax.random.normal(key, (3, 5)), role="head", axes=("embed", "vocab"))


def config_of(row: tuple[str, ...]) -> dict:
    parts = {}
    for name, chosen, table in zip(("direction", "layerwise", "sampling", "schedule"), row, AXES, strict=True):
        if table[chosen] is not None:
            parts[name] = {"name": chosen.strip(), **table[chosen]}
    return parts


def gradient(k, params):
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(17 * k + x.size), x.shape).astype(x.dtype), params)


def trained(update, table, draws, params, state, first, last):
    for k in range(first, last + 1):
        more = {} if draws is None else {"cut": draws.cut(k, 0)}
        moved, state = update(gradient(k, params), state, params, rates=table(k), **more)
        params = optax.apply_updates(params, moved)
    return params, state


@pytest.mark.parametrize("axes", [FEWER, AXES], ids=["fewer", "all"])
def test_every_two_choices_meet_in_the_covering_set(axes):
    rows = covering(axes)
    for i, j in itertools.combinations(range(len(axes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(axes[i], axes[j]))
    assert len(rows) < 1.3 * sorted(len(axis) for axis in axes)[-1] * sorted(len(axis) for axis in axes)[-2]


def name_of(row):
    return "-".join(part.replace(" ", "2") or "none" for part in row)


@pytest.mark.slow
@pytest.mark.parametrize("row", covering(AXES), ids=name_of)
def test_a_combination_of_all_updates_and_resumes_bit_for_bit(row):
    check(row)


@pytest.mark.parametrize("row", covering(FEWER), ids=name_of)
def test_a_combination_updates_and_resumes_bit_for_bit(row):
    check(row)


def check(row):
    model, config = Tiny(), config_of(row)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx, table = optim.build(config, model, steps=STEPS), optim.rates(config, STEPS)
    draws = optim.cuts(config, model, steps=STEPS)
    assert len(optim.assignment(config, model)) == 4
    start, update = tx.init(params), jax.jit(tx.update, static_argnames="cut")
    whole = trained(update, table, draws, params, start, 1, STEPS)
    half = trained(update, table, draws, params, start, 1, 2)
    saved = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
    jax.tree.map(np.testing.assert_array_equal, trained(update, table, draws, *saved, 3, STEPS), whole)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(whole[0]))
    assert np.any(whole[0]["up"][1] != params["up"][1]) and np.any(whole[0]["head"] != params["head"])
    assert jax.tree.structure(whole[1]) == jax.tree.structure(start)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole[1]) == jax.tree.map(lambda x: (x.shape, x.dtype), start)


@pytest.mark.parametrize(
    "row",
    [("muon", "llr", "", "constant"), ("normuon", "lanton", "drop_muon", "wsd_s"), ("lmo", "alpha_decay", "", "constant")],
    ids=lambda row: "-".join(part or "none" for part in row),
)
def test_bfloat16_parameters_keep_their_type_and_move_nearly_as_in_float32(row):
    config, model = config_of(row), Tiny()
    exact = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    tx, draws = optim.build(config, model, steps=STEPS), optim.cuts(config, model, steps=STEPS)
    more = {} if draws is None else {"cut": 0}
    moved, state = {}, {}
    for name, params in (("exact", exact), ("short", short)):
        update = jax.jit(lambda g, params, more=more: tx.update(g, tx.init(params), params, **more))
        moved[name], state[name] = update(gradient(1, params), params)
    for path, leaf in moved["short"].items():
        assert leaf.dtype == jnp.bfloat16
        size = np.abs(moved["exact"][path]).max()
        np.testing.assert_allclose(leaf.astype(jnp.float32), moved["exact"][path], atol=0.1 * size)
    assert jax.tree.structure(state["exact"]) == jax.tree.structure(state["short"])
