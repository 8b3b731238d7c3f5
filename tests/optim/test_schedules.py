"""Schedules at points worked out by hand, and the same on the host as inside jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim
from optim.options import Optimizer
from optim.schedules import multiplier_of
from strata import ConfigError, resolve

every = [
    {"name": "constant", "warmup": 3},
    {"name": "constant"},
    {"name": "linear", "warmup": 4, "final": 0.1},
    {"name": "linear"},
    {"name": "cosine", "warmup": 7},
    {"name": "cosine", "warmup": 40},
    {"name": "inverse_sqrt", "warmup": 9},
    {"name": "inverse_sqrt", "warmup": 3, "plateau": 16},
    {"name": "wsd", "warmup": 5},
    {"name": "wsd", "decay": 0.0},
    {"name": "wsd", "decay": 1.0, "shape": "sqrt", "final": 0.1},
    {"name": "wsd", "shape": "cosine", "final": 0.2},
    {"name": "wsd", "shape": "exponential", "final": 0.01},
    {"name": "wsd", "shape": "inverse", "final": 0.1},
    {"name": "wsd", "shape": "square"},
    {"name": "wsd_s", "budgets": [10, 20, 40], "warmup": 2},
    {"name": "wsd_s", "budgets": [40], "decay": 0.5, "shape": "linear", "final": 0.0},
    {"name": "wsd_s", "budgets": [10, 40], "decay_of": "cycle", "rewarmup": 3},
    {"name": "cyclic_cosine", "budgets": [10, 40], "warmup": 3, "rewarmup": 2},
    {"name": "infinite", "warmup": 3, "cooldown": 8, "anneal": 10},
    {"name": "infinite", "warmup": 3, "cooldown": 8, "shape": "inverse_sqrt", "tasks": [20], "rewarmup": 4},
]


FALL = 0.9 / (1 - 11**-0.5)  # of the inverse square root from 1 to 0.1, over 1 - 1 / sqrt(1 + 10 u)


def values(schedule: dict, steps: int | None, at: list[int]) -> list[float]:
    options, _ = resolve(Optimizer, {"schedule": schedule})
    if "budgets" in schedule:
        steps = None
    multiplier = multiplier_of(options.schedule, steps)
    return [float(multiplier(k)) for k in at]


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ({"name": "constant"}, None, {1: 1, 1000: 1}),
        ({"name": "constant", "warmup": 4}, None, {1: 0.25, 2: 0.5, 4: 1, 5: 1}),
        ({"name": "linear"}, 10, {1: 0.9, 5: 0.5, 9: 0.1, 10: 0, 12: 0}),
        ({"name": "linear", "warmup": 2, "final": 0.2}, 10, {1: 0.5, 2: 1, 6: 0.6, 10: 0.2, 11: 0.2}),
        ({"name": "cosine", "warmup": 2, "final": 0.1}, 10, {1: 0.5, 2: 1, 6: 0.55, 10: 0.1}),
        ({"name": "cosine", "final": 0.0}, 9, {3: 0.75, 6: 0.25, 9: 0}),
        ({"name": "inverse_sqrt", "warmup": 4}, None, {2: 0.5, 4: 1, 16: 0.5, 400: 0.1}),
        ({"name": "inverse_sqrt", "plateau": 9}, None, {1: 1, 9: 1, 36: 0.5}),
        ({"name": "wsd", "warmup": 4, "decay": 0.2}, 20, {1: 0.25, 4: 1, 16: 1, 17: 0.75, 18: 0.5, 20: 0, 21: 0}),
        ({"name": "wsd", "decay": 0.4, "shape": "sqrt", "final": 0.1}, 10, {6: 1, 7: 0.55, 10: 0.1}),
        ({"name": "wsd", "decay": 0.4, "shape": "cosine", "final": 0.2}, 10, {6: 1, 8: 0.6, 10: 0.2}),
        ({"name": "wsd", "decay": 0.4, "shape": "exponential", "final": 0.01}, 10, {6: 1, 8: 0.1, 10: 0.01}),
        ({"name": "wsd", "decay": 0.4, "shape": "square"}, 10, {6: 1, 8: 0.25, 9: 0.0625, 10: 0}),
        ({"name": "wsd", "decay": 0.4, "shape": "inverse", "final": 0.1}, 10, {6: 1, 8: 2 / 11, 10: 0.1}),
        (
            {"name": "wsd_s", "budgets": [10, 20], "decay": 0.2},
            None,
            {8: 1, 9: 2 / 11, 10: 0.1, 11: 1, 16: 1, 18: 2 / 11, 20: 0.1},
        ),
        (
            {"name": "wsd_s", "budgets": [10, 20], "decay": 0.2, "decay_of": "cycle"},
            None,
            {18: 1, 19: 2 / 11, 20: 0.1, 25: 0.1},
        ),
        ({"name": "wsd_s", "budgets": [4, 12], "rewarmup": 3, "final": 0.4}, None, {4: 0.4, 5: 0.6, 6: 0.8, 7: 1, 12: 0.4}),
        ({"name": "cyclic_cosine", "budgets": [4, 8], "final": 0.2}, None, {2: 0.6, 4: 0.2, 6: 0.6, 8: 0.2}),
        (
            {"name": "infinite", "warmup": 2, "cooldown": 4, "anneal": 2},
            10,
            {1: 0.5, 2: 1, 4: 0.55, 6: 0.1, 8: 0.1, 9: 10**-1.5, 10: 0.01},
        ),
        ({"name": "infinite", "cooldown": 4, "shape": "inverse_sqrt"}, None, {4: 0.1, 1000: 0.1}),
        (
            {"name": "infinite", "warmup": 2, "cooldown": 6, "constant": 0.2},
            None,
            {3: 0.6 + 0.2 * 3**0.5, 4: 0.8, 5: 0.6, 6: 0.4, 7: 0.6 - 0.2 * 3**0.5, 8: 0.2, 9: 0.2},
        ),
        (
            # 1 + 10 u is 9/4, 4, 25/4, 9 and 11.
            {"name": "infinite", "warmup": 1, "cooldown": 40, "shape": "inverse_sqrt", "tasks": [50], "rewarmup": 2},
            None,
            {1: 1, 51: 0.55, 52: 1, 57: 1 - FALL / 3}
            | {6: 1 - FALL / 3, 13: 1 - FALL / 2, 22: 1 - 0.6 * FALL, 33: 1 - FALL * 2 / 3, 41: 0.1, 50: 0.1},
        ),
        ({"name": "infinite", "cooldown": 2, "anneal": 4, "constant": 0.25, "final": 0.04}, 9, {5: 0.25, 7: 0.1, 9: 0.04}),
        ({"name": "infinite", "cooldown": 2, "tasks": [6], "rewarmup": 2}, None, {6: 0.1, 7: 0.55, 8: 1, 9: 0.55, 10: 0.1}),
    ],
)
def test_values_worked_out_by_hand(schedule, steps, expected):
    assert values(schedule, steps, list(expected)) == pytest.approx(list(expected.values()), abs=1e-12)


@pytest.mark.parametrize("schedule", every)
@pytest.mark.parametrize("steps", [40, 12_345])
def test_the_form_inside_jit_agrees_with_the_host(schedule, steps):
    options, _ = resolve(Optimizer, {"schedule": schedule})
    multiplier = multiplier_of(options.schedule, None if "budgets" in schedule else steps)
    at = np.unique(np.r_[0:60, steps // 2, steps - 5 : steps + 3]).astype(np.int32)
    inside = jax.jit(lambda k: multiplier(k, jnp))(at)
    assert inside.dtype == jnp.float32
    np.testing.assert_allclose(inside, multiplier(at), atol=1e-6)


@pytest.mark.parametrize("schedule", every)
def test_no_schedule_exceeds_the_full_rate_or_falls_below_zero(schedule):
    found = values(schedule, 40, list(range(1, 60)))
    assert max(found) <= 1 and min(found) >= 0
    assert schedule.get("warmup", 0) == 0 or found[schedule["warmup"] - 1] == 1


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_a_decay_starts_at_one_and_ends_at_its_final_fraction_exactly(shape):
    for final in np.linspace(0, 1, 37):
        schedule = {"name": "wsd", "decay": 0.5, "shape": shape, "final": float(final)}
        assert values(schedule, 10, [5, 10]) == [1.0, final]


@pytest.mark.parametrize("direction", ["adamw", "muon"])
def test_the_table_holds_rounded_products_of_peak_and_fraction(direction):
    config = {"direction": {"name": direction, "learning_rate": 0.3}, "schedule": {"name": "linear", "warmup": 3}}
    table = optim.rates(config, 10)
    assert table.groups == (("matrix", "rest") if direction == "muon" else ("all",))
    rates = table(1)
    assert rates[table.groups[0]] == np.float32(0.3 / 3)
    assert all(type(rate) is np.float32 for rate in rates.values())


def test_equal_schedules_have_equal_bits():
    flat = optim.rates({"schedule": {"name": "constant", "warmup": 7}})
    for other in ({"name": "wsd", "warmup": 7, "decay": 0.25}, {"name": "linear", "warmup": 7, "final": 1.0}):
        table = optim.rates({"schedule": other}, 400)
        assert all(table(k) == flat(k) for k in range(1, 301))


def test_the_first_updates_do_not_depend_on_the_length_of_a_wsd_run():
    short, long = (optim.rates({"schedule": {"name": "wsd", "warmup": 5}}, steps) for steps in (50, 500))
    assert all(short(k) == long(k) for k in range(1, 41))


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_a_schedule_that_needs_the_length_of_the_run_says_so(model, name):
    with pytest.raises(ConfigError, match=f"schedule.name = '{name}'"):
        optim.build({"schedule": {"name": name}}, model)


@pytest.mark.parametrize("name", ["constant", "inverse_sqrt"])
def test_a_schedule_that_does_not_need_it_does_without(model, name):
    optim.build({"schedule": {"name": name, "warmup": 100}}, model)
    optim.build({"schedule": {"name": name, "warmup": 100}}, model, steps=10)


@pytest.mark.parametrize("schedule", [{"name": "cosine", "warmup": 11}, {"name": "wsd", "warmup": 9, "decay": 0.2}])
def test_a_warmup_that_does_not_fit_is_refused(schedule):
    with pytest.raises(ConfigError, match="optimizer.schedule.warmup"):
        optim.rates({"schedule": schedule}, 10)


def test_the_first_budget_is_a_wsd_run_to_the_last_bit():
    for shape, final in (("inverse", 0.1), ("linear", 0.0)):
        decay = {"warmup": 3, "decay": 0.1, "shape": shape, "final": final}
        first = optim.rates({"schedule": {"name": "wsd_s", "budgets": [40, 80, 160], **decay}}, 160)
        alone = optim.rates({"schedule": {"name": "wsd", **decay}}, 40)
        assert all(first(k) == alone(k) for k in range(1, 41))


def test_a_longer_run_to_a_later_budget_begins_with_the_same_rates():
    short, long = (optim.rates({"schedule": {"name": "wsd_s", "budgets": [40, 80, 160]}}, steps) for steps in (40, 160))
    assert all(short(k) == long(k) for k in range(1, 41))


def test_decays_lengthen_with_the_budget_or_stay_in_their_cycle():
    chosen = {
        kind: resolve(Optimizer, {"schedule": {"name": "wsd_s", "budgets": [100, 200, 400], "decay_of": kind}})[0].schedule
        for kind in ("budget", "cycle")
    }
    lengths = {kind: [own.decay_steps(*cycle) for cycle in own.cycles()] for kind, own in chosen.items()}
    assert lengths == {"budget": [10, 20, 40], "cycle": [10, 10, 20]}
    assert chosen["budget"].milestones(200) == {90: "stable100", 100: "budget100", 180: "stable200", 200: "budget200"}


def test_wsd_s_loses_to_the_stable_rate_exactly_its_decays():
    table = optim.rates({"schedule": {"name": "wsd_s", "budgets": [50, 100]}}, 100)
    peak = table.peaks["all"]
    falls = sum(1 - 0.1 / (0.1 + 0.9 * i / n) for n in (5, 10) for i in range(1, n + 1))
    assert sum(float(table(k)["all"]) for k in range(1, 101)) == pytest.approx(peak * (100 - falls), rel=1e-6)


def test_an_infinite_schedule_is_continuous_and_its_constant_phase_extends():
    schedule = {"name": "infinite", "warmup": 10, "cooldown": 40, "anneal": 30}
    short, long = (values(schedule, steps, list(range(1, 121))) for steps in (120, 500))
    assert short[:90] == long[:90]
    assert max(abs(np.diff(short))) < 0.11
    np.testing.assert_allclose(np.diff(np.log(short[90:])), np.log(0.1) / 30, rtol=1e-9)
    from optim.options import Infinite

    assert Infinite(anneal=1).depends_on_steps and not Infinite().depends_on_steps


@pytest.mark.parametrize(
    ("schedule", "field", "sentence"),
    [
        ({"name": "wsd_s"}, "budgets", "at least one"),
        ({"name": "wsd_s", "budgets": [20, 10]}, "budgets", "out of order"),
        ({"name": "cyclic_cosine", "budgets": [10, 10]}, "budgets", "out of order"),
        ({"name": "wsd_s", "budgets": [100, 105]}, "decay", "do not fit in the cycle of 5 steps that ends at 105"),
        ({"name": "wsd_s", "budgets": [10], "warmup": 10}, "decay", "do not fit in the cycle"),
        ({"name": "wsd_s", "budgets": [10, 20], "rewarmup": 11}, "rewarmup", "do not fit in the cycle"),
        ({"name": "wsd_s", "budgets": [10], "final": 0.0}, "final", "inverse decay needs"),
        ({"name": "wsd", "shape": "inverse"}, "final", "inverse decay needs"),
        ({"name": "infinite", "tasks": [5], "cooldown": 9}, "tasks", "do not end before 5"),
        ({"name": "infinite", "constant": 0.1, "final": 0.2}, "final", "above the constant"),
        ({"name": "infinite", "warmup": 5}, "cooldown", "0.1 of the full rate from the start"),
    ],
)
def test_phases_that_do_not_fit_are_refused(schedule, field, sentence):
    with pytest.raises(ConfigError, match=f"(?s)optimizer.schedule.{field} .*{sentence}"):
        optim.rates({"schedule": schedule}, None)


@pytest.mark.parametrize(
    ("schedule", "steps", "sentence"),
    [
        ({"name": "wsd_s", "budgets": [10, 20]}, 15, "ends at none of them"),
        ({"name": "infinite", "cooldown": 8, "anneal": 5}, 12, "do not fit in a run of 12"),
    ],
)
def test_a_run_that_a_schedule_does_not_fit_is_refused(schedule, steps, sentence):
    with pytest.raises(ConfigError, match=sentence):
        optim.rates({"schedule": schedule}, steps)


def test_every_schedule_of_a_recipe_is_checked_against_the_run():
    own = {"name": "muon", "schedule": {"name": "cosine", "warmup": 50}, "rest": {"schedule": {"name": "linear", "warmup": 60}}}
    options, _ = resolve(Optimizer, {"direction": own, "schedule": {"name": "constant"}})
    found = [path for check in options.problems_over(40) for path, _ in check]
    assert found == ["direction.rest.schedule.warmup", "direction.schedule.warmup"]
    assert options.depends_on_steps and not resolve(Optimizer, {"schedule": {"name": "constant"}})[0].depends_on_steps


def recipe(common, **own):
    """A recipe with Muon for matrices, of the common schedule and those of its two groups."""
    rest = {"schedule": own["rest"]} if "rest" in own else {}
    direction = {"name": "muon", "rest": rest, **({"schedule": own["matrix"]} if "matrix" in own else {})}
    return resolve(Optimizer, {"direction": direction, "schedule": common})[0]


def test_budgets_of_a_groups_own_schedule_name_checkpoints_too():
    budgets = {"name": "wsd_s", "budgets": [10, 20]}
    names = {9: "stable10", 10: "budget10", 18: "stable20", 20: "budget20"}
    assert recipe({"name": "constant"}, matrix=budgets, rest=budgets).milestones(20) == names
    assert recipe(budgets).milestones(20) == names
    assert recipe({"name": "wsd", "decay": 0.25}, rest=budgets).milestones(20) == names | {15: "stable"}
    assert not [problem for check in recipe(budgets, matrix=budgets).problems_over(20) for problem in check]


def test_two_schedules_with_one_name_for_two_steps_are_told_apart():
    one, other = {"name": "wsd", "decay": 0.1}, {"name": "wsd", "decay": 0.2}
    assert recipe(one, rest=other).milestones(20) == {18: "stable", 16: "stable-direction.rest.schedule"}
    assert recipe(one, rest={"name": "wsd_s", "budgets": [20]}).milestones(20) == {18: "stable", 20: "budget20"}
