"""Parameters declare their role and axes; nothing is guessed."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optim
from optim import roles
from strata import ConfigError


class Bag(nnx.Module):
    def __init__(self, **params):
        for name, param in params.items():
            setattr(self, name, param)


def test_importing_optim_and_its_options_loads_no_jax():
    code = "import sys, optim, optim.options; assert not {'jax', 'flax', 'optax'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_muon_starts_without_the_statistics_that_fitting_laws_needs():
    code = "import sys, optim.directions.muon, optim.directions.layer_aware; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_functions_are_not_hidden_by_modules_imported_before():
    code = (
        "import optim.directions.muon, optim.directions.adamw, optim.directions.newton_schulz\n"
        "import optim.recipe, optim.rules, optim\n"
        "for name in optim.__all__: assert callable(getattr(optim, name)) != (name in ('options', 'roles', 'schedules')), name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_role_axes_and_layers_are_read_from_the_metadata(model):
    found = roles.parameters(model)
    assert found["blocks.up"] == roles.Parameter(
        "blocks.up", (2, 8, 20), jnp.dtype("float32"), "matrix", ("layer", "embed", "mlp"), positions=(0, 1)
    )
    assert (found["blocks.up"].layers, found["embedding"].layers) == (2, 1)
    assert set(found) == set(roles.by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param))))


def test_module_state_and_abstract_model_declare_the_same(model):
    abstract = nnx.eval_shape(lambda: type(model)(jax.random.key(1)))
    assert roles.parameters(model) == roles.parameters(abstract) == roles.parameters(nnx.state(model))


def test_a_state_and_its_plain_dict_have_the_same_paths():
    model = Bag(blocks=nnx.List([nnx.Dict(value=nnx.Param(jnp.ones(3), role="vector", axes=("embed",)))]))
    state = nnx.state(model, nnx.Param)
    assert list(roles.by_path(state)) == list(roles.by_path(nnx.to_pure_dict(state))) == ["blocks.0.value"]
    assert list(roles.by_path({"blocks": {"0": {"value": jnp.ones(3)}}})) == ["blocks.0.value"]


@pytest.mark.parametrize(
    ("metadata", "shape", "sentence"),
    [
        ({"axes": ("a",)}, (3,), "without a role"),
        ({"role": "matirx", "axes": ("a", "b")}, (3, 4), "unknown role 'matirx'"),
        ({"role": "vector"}, (3,), "do not name the 1 axes"),
        ({"role": "matrix", "axes": ("layer", "embed")}, (2, 3, 4), "do not name the 3 axes"),
        ({"role": "matrix", "axes": ("embed", "layer", "mlp")}, (2, 3, 4), "layer axis comes first"),
        ({"role": "matrix", "axes": ("layer", "embed")}, (2, 3), "an axis in and an axis out"),
    ],
)
def test_a_wrong_declaration_is_refused_by_name(metadata, shape, sentence):
    model = Bag(
        good=nnx.Param(jnp.ones((2, 2)), role="matrix", axes=("embed", "mlp")), odd=nnx.Param(jnp.ones(shape), **metadata)
    )
    with pytest.raises(ConfigError, match=f"odd\\n.*{sentence}"):
        optim.build({"schedule": {"name": "constant"}}, model)


def test_every_wrong_declaration_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        roles.parameters(Bag(one=nnx.Param(jnp.ones(1)), two=nnx.Param(jnp.ones(2))))
    assert [problem.path for problem in error.value.problems] == ["one", "two"]


def test_the_state_of_an_optimizer_mirrors_what_its_parameters_have(model, params):
    tx = optim.build({"direction": {"name": "muon"}, "schedule": {"name": "constant"}}, model)
    declared = roles.parameters(model)
    mirrored = roles.mirror(jax.eval_shape(tx.init, params), declared, {path: path for path in declared}, "other")
    assert mirrored.count == "other"
    assert mirrored.directions["matrix"].momentum["blocks.up"] == "blocks.up"
    adam: optax.ScaleByAdamState = mirrored.directions["rest"]
    assert (adam.nu["head"], adam.count) == ("head", "other")


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"positions": (3, 1)}, "not 2 ascending places"),
        ({"positions": (3,)}, "not 2 ascending places"),
        ({"split": (4, 1)}, "do not make up the last axis"),
    ],
)
def test_places_and_blocks_that_do_not_fit_are_refused(metadata, sentence):
    up = nnx.Param(jnp.ones((2, 4, 6)), role="matrix", axes=("layer", "embed", "mlp"), **metadata)
    with pytest.raises(ConfigError, match=f"up\\n.*{sentence}"):
        roles.parameters(Bag(up=up))


def test_places_of_layers_are_counted_from_zero_unless_declared(model):
    assert roles.depth_of(roles.parameters(model)) == 2
    up = nnx.Param(jnp.ones((2, 4, 6)), role="matrix", axes=("layer", "embed", "mlp"), positions=(3, 7), split=(2, 4))
    declared = roles.parameters(Bag(up=up))
    assert declared["up"].positions == (3, 7) and roles.depth_of(declared) == 8 and declared["up"].split == (2, 4)


def test_adapters_of_executed_layers_do_not_move_the_depth_of_the_blocks_that_loops_share():
    """Laws by depth and `ends` are the same with adapters and without."""
    up = nnx.Param(jnp.ones((2, 8, 12)), role="matrix", axes=("layer", "embed", "mlp"))
    low = nnx.Param(jnp.ones((4, 8, 1)), role="factor", axes=("layer", "embed", "rank"))
    alone, looped = (roles.parameters(bag) for bag in (Bag(up=up), Bag(up=up, low=low)))
    assert roles.depth_of(looped) == 4 and roles.depth_of(looped, "matrix") == roles.depth_of(alone, "matrix") == 2
    rate = {"name": "temp_balance", "smallest": 2, "ends": False}
    config = {"direction": {"name": "muon"}, "layerwise": rate, "schedule": {"name": "constant"}}
    for bag in (Bag(up=up), Bag(up=up, low=low)):  # both layers are ends: none is left
        with pytest.raises(ConfigError, match="no matrix has 2 singular values and takes part"):
            optim.build(config, bag)


def factors(**metadata) -> Bag:
    return Bag(
        weight=nnx.Param(jnp.ones((4, 6)), role="matrix", axes=("embed", "mlp")),
        up=nnx.Param(jnp.ones((2, 6)), role="factor", axes=("rank", "mlp"), **metadata),
    )


def test_factors_go_to_the_direction_for_the_rest_undecayed():
    config = {"direction": {"name": "muon", "weight_decay": 0.1}, "schedule": {"name": "constant"}}
    rows = {row.path: row for row in optim.assignment(config, factors())}
    assert (rows["weight"].rule, rows["up"].rule) == ("matrix", "rest")
    assert (rows["weight"].weight_decay, rows["up"].weight_decay) == (0.1, 0.0)


@pytest.mark.parametrize("direction", ["adamw", "muon"])
def test_a_declared_multiplier_multiplies_direction_and_decay_as_a_rate_of_its_own(direction):
    decay = {"weight_decay": 0.5, "decay_roles": ["matrix", "factor"]}
    chosen = {"name": "adamw", **decay} if direction == "adamw" else {"name": "muon", "rest": decay}
    config = {"direction": chosen, "schedule": {"name": "constant"}, "clip_norm": None}
    plain, scaled = factors(), factors(multiplier=4.5)
    weights = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), weights)

    def moved(model):
        tx = optim.build(config, model)
        return tx.update(gradients, tx.init(weights), weights)[0]

    one, other = moved(plain), moved(scaled)
    assert jnp.array_equal(one["weight"], other["weight"])
    assert jnp.allclose(4.5 * one["up"], other["up"], rtol=1e-6)
    row = next(row for row in optim.assignment(config, scaled) if row.path == "up")
    assert row.learning_rate_multiplier == 4.5 and row.learning_rate == pytest.approx(4.5 * 3e-3)


@pytest.mark.parametrize("multiplier", [0, -1.0, float("nan"), float("inf"), "4", True, None])
def test_a_multiplier_that_is_no_positive_number_is_refused(multiplier):
    with pytest.raises(ConfigError, match="up\\n.*not a finite number above 0"):
        roles.parameters(factors(multiplier=multiplier))
