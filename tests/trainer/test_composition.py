"""Every part composes with every other: sets that cover all pairs train, save, resume bit for bit, and generate."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optim
from optim.roles import parameters
from strata import registry
from trainer import config as configuration
from trainer.checkpoint import Checkpointer
from trainer.setup import assemble, needs_halves
from trainer.step import initial_state

# Mixers share a model as a hybrid, so that few programs cover all of them.
MIXERS = {
    "decaying": ["attention", "linear_attention", "retention", "lightning"],
    "gated": ["simple_gla", "gla", "lightnet", "window"],
    "delta": ["delta_net", "gated_delta_net", "kda", "hedgehog"],
}
VARIANTS = {
    "window": {"name": "attention", "window": 3},
    "hedgehog": {"name": "linear_attention", "feature_map": "hedgehog"},
    "noble": {"name": "noble", "rank": 2},
    "lora": {"name": "lora", "rank": 2},
    "recursive": {"name": "recursive", "loops": 2, "rank": 2},
    "layer_parallel": {"name": "layer_parallel", "layers": 3, "sweeps": 1},
}
for _name in registry.names("model.mixer"):
    if _name != "hybrid" and _name not in {VARIANTS.get(name, {"name": name})["name"] for name in sum(MIXERS.values(), [])}:
        min(MIXERS.values(), key=len).append(_name)
CHOICES = {
    "placement": registry.names("model.placement"),
    "mixer": list(MIXERS),
    "depth": registry.names("model.depth"),
    "norm": registry.names("model.norm"),
    "linear": registry.names("model.linear"),
    "ffn": [name for name in registry.names("model.ffn") if name not in ("glu", "mlp")],  # which the named ones are
}


def covering(choices):
    """Rows that hold every pair of values of two different fields at least once; the longest fields first."""
    names = sorted(choices, key=lambda name: -len(choices[name]))
    missing = {frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(names, 2) for x in choices[a] for y in choices[b]}
    rows = []
    while missing:
        row = dict(sorted(min(missing, key=sorted)))
        for name in names:
            if name not in row:
                row[name] = max(
                    choices[name],
                    key=lambda value, name=name: sum(frozenset([(name, value), item]) in missing for item in row.items()),
                )
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(row)
    return rows


def product(choices):
    """Every row."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def part(name):
    return VARIANTS.get(name, {"name": name})


def mixers_of(row):
    """The mixers of a group; half of them, in turn, where the group is looped often, since every loop is compiled anew."""
    group, looped = MIXERS[row["mixer"]], [other for other in LOOPED if other["mixer"] == row["mixer"]]
    if row not in looped or len(looped) == 1:
        return group
    return group[2 * (looped.index(row) % 2) :][:2]


def config_of(row):
    mixers = mixers_of(row)
    mixer = {"name": "hybrid", "pattern": [part(name) for name in mixers]}
    chosen = {name: part(row[name]) for name in ("placement", "depth", "norm", "linear", "ffn")}
    layers = 2 * len(mixers) if row["depth"] == "recursive" else max(4, len(mixers))
    model = {"width": 8, "layers": layers, "heads": 2, "mixer": mixer, **chosen}
    return {
        "data": {"name": "bigram", "sequence_length": 8, "batch_size": 2, "vocabulary": 9, "validation_examples": 2},
        "model": model,
        # Momentum is state enough to resume; recipes have a covering set of their own.
        "optimizer": {"direction": {"name": "sgd"}, "schedule": {"name": "constant"}},
        "train": {"steps": 3},
    }


ROWS = covering(CHOICES)
LOOPED = [row for row in ROWS if row["depth"] == "recursive"]


def test_the_set_covers_every_pair_and_every_registered_part():
    for a, b in itertools.combinations(CHOICES, 2):
        found = {(row[a], row[b]) for row in ROWS}
        assert found == set(itertools.product(CHOICES[a], CHOICES[b]))
    assert len(ROWS) < 1.5 * max(len(x) * len(y) for x, y in itertools.combinations(CHOICES.values(), 2))
    mixers = {part(name)["name"] for row in LOOPED for name in mixers_of(row)}
    assert mixers | {"hybrid"} == set(registry.names("model.mixer"))


def named(row):
    return "-".join(row.values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[name] for name in CHOICES))
def test_it_trains_resumes_and_generates(row, tmp_path):
    check_model(row, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("row", product(CHOICES), ids=named)
def test_every_combination_trains_resumes_and_generates(row, tmp_path):
    check_model(row, tmp_path)


def check_model(row, tmp_path):
    setup = assemble(configuration.resolve_config(config_of(row)))
    rates, rows = optim.rates(setup.config.optimizer, 3), setup.dataset.train(**setup.share(2))
    with jax.set_mesh(setup.mesh):
        state = initial_state(drawn(setup.model), setup.transformation())
        inputs = [(setup.put_batch(next(iter(rows)), 2), setup.put_scalars(rates(k))) for k in (1, 2, 3)]
        step = setup.jitted_train_step()
        for k in (0, 1):
            state, metrics = step(state, *inputs[k])
        assert bool(metrics["finite"]) and float(metrics["grad_norm"]) > 0
        with_checkpoint(tmp_path, setup, state)
        expected, metrics = step(state, *inputs[2])
        resumed, again = step(with_checkpoint(tmp_path, setup), *inputs[2])
    assert math.isfinite(float(metrics["nats"]))
    for one, two in zip(jax.tree.leaves((expected, metrics)), jax.tree.leaves((resumed, again)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()

    def write(params, prompts, start):
        model = nnx.merge(setup.graph, nnx.State(params))
        logits, cache = model.step(prompts, model.init_cache(2, 5) | {"start": start})
        return model.step(jnp.argmax(logits[:, -1:], -1).astype(jnp.int32), cache)[0]

    prompts, start = jnp.asarray([[1, 2, 3], [0, 0, 4]], jnp.int32), jnp.asarray([0, 2], jnp.int32)
    logits = jax.jit(write)(expected["params"], prompts, start)
    assert logits.shape == (2, 1, setup.model.vocab_size) and np.all(np.isfinite(logits))


# ---- direction x layerwise rate x layer sampling x schedule x depth strategy


STEPS, SAVED = 4, 2
RECIPES = {
    "direction": {
        "adamw": {},
        "muon": {"weight_decay": 0.1, "newton_schulz": {"name": "predicted", "candidates": ["jordan2", "jordan3"]}},
        "normuon": {
            "weight_decay": 0.1,
            "newton_schulz": {"name": "measured", "every": 1, "choose_at": 2, "candidates": ["jordan2", "jordan3"]},
        },
        "sgd": {"weight_decay": 0.1},
        "lmo": {"weight_decay": 0.1},
        "optax": {"weight_decay": 0.1, "schedule": {"name": "inverse_sqrt"}},
    },
    "layerwise": {
        "none": None,
        "llr": {"smallest": 4, "interval": 2, "ramp": 2, "adapt": 1.0},
        "frozen": {"smallest": 4},
        "temp_balance": {"smallest": 4, "interval": 2, "ends": True},
        "alpha_decay": {"smallest": 4, "interval": 2},
        "by_type": {},
        "lanton": {"interval": 1},
        "independent": {"name": "lanton", "interval": 1, "estimator": "independent"},
    },
    "sampling": {"none": None, "drop_muon": {"buckets": 2}},
    "schedule": {
        "constant": {},
        "linear": {},
        "cosine": {},
        "inverse_sqrt": {},
        "wsd": {"decay": 0.5},
        "wsd_s": {"budgets": [SAVED, STEPS], "decay": 0.5, "decay_of": "cycle"},
        "cyclic_cosine": {"budgets": [SAVED, STEPS]},
        "infinite": {"cooldown": 1, "anneal": 1},
    },
    "depth": {
        "sequential": {},
        "recursive": {"loops": 2, "rank": 2},
        "layer_parallel": {"layers": 3, "sweeps": 1},
    },
}
KINDS = {name: f"optimizer.{name}" for name in RECIPES} | {"depth": "model.depth"}
for _kind, _choices in RECIPES.items():
    _listed = {fields.get("name", name) for name, fields in _choices.items() if fields is not None}
    _choices |= {name: {} for name in registry.names(KINDS[_kind]) if name not in _listed}
EVERY = covering({name: list(choices) for name, choices in RECIPES.items()})
QUICK = [
    {"direction": "normuon", "layerwise": "lanton", "sampling": "drop_muon", "schedule": "wsd_s", "depth": "sequential"},
    {"direction": "muon", "layerwise": "llr", "sampling": "none", "schedule": "wsd", "depth": "recursive"},
    {"direction": "adamw", "layerwise": "independent", "sampling": "none", "schedule": "infinite", "depth": "layer_parallel"},
]


def recipe_part(name, chosen):
    fields = RECIPES[name][chosen]
    return None if fields is None else {"name": chosen, **fields}


def recipe_config(row):
    chosen = {name: recipe_part(name, row[name]) for name in RECIPES}
    depth = chosen.pop("depth")
    return {
        "data": {"name": "bigram", "sequence_length": 8, "batch_size": 4, "vocabulary": 9, "validation_examples": 2},
        "model": {"width": 8, "layers": 4, "heads": 2, "depth": depth | {"unroll": False}},
        "optimizer": {name: value for name, value in chosen.items() if value is not None},
        "train": {"steps": STEPS, "accumulation": 2, "precision": "bfloat16"},
    }


def test_the_set_of_recipes_covers_every_pair_and_every_registered_part():
    for a, b in itertools.combinations(RECIPES, 2):
        assert {(row[a], row[b]) for row in EVERY} == set(itertools.product(RECIPES[a], RECIPES[b]))
    for name, kind in KINDS.items():
        assert {recipe_part(name, chosen)["name"] for chosen in RECIPES[name] if chosen != "none"} == set(registry.names(kind))


@pytest.mark.parametrize(
    "row",
    [*QUICK, *(pytest.param(row, marks=pytest.mark.slow) for row in EVERY if row not in QUICK)],
    ids=named,
)
def test_a_recipe_trains_resumes_and_reports_its_assignment(row, tmp_path):
    check_recipe(row, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("row", product({name: list(choices) for name, choices in RECIPES.items()}), ids=named)
def test_every_recipe_trains_resumes_and_reports_its_assignment(row, tmp_path):
    check_recipe(row, tmp_path)


def check_recipe(row, tmp_path):
    setup = assemble(configuration.resolve_config(recipe_config(row)))
    check_assignment(setup, row)
    rates, rows = optim.rates(setup.config.optimizer, STEPS), setup.dataset.train(**setup.share(4))
    inputs = {k: (setup.put_batch(next(rows), 4), setup.put_scalars(rates(k))) for k in range(1, STEPS + 1)}
    programs = {}

    def train(state, first, last):
        for k in range(first, last + 1):
            cut = None if setup.cuts is None else setup.cuts.cut(k, setup.config.seed)
            if cut not in programs:
                programs[cut] = setup.jitted_train_step(cut)
            state, metrics = programs[cut](state, *inputs[k])
            assert bool(metrics["finite"]) and float(metrics["grad_norm"]) > 0
        return state, metrics

    with jax.set_mesh(setup.mesh):
        state, _ = train(initial_state(drawn(setup.model), setup.transformation()), 1, SAVED)
        with_checkpoint(tmp_path, setup, state)
        expected = train(state, SAVED + 1, STEPS)
        resumed = train(with_checkpoint(tmp_path, setup), SAVED + 1, STEPS)
    assert math.isfinite(float(expected[1]["nats"]))
    for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
    check_state(setup, row, expected[0]["optimizer"])


def check_assignment(setup, row):
    """Every parameter once, with the words of what was chosen."""
    table = optim.assignment(setup.config.optimizer, setup.model)
    assert [line.path for line in table] == list(parameters(setup.model)) and all(line.rule for line in table)
    assert any(line.layerwise for line in table) == (row["layerwise"] != "none")
    assert all(line.sampling for line in table) == (row["sampling"] != "none")
    assert any(line.newton_schulz for line in table) == (row["direction"] in ("muon", "normuon", "lmo"))
    assert needs_halves(setup.config) == (row["layerwise"] == "independent")


def check_state(setup, row, optimizer):
    """What layers share has one multiplier for all loops; what executed layers own has one for each."""
    found = optim.multipliers(optimizer)
    values = found["rate"] | found["decay"]
    assert bool(values) == (row["layerwise"] != "none")
    declared, unique = parameters(setup.model), 4 // setup.config.model.depth.loops
    for path, value in values.items():
        if path.startswith("blocks."):
            assert value.shape == (4 if declared[path].role == "factor" else unique,), path
        assert np.all(np.isfinite(value)) and np.all(np.asarray(value) > 0)


# ---- shared


def drawn(model):
    """Parameters of an abstract model, drawn by NumPy: gains around 1, the rest around 0, nothing at zero."""
    rng, flat = np.random.default_rng(0), {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        around = 1.0 if path[-1] == "scale" else 0.0
        flat[path] = jnp.asarray(around + 0.2 * rng.standard_normal(variable.shape), jnp.float32)
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def with_checkpoint(path, setup, state=None):
    """Save the state of step 2, or load it."""
    checkpointer = Checkpointer(path)
    try:
        if state is not None:
            return checkpointer.save(2, state, {}, blocking=True)
        shapes = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            setup.abstract_state(),
            setup.state_shardings(),
        )
        return checkpointer.restore(shapes).state
    finally:
        checkpointer.close()
