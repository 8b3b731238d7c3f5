"""The recipe: every parameter one rule, clipped, decayed by role, at the rate that was asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

import optim
from optim import roles
from optim.options import AdamW, Constant, Muon, Optimizer
from optim.rules import Rule, assign
from strata import ConfigError

constant = {"name": "constant"}
directions = ["adamw", "muon"]
steps = 6


def recipe(direction: str, **fields) -> dict:
    return {"direction": {"name": direction}, "schedule": {"name": "wsd", "warmup": 2, "decay": 0.5}, **fields}


def run(tx, params, gradients, count=steps, rates=None):
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for k in range(1, count + 1):
        given = {} if rates is None else {"rates": rates(k)}
        moved, state = update(gradients(k), state, params, **given)
        params = optax.apply_updates(params, moved)
    return params, state


def assert_close(one, other, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), one, other)


def test_adamw_equals_optax_with_the_decay_masked_by_role(model, params, gradients):
    config = {"direction": {"name": "adamw", "learning_rate": 0.01}, "schedule": constant, "clip_norm": 1.0}
    mask = jax.tree.map(lambda leaf: leaf.ndim == 3, params)  # the three stacked matrices
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01, 0.9, 0.95, weight_decay=0.1, mask=mask))
    assert_close(run(optim.build(config, model), params, gradients)[0], run(reference, params, gradients)[0], 2e-7)


def test_a_decay_of_the_rest_that_reaches_no_parameter_is_refused(model):
    def rest(**fields):
        return {"direction": {"name": "muon", "rest": {"name": "adamw", **fields}}, "schedule": constant}

    with pytest.raises(ConfigError, match=r"(?s)optimizer\.direction\.rest\.weight_decay = 0\.5.*reaches no parameter"):
        optim.build(rest(weight_decay=0.5), model)
    rows = optim.assignment(rest(weight_decay=0.5, decay_roles=["embedding", "head"]), model)
    assert {row.role for row in rows if row.weight_decay == 0.5} == {"embedding", "head"}
    for fields in ({}, {"weight_decay": 0.0}):
        assert all(row.weight_decay == 0 for row in optim.assignment(rest(**fields), model))


def test_a_decay_of_roles_that_no_parameter_has_is_refused(model):
    """Role factor is that of low-rank factors, of which this model has none."""
    for direction, path in (("adamw", ""), ("sgd", ""), ("lmo", ""), ("muon", "rest.")):

        def config(name=direction, **fields):
            own = {"name": name, **fields} if name != "muon" else {"name": name, "rest": {"name": "adamw", **fields}}
            return {"direction": own, "schedule": constant}

        with pytest.raises(
            ConfigError, match=rf"1 problem .*\n  optimizer\.direction\.{path}decay_roles = \['factor'\]\n.*0\.5 "
        ):
            optim.build(config(weight_decay=0.5, decay_roles=["factor"]), model)
        for fields in (
            {"weight_decay": 0.0, "decay_roles": ["factor"]},
            {"weight_decay": 0.5, "decay_roles": ["factor", "head"]},
        ):
            rows = optim.assignment(config(**fields), model)
            assert {row.role for row in rows if row.weight_decay == 0.5} == {"head"} & set(fields["decay_roles"])


def test_matrices_move_by_muon_and_the_rest_by_adamw(model, params, gradients):
    config = {"direction": {"name": "muon", "weight_decay": 0.05}, "schedule": constant, "clip_norm": None}
    found, state = run(optim.build(config, model), params, gradients)
    matrices = {"query", "up", "down"}

    def of_matrices(tree: dict) -> dict:
        return {name: tree["blocks"][name] for name in matrices}

    muon = optim.muon(0.02, weight_decay=0.05)
    expected, _ = run(muon, of_matrices(params), lambda k: of_matrices(gradients(k)))
    assert_close(of_matrices(found), expected, 1e-6)
    adam, _ = run(optax.adamw(3e-3, 0.9, 0.95, weight_decay=0), params, gradients)
    for name in ("embedding", "positions", "head"):
        assert_close(found[name], adam[name], 2e-7)
    for name in ("gain", "temperature"):
        assert_close(found["blocks"][name], adam["blocks"][name], 2e-7)
    assert set(state.directions["matrix"].momentum) == {f"blocks.{name}" for name in matrices}


@pytest.mark.parametrize("wrong", [0, -1, 1e3, True, "6"])
def test_a_run_has_a_whole_number_of_updates(wrong, model):
    for call in (optim.build, optim.cuts, lambda config, model, steps: optim.rates(config, steps)):
        with pytest.raises(ConfigError, match=f"steps = {wrong!r}: expected the whole number of updates"):
            call({"schedule": constant}, model, steps=wrong)
    assert optim.build(recipe("adamw"), model, steps=np.int64(steps))


@pytest.mark.parametrize("direction", directions)
def test_rates_given_equal_rates_inside_jit(direction, model, params, gradients):
    config = recipe(direction)
    tx = optim.build(config, model, steps=steps)
    assert_close(run(tx, params, gradients)[0], run(tx, params, gradients, rates=optim.rates(config, steps))[0], 1e-6)


@pytest.mark.parametrize("direction", directions)
def test_the_peak_rate_and_the_schedule_are_not_in_the_program(direction, model, params, gradients):
    def text(rate, schedule):
        config = {"direction": {"name": direction, "learning_rate": rate}, "schedule": schedule}
        tx = optim.build(config, model, steps=steps)
        given = optim.rates(config, steps)(1)
        return jax.jit(lambda *a, rates: tx.update(*a, rates=rates)).lower(gradients(1), tx.init(params), params, rates=given)

    first, second = text(0.1, constant), text(0.2, {"name": "cosine", "warmup": 3})
    assert first.as_text() == second.as_text()


def test_new_rates_trace_nothing(model, params, gradients):
    config, traces = recipe("muon"), []
    tx = optim.build(config, model, steps=steps)

    @jax.jit
    def update(gradients, state, params, rates):
        traces.append(1)
        return tx.update(gradients, state, params, rates=rates)

    state = tx.init(params)
    for k in range(1, steps + 1):
        _, state = update(gradients(k), state, params, optim.rates(config, steps)(k))
    config["direction"]["learning_rate"] = 0.5
    update(gradients(1), state, params, optim.rates(config, steps)(1))
    assert len(traces) == 1


def test_rates_scale_each_group_by_itself(model, params, gradients):
    tx = optim.build({"direction": {"name": "muon"}, "schedule": constant}, model)
    moved, _ = tx.update(gradients(1), tx.init(params), params, rates={"matrix": np.float32(0), "rest": np.float32(1)})
    assert not np.any(moved["blocks"]["up"]) and np.any(moved["head"])


def test_weight_decay_reaches_decay_roles_only_and_multiplies_the_rate(model, params):
    config = {
        "direction": {"name": "adamw", "learning_rate": 0.5, "weight_decay": 0.1, "decay_roles": ["matrix", "table"]},
        "schedule": constant,
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = optim.build(config, model)
    moved, _ = tx.update(zero, tx.init(params), params)
    for path, leaf in roles.by_path(moved).items():
        decayed = path in ("positions", "blocks.query", "blocks.up", "blocks.down")
        np.testing.assert_allclose(leaf, -0.05 * roles.by_path(params)[path] * decayed, rtol=1e-6)


def test_a_gradient_of_large_norm_counts_as_one_of_clip_norm(model, params, gradients):
    config = {"direction": {"name": "adamw", "epsilon": 1.0, "weight_decay": 0.0}, "schedule": constant, "clip_norm": 0.5}
    tx = optim.build(config, model)
    state, g = tx.init(params), gradients(1)
    norm = optim.global_norm(g)
    assert norm == pytest.approx(float(optax.tree.norm(g)), rel=1e-6) and norm > 5
    clipped, _ = tx.update(g, state, params)
    shrunk, _ = tx.update(jax.tree.map(lambda x: x * (0.5 / norm), g), state, params)
    assert_close(clipped, shrunk, 1e-8)
    small = jax.tree.map(lambda x: x * (0.4 / norm), g)
    plain = optim.build({**config, "clip_norm": None}, model)
    assert_close(tx.update(small, state, params)[0], plain.update(small, state, params)[0], 0)


def test_a_known_norm_is_used_and_not_computed_again(model, params, gradients):
    tx = optim.build(recipe("adamw"), model, steps=steps)
    state, g = tx.init(params), gradients(1)
    own, _ = tx.update(g, state, params)
    assert_close(tx.update(g, state, params, grad_norm=optim.global_norm(g))[0], own, 0)
    text = str(jax.make_jaxpr(lambda norm: tx.update(g, state, params, grad_norm=norm)[0])(1.0))
    assert "reduce_sum" not in text
    assert "reduce_sum" in str(jax.make_jaxpr(lambda: tx.update(g, state, params)[0])())


def test_the_norm_of_zero_gradients_is_zero_and_moves_nothing(model, params):
    config = {"direction": {"name": "muon", "rest": {"weight_decay": 0.0}}, "schedule": constant}
    zero, tx = jax.tree.map(jnp.zeros_like, params), optim.build(config, model)
    assert_close(tx.update(zero, tx.init(params), params)[0], zero, 0)
    assert optim.global_norm({}) == 0


def test_a_gradient_that_is_not_finite_stays_visible(model, params, gradients):
    tx = optim.build(recipe("adamw"), model, steps=steps)
    for bad in (np.nan, np.inf):
        g = gradients(1)
        g["head"] = g["head"].at[0, 0].set(bad)
        moved, _ = tx.update(g, tx.init(params), params)
        assert not np.isfinite(moved["head"][0, 0])


@pytest.mark.parametrize("direction", directions)
def test_a_state_and_its_plain_dict_give_the_same_updates_and_state(direction, model, params, gradients):
    tx, whole = optim.build(recipe(direction), model, steps=steps), nnx.state(model, nnx.Param)
    plain, plain_state = tx.update(gradients(1), tx.init(params), params)
    as_state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(as_state, gradients(1))
    moved, state = tx.update(as_state, tx.init(whole), whole)
    assert jax.tree.structure(moved) == jax.tree.structure(whole)
    assert jax.tree.structure(state) == jax.tree.structure(plain_state)
    assert_close(nnx.to_pure_dict(moved), plain, 0)


@pytest.mark.parametrize("direction", directions)
def test_flax_optimizer_takes_it_as_any_optax_transformation(direction, model, params, gradients):
    tx = optim.build(recipe(direction), model, steps=steps)
    expected, _ = run(tx, params, gradients, count=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for k in (1, 2):
        g = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(g, gradients(k))
        optimizer.update(model, g)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected, 1e-6)


@pytest.mark.parametrize("direction", directions)
def test_a_donated_state_gives_the_same_result(direction, model, params, gradients):
    tx = optim.build(recipe(direction), model, steps=steps)
    expected, _ = run(tx, params, gradients, count=2)

    def step(params, state, g):
        moved, state = tx.update(g, state, params)
        return optax.apply_updates(params, moved), state

    step, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
    weights = jax.tree.map(jnp.copy, params)
    for k in (1, 2):
        weights, state = step(weights, state, gradients(k))
    assert_close(weights, expected, 1e-6)
    assert int(state.count) == 2


@pytest.mark.parametrize("direction", directions)
def test_shapes_are_known_without_computing(direction, model, params, gradients):
    tx = optim.build(recipe(direction), nnx.eval_shape(lambda: type(model)(jax.random.key(0))), steps=steps)
    state = jax.eval_shape(tx.init, params)
    moved, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), moved) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_the_assignment_covers_each_parameter_once_and_says_how(model):
    rows = optim.assignment({"direction": {"name": "muon", "weight_decay": 0.2}, "schedule": constant}, model)
    assert sorted(row.path for row in rows) == sorted(roles.parameters(model))
    by_path = {row.path: row for row in rows}
    assert by_path["blocks.up"] == optim.Assignment(
        "blocks.up", (2, 8, 20), "matrix", 2, "matrix", 1.0, 0.02, 0.2, "jordan x5 gram"
    )
    assert by_path["blocks.query"].newton_schulz == "jordan x5 plain"
    for path in ("embedding", "head", "positions", "blocks.gain", "blocks.temperature"):
        assert by_path[path][4:] == ("rest", 1.0, 3e-3, 0.0, "", "", "")
    assert {row.rule for row in optim.assignment(recipe("adamw"), model)} == {"all"}


def test_an_options_object_a_dict_and_a_config_dict_mean_the_same(model):
    tree = {"direction": {"name": "muon", "rest": {"learning_rate": 0.1}}, "schedule": constant}
    options = Optimizer(direction=Muon(rest=AdamW(learning_rate=0.1)), schedule=Constant())
    rows = [optim.assignment(config, model) for config in (tree, ml_collections.ConfigDict(tree), options)]
    assert rows[0] == rows[1] == rows[2]


def test_every_mistake_of_a_config_is_reported_at_once(model):
    wrong = {"direction": {"name": "muon", "momentum": 1.0, "coefficients": "you6", "rest": {"name": "adam"}}, "clip": 1}
    with pytest.raises(ConfigError) as error:
        optim.build(wrong, model)
    paths = {problem.path for problem in error.value.problems}
    assert paths == {"optimizer.direction.momentum", "optimizer.direction.rest.name", "optimizer.clip"}


@pytest.mark.parametrize(("coefficients", "iterations"), [("you6", 5), ("deepseek", 8), ("polar_express", 4)])
def test_a_list_of_polynomials_keeps_its_length(model, coefficients, iterations):
    direction = {"name": "muon", "coefficients": coefficients, "iterations": iterations}
    with pytest.raises(ConfigError, match="optimizer.direction.iterations"):
        optim.build({"direction": direction, "schedule": constant}, model)


@pytest.mark.parametrize(
    ("coefficients", "count"), [("jordan", 5), ("you5", 5), ("you6", 6), ("polar_express", 5), ("deepseek", 10)]
)
def test_every_scheme_builds_with_its_own_number_of_steps(model, params, gradients, coefficients, count):
    config = {"direction": {"name": "muon", "coefficients": coefficients}, "schedule": constant}
    rows = {row.path: row for row in optim.assignment(config, model)}
    assert rows["blocks.up"].newton_schulz == f"{coefficients} x{count} gram"
    tx = optim.build(config, model)
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


def test_polynomials_of_ones_own_are_used_and_checked(model, params, gradients):
    own = {"name": "muon", "triples": [2.0, -1.5, 0.5], "iterations": 7}
    tx = optim.build({"direction": own, "schedule": constant, "clip_norm": None}, model)
    moved, _ = tx.update(gradients(1), tx.init(params), params)
    expected = optim.newton_schulz(gradients(1)["blocks"]["down"], [(2.0, -1.5, 0.5)], 7)
    np.testing.assert_allclose(moved["blocks"]["down"], -0.02 * expected, atol=1e-6)
    rows = {row.path: row.newton_schulz for row in optim.assignment({"direction": own, "schedule": constant}, model)}
    assert rows["blocks.up"] == "own x7 gram"
    for wrong, field in (
        ({"triples": [1.0, 2.0]}, "triples"),
        ({"triples": [2.0, -1.5, 0.5] * 2, "iterations": 5}, "iterations"),
    ):
        with pytest.raises(ConfigError, match=f"optimizer.direction.{field}"):
            optim.build({"direction": {"name": "muon"} | wrong, "schedule": constant}, model)


@pytest.mark.parametrize("direction", directions)
def test_wsd_s_equals_a_wsd_run_at_its_first_budget_and_its_own_rate_path_later(direction, model, params, gradients):
    decay = {"warmup": 1, "decay": 0.5, "shape": "inverse", "final": 0.1}

    def through(schedule, last):
        config = {"direction": {"name": direction}, "schedule": schedule}
        tx, table = optim.build(config, model, steps=last), optim.rates(config, last)
        return run(tx, params, gradients, last, table), table

    budgets = {"name": "wsd_s", "budgets": [4, 8], **decay}
    jax.tree.map(np.testing.assert_array_equal, through(budgets, 4)[0], through({"name": "wsd", **decay}, 4)[0])
    (later, _), table = through(budgets, 8)
    config = {"direction": {"name": direction}, "schedule": constant}
    driven, _ = run(optim.build(config, model), params, gradients, 8, table)
    jax.tree.map(np.testing.assert_array_equal, later, driven)


def rule(name: str, *covered: str) -> Rule:
    identity = optax.identity()
    return Rule(name=name, roles=covered, direction=lambda _: identity, learning_rate=1.0, weight_decay=0.0, decay_roles=())


def test_a_parameter_no_rule_covers_is_named(model):
    with pytest.raises(ConfigError, match="blocks.temperature\\n.*no rule covers role 'scalar'"):
        assign((rule("most", "embedding", "head", "matrix", "vector", "table"),), roles.parameters(model))


def test_a_parameter_two_rules_cover_is_named(model):
    everything = ("embedding", "head", "matrix", "vector", "scalar", "table")
    with pytest.raises(ConfigError, match="head\\n.*covered by the rules 'all' and 'top'"):
        assign((rule("all", *everything), rule("top", "head")), roles.parameters(model))


def test_muon_on_a_model_without_matrices_is_refused():
    class Gains(nnx.Module):
        def __init__(self):
            self.gain = nnx.Param(jnp.ones(3), role="vector", axes=("embed",))

    with pytest.raises(ConfigError, match="rule 'matrix' matches no parameter"):
        optim.build({"direction": {"name": "muon"}, "schedule": constant}, Gains())


def test_a_tree_of_another_model_is_refused(model, params):
    tx = optim.build(recipe("adamw"), model, steps=steps)
    with pytest.raises(ValueError, match="missing \\['head'\\], unexpected \\[\\]"):
        tx.init({name: leaf for name, leaf in params.items() if name != "head"})


def test_missing_parameters_and_wrong_groups_are_refused(model, params, gradients):
    tx = optim.build(recipe("adamw"), model, steps=steps)
    with pytest.raises(ValueError, match="weight decay.* need the parameters"):
        tx.update(gradients(1), tx.init(params))
    with pytest.raises(ValueError, match="expected \\['all'\\]"):
        tx.update(gradients(1), tx.init(params), params, rates={"matrix": 1.0})
