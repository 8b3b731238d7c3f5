"""Layer-aware Newton-Schulz: the cheapest configuration that serves, computed, predicted and measured."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optim
from optim.directions.layer_aware import grouped, predicted_choices, summary_of, switched
from optim.directions.newton_schulz import newton_schulz, scalar_map
from optim.directions.spectral_laws import MEDIAN_LAWS, bucket
from optim.directions.thresholds import ROUNDING, cheapest, configuration, needs_float32, rounding_floor, threshold
from optim.options import Measured, Optimizer, Predicted
from optim.options.newton_schulz import CANDIDATES
from optim.roles import Parameter
from strata import ConfigError, resolve

constant = {"name": "constant"}


def test_thresholds_are_those_of_the_reference_table():
    table = {"jordan2": 5.3e-2, "jordan3": 1.5e-2, "jordan4": 4.5e-3, "jordan5": 1.3e-3, "jordan6": 3.8e-4, "jordan8": 3.2e-5}
    for name, value in (table | {"jordan10": 2.7e-6, "you5": 1.3e-3}).items():
        assert threshold(name, 0.6) == pytest.approx(value, rel=0.04)
    assert threshold("quintic5", 0.1) == pytest.approx(3.1e-3, rel=0.02)  # the 0.003 that some digests quote for Jordan's
    assert threshold("jordan5", 0.1) == pytest.approx(2.1e-4, rel=0.03)


@pytest.mark.parametrize("name", ["jordan3", "jordan5", "you5", "you6", "polar_express5", "deepseek10", "quintic5"])
def test_every_value_from_the_threshold_on_is_accepted_and_none_below(name):
    at = threshold(name, 0.6)
    above, below = np.geomspace(at, 1, 4001), np.geomspace(1e-8, 0.999 * at, 4001)
    assert scalar_map(above, configuration(name)).min() >= 0.6 - 1e-9
    assert scalar_map(below, configuration(name)).max() < 0.6


def test_each_step_of_jordan_divides_the_threshold_by_its_slope():
    ratios = [threshold(f"jordan{k}", 0.6) / threshold(f"jordan{k + 1}", 0.6) for k in range(3, 9)]
    np.testing.assert_allclose(ratios, 3.4445, rtol=0.02)


def test_a_choice_passes_its_threshold_and_the_next_cheaper_one_does_not():
    for value in np.geomspace(1e-5, 0.2, 60):
        chosen = cheapest(value, CANDIDATES, 0.6)
        if chosen + 1 < len(CANDIDATES):
            assert value >= threshold(CANDIDATES[chosen], 0.6)
        assert chosen == 0 or value < threshold(CANDIDATES[chosen - 1], 0.6)


def test_acceptance_above_the_band_of_jordan_is_refused():
    with pytest.raises(ValueError, match="monotone"):
        threshold("jordan5", 0.7)
    with pytest.raises(ConfigError, match="newton_schulz.accept"):
        optim.rates(
            {"direction": {"name": "muon", "newton_schulz": {"name": "predicted", "accept": 0.7}}, "schedule": constant}
        )


def stack(layers=8, width=64):
    kinds = ("query", "key", "value", "output", "up", "down")
    shape = {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width)}
    return {
        f"blocks.{kind}.kernel": Parameter(
            f"blocks.{kind}.kernel",
            shape.get(kind, (layers, width, width)),
            jnp.float32,
            "matrix",
            ("layer", "a", "b"),
            positions=tuple(range(layers)),
        )
        for kind in kinds
    }


def steps_of(size, **fields):
    choices = predicted_choices(Predicted(model_size=size, **fields), stack())
    return {path.split(".")[1]: [int(CANDIDATES[i].strip("jordanepsk")) for i in own] for path, own in choices.items()}


def test_the_known_extrapolations_to_300_billion():
    found = steps_of(int(3e11))
    assert found["query"][5] == 5 and found["output"][7] == 8
    assert MEDIAN_LAWS["query", "mid_late"].at(3e11) == pytest.approx(1.4e-3)
    assert MEDIAN_LAWS["output", "final"].at(3e11) == pytest.approx(5e-5)


def test_larger_models_and_steeper_laws_never_take_fewer_steps():
    sizes = [10**k for k in range(6, 13)]
    for kind in ("query", "output", "down"):
        per_size = np.array([steps_of(size)[kind] for size in sizes])
        assert np.all(np.diff(per_size, axis=0) >= 0) and per_size[0].max() < per_size[-1].max()
    by_alpha = [cheapest(1e-2 * 1e9**-alpha * 77e6**alpha, CANDIDATES, 0.6) for alpha in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert by_alpha == sorted(by_alpha) and by_alpha[0] < by_alpha[-1]


def test_laws_of_ones_own_replace_the_built_in_ones():
    found = steps_of(10**8, laws=("up@*=1.0,0.0", "down@final=1e-9,0.0"))
    assert set(found["up"]) == {3} and found["down"][7] == 10 and found["down"][0] == steps_of(10**8)["down"][0]


def test_depth_falls_into_quarters_and_the_last_layer_is_its_own():
    assert [bucket(place, 8) for place in range(8)] == [
        "mid_early", "mid_early", "mid_early", "mid", "mid", "mid_late", "mid_late", "final",
    ]  # fmt: skip
    assert bucket(0, 1) == "final"


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_grouped_execution_equals_each_matrix_by_itself():
    candidates = ("jordan3", "jordan5", "deepseek10")
    matrices = {
        "a": normal(4, 6, 10),
        "b": normal(4, 10, 6, seed=1),
        "c": normal(8, 8, seed=2),
        "d": normal(2, 3, 6, 10, seed=3),
    }
    choices = {"a": (0, 1, 0, 2), "b": (1, 1, 1, 1), "c": (2,), "d": (1, 0)}
    found = grouped(matrices, choices, candidates)
    for name, x in matrices.items():
        for row, choice in enumerate(choices[name]):
            one = x if name == "c" else x[row]
            other = found[name] if name == "c" else found[name][row]
            np.testing.assert_allclose(other, newton_schulz(one, configuration(candidates[choice])), atol=3e-6)


def test_fewer_steps_are_really_less_work():
    x = {"a": normal(4, 32, 32)}
    candidates = ("jordan2", "jordan6")

    def flops(choices):
        # One matrix of each configuration a call, since the cost of a loop's body is counted once.
        def call(x):
            return [grouped({"a": x["a"][i]}, {"a": (choice,)}, candidates) for i, choice in enumerate(choices)]

        return jax.jit(call).lower(x).compile().cost_analysis()["flops"]

    few, mixed, many = flops((0,) * 4), flops((0,) * 3 + (1,)), flops((1,) * 4)
    assert few / many == pytest.approx(2 / 6, rel=0.05) and mixed / many == pytest.approx((3 * 2 + 6) / 24, rel=0.05)


@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (512, 128)])
def test_the_rounding_floor_is_what_a_cast_to_bfloat16_adds(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x /= np.linalg.norm(x)
    error = np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)) - x
    assert np.linalg.norm(error) == pytest.approx(ROUNDING, rel=0.02)
    assert np.linalg.norm(error, 2) == pytest.approx(rounding_floor(*shape), rel=0.06)


def with_small_directions(small, size, layers=2):
    """Matrices of a quarter large singular values and the rest at `small`, and how much of a matrix lies in the latter."""
    rng, large = np.random.default_rng(0), size // 4
    s = np.full(size, small)
    s[:large] = np.sqrt((1 - (size - large) * small**2) / large)
    sides = [[np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2)] for _ in range(layers)]
    x = np.stack([(u * s) @ v.T for u, v in sides])

    def reached(y):
        found = [
            np.einsum("im,ij,jm->m", u, row, v)[large:] for (u, v), row in zip(sides, np.asarray(y, np.float64), strict=True)
        ]
        return float(np.median(found))

    return jnp.asarray(x, jnp.float32), reached


@pytest.mark.parametrize("small", [2e-3, 1.5e-4, 4e-5, 1e-5])
def test_small_singular_directions_survive_the_bfloat16_of_an_accelerator(small):
    """The configuration that a value is given does in bfloat16's place what its polynomial promises."""
    size = 96
    x, reached = with_small_directions(small, size)
    index = cheapest(small, CANDIDATES, 0.6)
    promised = scalar_map(small, configuration(CANDIDATES[index]))
    found = grouped({"a": x}, {"a": (index, index)}, CANDIDATES, dtype=jnp.bfloat16)["a"]
    assert reached(found) == pytest.approx(promised, rel=0.05)
    lost = reached(newton_schulz(x, configuration(CANDIDATES[index]), dtype=jnp.bfloat16)) < 0.6 * promised
    assert lost == needs_float32(CANDIDATES[index], 0.6, size, size)
    declared = {"a": Parameter("a", x.shape, jnp.float32, "matrix", ("layer", "embed", "heads"))}
    choice = {"a": jnp.full((2, 1), index, jnp.int32)}
    also = switched({"a": x}, choice, Measured(), declared, dtype=jnp.bfloat16)["a"]
    assert reached(also) == pytest.approx(promised, rel=0.05)


def test_the_table_says_which_configurations_leave_bfloat16():
    """At width 4096 the floor is 5.2e-5: between the thresholds of seven steps and of eight."""
    model = stack(8, 4096)
    words = {
        kind: summary_of(Predicted(model_size=int(3e11)), model[f"blocks.{kind}.kernel"], model) for kind in ("query", "output")
    }
    assert words["query"] == "jordan5: 7 layers, jordan7: 1 layers" and "jordan8 in float32: 1 layers" in words["output"]
    assert summary_of(Measured(), model["blocks.up.kernel"], model) == "measured: deepseek10 in float32 up to step 500"


class Blocks(nnx.Module):
    def __init__(self):
        self.query = nnx.Param(normal(3, 12, 12), role="matrix", axes=("layer", "embed", "heads"))
        self.up = nnx.Param(normal(3, 12, 30), role="matrix", axes=("layer", "embed", "mlp"), split=(10, 20))
        self.down = nnx.Param(normal(3, 30, 12), role="matrix", axes=("layer", "mlp", "embed"))


def build(newton_schulz, direction="muon"):
    kinds = {"predicted": {"kinds": ["query=query", "up=up", "down=down"]}}.get(newton_schulz["name"], {})
    chosen = {"name": direction, "newton_schulz": newton_schulz | kinds}
    config = {"direction": chosen, "schedule": constant, "clip_norm": None}
    model = Blocks()
    return optim.build(config, model), nnx.to_pure_dict(nnx.state(model, nnx.Param)), config, model


def test_one_candidate_everywhere_is_plain_muon():
    muon = {"name": "muon", "iterations": 2}
    plain = optim.build({"direction": muon, "schedule": constant, "clip_norm": None}, Blocks())
    for name in ("predicted", "measured"):
        tx, params, _, _ = build({"name": name, "candidates": ["jordan2"]})
        one, _ = jax.jit(tx.update)(params, tx.init(params), params)
        other, _ = jax.jit(plain.update)(params, plain.init(params), params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, other)


def test_predicted_configurations_are_in_the_table():
    tx, params, config, model = build({"name": "predicted", "model_size": 300_000_000_000})
    rows = {row.path: row.newton_schulz for row in optim.assignment(config, model)}
    assert rows["query"].count("layers") == 2 and "jordan5" in rows["query"]
    jax.eval_shape(tx.update, params, tx.init(params), params)


def with_median(median, shape, seed):
    """A gradient of given spectrum, half of it at the wanted median of the normalised values."""
    rng, rank = np.random.default_rng(seed), min(shape)
    s = np.full(rank, median)
    s[0] = np.sqrt(1 - (rank - 1) * median**2)
    u, _ = np.linalg.qr(rng.normal(size=(shape[0], rank)))
    v, _ = np.linalg.qr(rng.normal(size=(shape[1], rank)))
    return (u * s) @ v.T


MEDIANS = (3e-2, 6e-3, 5e-4)


@pytest.fixture
def planted():
    @functools.cache
    def gradient(medians=MEDIANS):
        def leaf(rows, columns, seed):
            return jnp.asarray(
                np.stack([with_median(m, (rows, columns), seed + i) for i, m in enumerate(medians)]), jnp.float32
            )

        up = jnp.concatenate([leaf(12, 10, 3), leaf(12, 20, 6)], axis=-1)
        return {"query": leaf(12, 12, 0), "up": up, "down": leaf(30, 12, 9)}

    return gradient


def advance(tx, params, state, gradients):
    update = jax.jit(tx.update)
    for g in gradients:
        _, state = update(g, state, params)
    return state


def test_measured_choices_are_those_of_the_planted_spectra(planted):
    tx, params, _, _ = build({"name": "measured", "every": 1, "choose_at": 3})
    before = optim.spectra(advance(tx, params, tx.init(params), [planted()] * 2))
    assert all(np.all(choice == len(CANDIDATES) - 1) for choice in before.choice.values())
    found = optim.spectra(advance(tx, params, tx.init(params), [planted()] * 3))
    expected = [cheapest(m, CANDIDATES, 0.6) for m in MEDIANS]
    for path, blocks in (("query", 1), ("up", 2), ("down", 1)):
        assert found.choice[path].shape == (3, blocks)
        np.testing.assert_array_equal(found.choice[path], np.array(expected)[:, None].repeat(blocks, 1))
        np.testing.assert_allclose(
            np.exp(found.log_quantiles[path][..., 2]), np.array(MEDIANS)[:, None].repeat(blocks, 1), rtol=1e-2
        )


def test_a_measured_choice_runs_the_configuration_it_names(planted):
    candidates = ("jordan3", "jordan5", "deepseek10")
    tx, params, _, _ = build({"name": "measured", "every": 1, "choose_at": 1, "candidates": list(candidates)})
    moved, state = jax.jit(tx.update)(planted(), tx.init(params), params)
    choice = optim.spectra(state).choice["down"][:, 0]
    assert len(set(np.asarray(choice))) > 1
    for layer in range(3):
        # The first update is along the gradient itself; a tall matrix has factor 1.
        expected = newton_schulz(planted()["down"][layer], configuration(candidates[int(choice[layer])]))
        np.testing.assert_allclose(moved["down"][layer], -0.02 * expected, atol=2e-5)


def test_a_frozen_choice_stays_and_a_rechecked_one_moves_only_beyond_the_hysteresis(planted):
    near = tuple(1.3 * m for m in MEDIANS)
    far = (1e-4, 1e-4, 1e-4)
    quiet = {"name": "measured", "every": 1, "choose_at": 1, "decay": 0.0}
    for recheck, later, moves in ((0, far, False), (2, near, False), (2, far, True)):
        tx, params, _, _ = build(quiet | {"recheck": recheck, "hysteresis": 2.0})
        start = advance(tx, params, tx.init(params), [planted()])
        # Enough updates for the momentum to forget the first gradient.
        after = advance(tx, params, start, [planted(later)] * 230)
        changed = np.any(optim.spectra(after).choice["query"] != optim.spectra(start).choice["query"])
        assert changed == moves


def test_measured_choices_resume_bit_for_bit(planted):
    tx, params, _, _ = build({"name": "measured", "every": 2, "choose_at": 4, "recheck": 2}, direction="normuon")
    whole = advance(tx, params, tx.init(params), [planted()] * 6)
    half = advance(tx, params, tx.init(params), [planted()] * 3)
    half = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
    jax.tree.map(np.testing.assert_array_equal, advance(tx, params, half, [planted()] * 3), whole)


def test_a_state_of_choices_can_be_donated(planted):
    tx, params, _, _ = build({"name": "measured"})
    step = jax.jit(lambda s, g, p: tx.update(g, s, p)[1], donate_argnums=0)
    state = step(tx.init(params), planted(), params)
    assert int(optim.spectra(step(state, planted(), params)).count) == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"candidates": []}, "order of their steps"),
        ({"candidates": ["jordan"]}, "not a scheme and a number"),
        ({"candidates": ["you7"]}, "does not come with 7"),
        ({"candidates": ["jordan5", "jordan3"]}, "order of their steps"),
        ({"laws": ["up=1,2"]}, "kind@bucket=c,alpha"),
        ({"laws": ["up@mid=1"]}, "kind@bucket=c,alpha"),
        ({"laws": ["up@mid=inf,0.2"]}, "kind@bucket=c,alpha"),
        ({"laws": ["up@mid=1,inf"]}, "kind@bucket=c,alpha"),
        ({"laws": ["up@mid=1,nan"]}, "kind@bucket=c,alpha"),
        ({"laws": ["uo@*=1.0,0.0"]}, "kind@bucket=c,alpha, with one of query"),
    ],
)
def test_wrong_candidates_and_laws_are_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build({"name": "predicted", **fields})


def test_a_choice_that_nothing_is_measured_for_or_no_run_reaches_is_refused():
    with pytest.raises(ConfigError, match="(?s)newton_schulz.every.*nothing would be measured before the choice at step 3"):
        build({"name": "measured", "every": 4, "choose_at": 3})
    direction = {"name": "muon", "newton_schulz": {"name": "measured", "choose_at": 30}}
    optimizer, _ = resolve(Optimizer, {"direction": direction, "schedule": constant})
    assert not [*itertools.chain.from_iterable(optimizer.problems_over(30))]
    ((path, message),) = itertools.chain.from_iterable(optimizer.problems_over(29))
    assert path == "direction.newton_schulz.choose_at" and "ends before the choice" in message


def test_a_choice_counts_the_updates_of_the_lowest_layers_under_layer_sampling():
    direction = {"name": "muon", "newton_schulz": {"name": "measured", "choose_at": 30}}

    def problems(steps, **sampling):
        config = {"direction": direction, "sampling": {"name": "drop_muon", "buckets": 4, **sampling}, "schedule": constant}
        return [*itertools.chain.from_iterable(resolve(Optimizer, config)[0].problems_over(steps))]

    assert not problems(120) and not problems(30, distribution="full")
    ((path, message),) = problems(119)
    assert path == "direction.newton_schulz.choose_at" and "29 updates" in message and "25% of 119 steps" in message
    assert problems(59, distribution="optimal", smoothness=[1.0, 2.0, 2.0, 2.0])
    assert not problems(60, distribution="optimal", smoothness=[1.0, 2.0, 2.0, 2.0])
    # Shifted draws cut 0 in 0.46 of the first updates and 0.10 of the last.
    assert problems(110, distribution="shifted") and not problems(122, distribution="shifted")


@pytest.mark.parametrize("field", [{"coefficients": "you6"}, {"iterations": 3}, {"triples": [2.0, -1.5, 0.5]}])
@pytest.mark.parametrize("direction", ["muon", "normuon"])
def test_a_polynomial_beside_steps_by_layer_is_refused(direction, field):
    config = {"name": direction, "newton_schulz": {"name": "predicted"}, **field}
    with pytest.raises(ConfigError, match=f"(?s)direction.{next(iter(field))}.*chooses among its own candidates"):
        optim.build({"direction": config, "schedule": constant}, Blocks())


def test_a_matrix_of_no_known_kind_is_refused():
    config = {"direction": {"name": "muon", "newton_schulz": {"name": "predicted", "kinds": ["up=up"]}}, "schedule": constant}
    with pytest.raises(ConfigError, match="(?s)down.*which kind.*query"):
        optim.build(config, Blocks())
