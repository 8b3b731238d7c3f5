"""Transformations of optax by dotted name, layer by layer: a stack of L matrices is L matrices."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import optim
from strata import ConfigError

constant = {"name": "constant"}
STATISTICS = [
    ("scale_by_trust_ratio", {}),
    ("scale_by_novograd", {}),
    ("clip_by_block_rms", {"threshold": 0.1}),
    ("scale_by_factored_rms", {"min_dim_size_to_factor": 4}),
]


def setting(name, arguments=None, sampling=None, **fields):
    direction = {"name": "optax", "transformation": f"optax.{name}", "arguments": arguments, "learning_rate": 1.0} | fields
    return {"direction": direction, "sampling": sampling, "schedule": constant, "clip_norm": None}


def uneven(params):
    """Weights whose layers differ in size, which statistics over a whole stack would mix."""
    blocks = {name: x.at[0].multiply(10.0) for name, x in params["blocks"].items()}
    return params | {"blocks": blocks}


def advance(config, model, params, gradients, cuts=(0, 0)):
    tx = optim.build(config, model)
    state, update, found = tx.init(params), jax.jit(tx.update, static_argnames="cut"), []
    for k, cut in enumerate(cuts):
        more = {"cut": cut} if config["sampling"] else {}
        moved, state = update(gradients(k), state, params, **more)
        found.append((moved, state))
    return found


@pytest.mark.parametrize(("name", "arguments"), STATISTICS)
def test_a_stack_moves_as_its_layers_would_as_separate_matrices(name, arguments, model, params, gradients):
    params = uneven(params)
    moved, _ = advance(setting(name, arguments), model, params, gradients)[-1]
    tx = getattr(optax, name)(**arguments)
    update = jax.jit(tx.update)
    for path in ("query", "up"):
        for layer in range(2):
            state = tx.init(params["blocks"][path][layer])
            for k in range(2):
                apart, state = update(gradients(k)["blocks"][path][layer], state, params["blocks"][path][layer])
            np.testing.assert_allclose(moved["blocks"][path][layer], -apart, rtol=1e-5)


@pytest.mark.parametrize("name", ["scale_by_adam", "scale_by_lion", "scale_by_amsgrad"])
def test_elementwise_transformations_give_the_numbers_of_the_whole_stack(name, model, params, gradients):
    own, _ = advance(setting(name), model, params, gradients, cuts=(0,) * 4)[-1]
    whole, _ = advance(setting(name, per_layer=False), model, params, gradients, cuts=(0,) * 4)[-1]
    # A count for each layer is another program: its powers may round otherwise.
    rounding = 0 if name == "scale_by_lion" else 1e-6
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rounding), own, whole)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("scale_by_lbfgs", {}, "depends on the others"),
        ("scale_by_sm3", {}, "does not run on one layer at a time"),  # the model has a scalar a layer, and SM3 no rank 0
        ("clip_by_global_norm", {"max_norm": 100.0}, "depends on the others"),
        ("add_noise", {"eta": 0.1, "gamma": 0.5, "key": 0}, "random numbers"),
    ],
)
def test_what_has_no_meaning_for_a_layer_alone_is_refused_and_runs_over_the_whole_tree(
    name, arguments, sentence, model, params, gradients
):
    with pytest.raises(ConfigError, match=f"(?s)optimizer.direction.transformation.*{sentence}.*per_layer = false"):
        optim.build(setting(name, arguments), model)
    moved, _ = advance(setting(name, arguments, per_layer=False), model, params, gradients)[-1]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(moved))


@pytest.mark.parametrize(("name", "arguments"), STATISTICS)
def test_under_layer_sampling_frozen_layers_keep_their_state_and_active_ones_do_not_notice(
    name, arguments, model, params, gradients
):
    params, sampling = uneven(params), {"name": "drop_muon", "buckets": 2}
    (_, before), (part, after) = advance(setting(name, arguments, sampling), model, params, gradients, cuts=(0, 1))
    whole, _ = advance(setting(name, arguments, sampling), model, params, gradients, cuts=(0, 0))[-1]
    for path, x in part["blocks"].items():
        assert not np.any(x[0])
        np.testing.assert_allclose(x[1], whole["blocks"][path][1], rtol=1e-5, atol=1e-7)
        own = f"blocks.{path}"
        pairs = zip(jax.tree.leaves(before.directions["all"][own]), jax.tree.leaves(after.directions["all"][own]), strict=True)
        for one, other in pairs:
            assert one.shape == other.shape and one[0].tobytes() == other[0].tobytes()


def test_whole_stacks_under_layer_sampling_are_refused(model):
    config = setting("scale_by_lion", sampling={"name": "drop_muon", "buckets": 2}, per_layer=False)
    with pytest.raises(ConfigError, match=r"(?s)optimizer\.direction\.per_layer.*which layers were drawn"):
        optim.build(config, model)
    inner = config["direction"]
    config["direction"] = {"name": "muon", "rest": inner}
    with pytest.raises(ConfigError, match=r"optimizer\.direction\.rest\.per_layer"):
        optim.build(config, model)


def test_a_direction_whose_state_is_not_sliced_by_layer_is_refused_under_layer_sampling(model, monkeypatch):
    """As a plugin's may be: factored moments of a stack have other axes first, SM3's one array an axis."""
    config = {"direction": {"name": "adamw"}, "sampling": {"name": "drop_muon", "buckets": 2}, "schedule": constant}
    for factored in (lambda *_: optax.scale_by_factored_rms(min_dim_size_to_factor=4), lambda *_: optax.scale_by_sm3()):
        monkeypatch.setattr(optax, "scale_by_adam", factored)
        with pytest.raises(
            ConfigError, match=r"(?s)optimizer\.sampling\.name.*group 'all' cannot leave the layers below 1 out"
        ):
            optim.build(config, model)
        optim.build(config | {"sampling": None}, model)
