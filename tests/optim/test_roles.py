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
        "blocks.up", (2, 8, 20), jnp.dtype("float32"), "matrix", ("layer", "embed", "mlp")
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
