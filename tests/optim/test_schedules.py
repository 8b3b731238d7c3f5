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
]


def values(schedule: dict, steps: int | None, at: list[int]) -> list[float]:
    options, _ = resolve(Optimizer, {"schedule": schedule})
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
    ],
)
def test_values_worked_out_by_hand(schedule, steps, expected):
    assert values(schedule, steps, list(expected)) == pytest.approx(list(expected.values()), abs=1e-12)


@pytest.mark.parametrize("schedule", every)
@pytest.mark.parametrize("steps", [40, 12_345])
def test_the_form_inside_jit_agrees_with_the_host(schedule, steps):
    options, _ = resolve(Optimizer, {"schedule": schedule})
    multiplier = multiplier_of(options.schedule, steps)
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
