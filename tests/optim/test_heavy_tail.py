"""Hill's estimator on spectra that are known, and rates that follow it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optim
from optim.directions.layer_aware import predicted_choices
from optim.layerwise.heavy_tail import assign
from optim.layerwise.spectrum import quantile_index, spectral_quantile
from optim.options import LLR, ByType, Predicted, TempBalance
from optim.roles import parameters
from strata import ConfigError

constant = {"name": "constant"}


def with_spectrum(s, columns=None, seed=0):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(len(s), len(s))))
    v, _ = np.linalg.qr(rng.normal(size=(columns or len(s), len(s))))
    return jnp.asarray((u * s) @ v.T, jnp.float32)


def gaussian(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("method", "exponent"), [("released", 3.0), ("textbook", 2.0)])
def test_pareto_samples_give_their_exponent(method, exponent):
    rng = np.random.default_rng(3)
    draws = (1 - rng.random((4, 512))) ** (-1 / (exponent - 1))
    # Diagonal matrices have their entries as singular values, exactly.
    found = [float(optim.hill_alpha(jnp.diag(jnp.asarray(np.sqrt(x), jnp.float32)), method=method)) for x in draws]
    assert max(abs(np.array(found) - exponent)) < 0.2 * (exponent - 1)
    assert abs(np.mean(found) - exponent) < 0.1 * (exponent - 1)


@pytest.mark.parametrize("p", [0.3, 0.5, 1.0])
def test_power_law_spectra_give_one_plus_half_the_inverse_power(p):
    s = np.arange(1, 769) ** -p
    assert float(optim.hill_alpha(jnp.diag(jnp.asarray(s, jnp.float32)))) == pytest.approx(1 + 1 / (2 * p), rel=0.01)


def test_the_two_methods_differ_by_one_rank_of_the_threshold():
    s = np.sort(np.random.default_rng(0).random(10))[::-1]
    logs = np.sort(np.log(s**2))
    released = 1 + 5 / (logs[5:].sum() - 5 * logs[5])
    textbook = 1 + 5 / (logs[5:].sum() - 5 * logs[4])
    w = with_spectrum(s, 14)
    assert float(optim.hill_alpha(w)) == pytest.approx(released, rel=1e-4)
    assert float(optim.hill_alpha(w, method="textbook")) == pytest.approx(textbook, rel=1e-4)


def test_gaussian_matrices_show_their_aspect_ratio_unless_windows_are_pooled():
    square, long = gaussian(288, 288), gaussian(288, 768)
    assert float(optim.hill_alpha(square)) == pytest.approx(2.12, abs=0.06)
    assert float(optim.hill_alpha(long)) == pytest.approx(2.98, abs=0.08)
    pooled = [float(optim.hill_alpha(w, window=96)) for w in (square, long)]
    assert pooled[0] == pytest.approx(pooled[1], abs=0.04) and pooled[0] == pytest.approx(2.12, abs=0.06)


def test_scale_transposition_and_rotation_change_nothing():
    w = gaussian(40, 64)
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))
    expected = float(optim.hill_alpha(w))
    for other in (w.T, 1e-4 * w, 300.0 * w, jnp.asarray(q, jnp.float32) @ w, w.astype(jnp.bfloat16).astype(jnp.float32) * 1):
        assert float(optim.hill_alpha(other)) == pytest.approx(expected, rel=5e-3)


def test_a_stack_equals_its_matrices():
    w = gaussian(3, 2, 12, 20)
    expected = [[float(optim.hill_alpha(w[i, j])) for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(optim.hill_alpha(w), expected, rtol=1e-5)


@pytest.mark.parametrize("w", [jnp.zeros((8, 8)), jnp.eye(8), with_spectrum(np.r_[np.ones(2), np.zeros(6)])])
def test_degenerate_spectra_have_a_finite_exponent(w):
    for method in ("released", "textbook"):
        assert np.isfinite(optim.hill_alpha(w, method=method))


def test_a_quantile_counts_ranks_from_the_largest():
    assert [quantile_index(8, q) for q in (0.1, 0.25, 0.5, 0.75, 0.9)] == [0, 1, 3, 5, 7]
    s = np.arange(8, 0, -1.0)
    w = with_spectrum(s, 11)
    for q, rank in ((0.25, 1), (0.5, 3), (0.9, 7)):
        for x in (w, 7.0 * w, w.T):
            assert float(spectral_quantile(x, q)) == pytest.approx(s[rank] / np.linalg.norm(s), rel=1e-5)


def test_a_spike_over_a_flat_bulk_leaves_the_bulk_at_the_median():
    energy, rank = 0.9, 16
    s = np.r_[np.sqrt(energy), np.full(rank - 1, np.sqrt((1 - energy) / (rank - 1)))]
    assert float(spectral_quantile(with_spectrum(s), 0.5)) == pytest.approx(np.sqrt((1 - energy) / (rank - 1)), rel=1e-4)


def test_multipliers_fill_their_range_in_the_order_of_alpha():
    alpha = jnp.asarray([3.0, 2.0, 7.0, 2.5])
    np.testing.assert_allclose(assign(alpha, LLR()), [1.8, 1.0, 5.0, 1.4], rtol=1e-6)
    np.testing.assert_allclose(assign(alpha, LLR(reverse=True)), [4.2, 5.0, 1.0, 4.6], rtol=1e-6)
    np.testing.assert_allclose(assign(alpha, TempBalance(assign="rank")), [1.0, 0.5, 1.25, 0.75], rtol=1e-6)
    for name in ("sqrt", "log2"):
        found = assign(alpha, LLR(assign=name))
        assert float(jnp.mean(found)) == pytest.approx(1, abs=1e-6) and np.all(np.argsort(found) == np.argsort(alpha))
    assert np.all(np.argsort(assign(alpha, LLR(assign="sigmoid"))) == np.argsort(alpha))


@pytest.mark.parametrize("name", ["linear", "sqrt", "log2", "sigmoid", "rank"])
def test_equal_alphas_give_equal_multipliers_of_one(name):
    np.testing.assert_allclose(assign(jnp.full(5, 3.3), LLR(assign=name)), 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "sqrt", "log2", "sigmoid", "rank"])
def test_a_matrix_without_an_exponent_is_not_compared_and_moves_nobody_else(name):
    """Matrices that write to the stream start at zero: with the largest exponent they would squeeze all others together."""
    none = float(optim.hill_alpha(jnp.zeros((8, 8))))
    assert none == float(optim.hill_alpha(jnp.eye(8)))
    for chosen in (LLR(assign=name), LLR(assign=name, reverse=True)):
        alone = assign(jnp.asarray([3.0, 2.0, 7.0, 2.5]), chosen)
        found = assign(jnp.asarray([none, 3.0, 2.0, none, 7.0, 2.5]), chosen)
        np.testing.assert_allclose(found, [1.0, *alone[:2], 1.0, *alone[2:]], rtol=1e-6)
        np.testing.assert_array_equal(assign(jnp.full(3, none), chosen), 1.0)


class Spectra(nnx.Module):
    """Two stacked parameters whose layers have known tails, an embedding, a head, a gain."""

    def __init__(self, key=0):
        up = [with_spectrum(np.arange(1, 17) ** -p, 24, seed=i) for i, p in enumerate((0.3, 0.6, 1.0))]
        down = [with_spectrum(np.arange(1, 17) ** -p, 24, seed=9 + i) for i, p in enumerate((0.4, 0.5, 0.8))]
        self.up = nnx.Param(jnp.stack(up), role="matrix", axes=("layer", "embed", "mlp"))
        self.down = nnx.Param(jnp.stack([x.T for x in down]), role="matrix", axes=("layer", "mlp", "embed"))
        self.embedding = nnx.Param(gaussian(11, 16), role="embedding", axes=("vocab", "embed"))
        self.head = nnx.Param(gaussian(16, 11), role="head", axes=("embed", "vocab"))
        self.gain = nnx.Param(jnp.ones((3, 16)), role="vector", axes=("layer", "embed"))


def setting(layerwise, direction="adamw", **fields):
    return {"direction": {"name": direction}, "layerwise": {"smallest": 4, **layerwise}, "schedule": constant, **fields}


def run(config, steps, total=100, params=None, state=None, first=1, rate=None):
    """States of a recipe over fixed random gradients, one after each update."""
    model = Spectra()
    tx = optim.build(config, model, steps=total)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param)) if params is None else params
    state = tx.init(params) if state is None else state
    update, found = jax.jit(tx.update), []
    for k in range(first, first + steps):
        gradients = jax.tree.map(lambda x, k=k: jax.random.normal(jax.random.key(7 * k + x.size), x.shape), params)
        moved, state = update(gradients, state, params)
        params = optax.apply_updates(params, moved)
        found.append((params, state))
    return found


def rates_after(found):
    return [optim.multipliers(state)["rate"] for _, state in found]


def test_llr_orders_rates_by_the_tails_and_gives_the_ends_their_share():
    layerwise = {"name": "llr", "interval": 1000, "ramp": 0, "adapt": 1.0}
    (_, state), *_ = run(setting(layerwise), 1)
    rate = optim.multipliers(state)["rate"]
    # Lightest tail: the smallest power, up 0.3; heaviest: up 1.0.
    assert float(rate["up"][0]) == pytest.approx(5) and float(rate["up"][2]) == pytest.approx(1)
    every = np.concatenate([rate["up"], rate["down"]])
    assert np.all(np.argsort(-every) == np.argsort([0.3, 0.6, 1.0, 0.4, 0.5, 0.8]))
    assert float(rate["embedding"]) == pytest.approx(5) and float(rate["head"]) == pytest.approx(5)
    np.testing.assert_allclose(rate["gain"], 1.0)
    np.testing.assert_allclose(state.layerwise.inner.alpha["up"], optim.hill_alpha(Spectra().up[...]), rtol=1e-4)


def test_a_multiplier_multiplies_direction_and_decay_of_its_layer():
    layerwise = {"name": "llr", "interval": 1000, "ramp": 0, "adapt": 1.0}
    (with_rates, state), *_ = run(setting(layerwise), 1)
    (without, _), *_ = run({"direction": {"name": "adamw"}, "schedule": constant}, 1)
    before = nnx.to_pure_dict(nnx.state(Spectra(), nnx.Param))
    rate = optim.multipliers(state)["rate"]["up"][:, None, None]
    np.testing.assert_allclose(with_rates["up"] - before["up"], rate * (without["up"] - before["up"]), rtol=1e-4, atol=1e-7)


def test_a_ramp_is_straight_and_ends_at_the_target():
    found = rates_after(run(setting({"name": "llr", "interval": 1000, "ramp": 4, "adapt": 1.0}), 7))
    path = [float(rate["embedding"]) for rate in found]
    np.testing.assert_allclose(path, [1, 2, 3, 4, 5, 5, 5], rtol=1e-6)


def test_rates_are_measured_again_at_every_interval_and_frozen_after_their_share_of_the_run():
    config = setting({"name": "llr", "interval": 3, "ramp": 2, "adapt": 0.1, "most": 3.0}, direction="muon")
    found = rates_after(run(config, 14, total=100))
    ups = [np.asarray(rate["up"]) for rate in found]
    assert not np.array_equal(ups[2], ups[4])  # measured at 3
    assert all(np.array_equal(ups[9], later) for later in ups[10:])  # adapt ends at step 10
    began = [int(state.layerwise.inner.began) for _, state in run(config, 14, total=100)]
    assert began == [1, 1, 3, 3, 3, 6, 6, 6, 6, 6, 6, 6, 6, 6]


@pytest.mark.parametrize(("total", "limit"), [(30, 6), (4, 1)])
def test_rates_of_a_run_that_is_short_for_the_ramp_are_frozen_after_their_share_too(total, limit):
    found = rates_after(run(setting({"name": "llr", "interval": 100, "ramp": 50, "adapt": 0.2}), limit + 2, total=total))
    assert float(found[max(limit, 1) - 1]["embedding"]) == pytest.approx(5)
    for later in found[limit:]:
        jax.tree.map(np.testing.assert_array_equal, later, found[limit - 1])


def test_a_range_of_one_is_the_plain_optimizer_bit_for_bit():
    one = run(setting({"name": "llr", "least": 1.0, "most": 1.0, "interval": 2}, direction="muon"), 4)[-1][0]
    plain = run({"direction": {"name": "muon"}, "schedule": constant}, 4)[-1][0]
    assert all(np.array_equal(one[name], plain[name]) for name in plain)


def test_rates_resume_in_the_middle_of_a_ramp_bit_for_bit():
    config = setting({"name": "llr", "interval": 4, "ramp": 3, "adapt": 1.0})
    whole = run(config, 8)
    params, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), whole[4])
    resumed = run(config, 3, params=params, state=state, first=6)[-1]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), resumed, whole[-1])


def test_frozen_multipliers_are_those_of_the_first_step():
    found = rates_after(run(setting({"name": "frozen", "interval": 2}), 5))
    llr = rates_after(run(setting({"name": "llr", "ramp": 0, "adapt": 1.0}), 1))
    for rate in found:
        jax.tree.map(np.testing.assert_array_equal, rate, llr[0])


def test_temp_balance_leaves_the_ends_and_all_but_matrices_at_the_base_rate():
    rate = rates_after(run(setting({"name": "temp_balance"}), 1))[0]
    assert set(rate) == {"up", "down"}
    for path in rate:
        assert float(rate[path][0]) == 1.0 and float(rate[path][2]) == 1.0
    assert sorted([float(rate["up"][1]), float(rate["down"][1])]) == [0.5, 1.5]


def test_alpha_decay_moves_decays_and_no_rates():
    _, state = run(setting({"name": "alpha_decay"}), 1)[0]
    found = optim.multipliers(state)
    assert found["rate"] == {} and set(found["decay"]) == {"up", "down"}
    assert float(found["decay"]["up"].max()) == pytest.approx(5) and float(found["decay"]["up"].min()) == pytest.approx(0.6666)
    idle = {"direction": {"name": "adamw", "weight_decay": 0.5, "learning_rate": 0.1}}
    tx = optim.build({**setting({"name": "alpha_decay"}), **idle}, Spectra(), steps=9)
    params = nnx.to_pure_dict(nnx.state(Spectra(), nnx.Param))
    moved, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    shrink = 0.05 * found["decay"]["up"][:, None, None]
    np.testing.assert_allclose(moved["up"], -shrink * params["up"], rtol=1e-4)


@pytest.mark.parametrize(
    ("direction", "field"),
    [
        ({"name": "muon"}, "weight_decay = 0"),
        ({"name": "adamw", "weight_decay": 0.0}, "weight_decay = 0"),
        ({"name": "adamw", "decay_roles": ["embedding"]}, "decay_roles"),
    ],
)
def test_alpha_decay_without_a_decay_of_matrices_is_refused(direction, field):
    with pytest.raises(ConfigError, match=f"(?s)optimizer.direction.{field}.*no matrix decays"):
        optim.build(setting({"name": "alpha_decay"}) | {"direction": direction}, Spectra())
    optim.build(setting({"name": "alpha_decay"}) | {"direction": {"name": "muon", "weight_decay": 0.01}}, Spectra())


def test_rates_within_a_layer_fill_the_range_in_every_layer():
    rate = rates_after(run(setting({"name": "llr", "within": "layer", "ramp": 0, "adapt": 1.0}), 1))[0]
    for layer in range(3):
        assert sorted([float(rate["up"][layer]), float(rate["down"][layer])]) == pytest.approx([1.0, 5.0])


def test_fixed_multipliers_by_type_reach_the_table_and_the_update():
    patterns = ["up=up", "down=query"]
    config = {"direction": {"name": "adamw"}, "layerwise": {"name": "by_type", "kinds": patterns}, "schedule": constant}
    rows = {row.path: row.learning_rate_multiplier for row in optim.assignment(config, Spectra())}
    assert rows == {"up": 6.0, "down": 8.0, "embedding": 10.0, "head": 10.0, "gain": 1.0}
    with_rates, plain = run(config, 1)[0][0], run({"direction": {"name": "adamw"}, "schedule": constant}, 1)[0][0]
    before = nnx.to_pure_dict(nnx.state(Spectra(), nnx.Param))
    for path, factor in rows.items():
        np.testing.assert_allclose(with_rates[path] - before[path], factor * (plain[path] - before[path]), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("mixer", ["gla", "gated_delta_net", "retention", "simple_gla"])
def test_the_output_gate_of_a_mixer_is_none_of_the_mlp(mixer):
    import models

    model = models.abstract({"width": 16, "layers": 2, "heads": 2, "mixer": {"name": mixer}}, vocab_size=11)
    rows = {row.path: row for row in optim.assignment({"layerwise": {"name": "by_type"}, "schedule": constant}, model)}
    by_site = {path.split(".", 2)[-1]: (row.layerwise, row.learning_rate_multiplier) for path, row in rows.items()}
    assert by_site["mixer.gate.kernel"] == ("by_type output_gate", 4.0) and by_site["ffn.gate.kernel"] == ("by_type gate", 6.0)
    choices = predicted_choices(Predicted(model_size=10**11), parameters(model))
    own = {path.split(".", 2)[-1]: choice for path, choice in choices.items()}
    assert own["mixer.gate.kernel"] == own["mixer.value.kernel"] != own["ffn.gate.kernel"]


def test_the_assignment_says_how_multipliers_come_about():
    rows = {row.path: row.layerwise for row in optim.assignment(setting({"name": "llr"}), Spectra())}
    assert rows["up"] == "llr of rate, 1 to 5" and rows["embedding"] == "llr most" and rows["gain"] == "llr least"
    rows = {row.path: row.layerwise for row in optim.assignment(setting({"name": "llr", "assign": "sqrt"}), Spectra())}
    assert rows["up"] == "llr of rate, sqrt of alpha" and rows["embedding"] == "llr most" and rows["gain"] == "llr 1"


@pytest.mark.parametrize("name", ["sqrt", "log2", "sigmoid"])
def test_a_map_around_one_leaves_the_rest_at_one(name):
    rate = rates_after(run(setting({"name": "llr", "assign": name, "ramp": 0, "adapt": 1.0}), 1))[0]
    measured = np.concatenate([rate["up"], rate["down"]])
    assert measured.min() < 1 < measured.max()
    np.testing.assert_array_equal(rate["gain"], 1.0)
    assert float(rate["embedding"]) == pytest.approx(measured.max())


@pytest.mark.parametrize(
    ("layerwise", "sentence"),
    [
        ({"name": "llr", "least": 2.0, "most": 1.0}, "optimizer.layerwise.least.*above most"),
        ({"name": "llr", "assign": "sigmoid", "most": 3.0}, "optimizer.layerwise.most.*'sigmoid' does not use it"),
        ({"name": "temp_balance", "assign": "sqrt", "least": 0.9}, "optimizer.layerwise.least.*'sqrt' does not use it"),
        ({"name": "by_type", "kinds": ["up:up"]}, "not of the form"),
        ({"name": "by_type"}, "no pattern says which kind of matrix"),
        ({"name": "by_type", "kinds": ["up=up", "down=up", "*.nothing=up"]}, "fits no matrix"),
        ({"name": "llr", "smallest": 500}, "optimizer.layerwise.smallest.*no matrix has 500"),
    ],
)
def test_layerwise_rates_that_cannot_be_are_refused(layerwise, sentence):
    with pytest.raises(ConfigError, match=f"(?s){sentence}"):
        optim.build({"direction": {"name": "adamw"}, "layerwise": layerwise, "schedule": constant}, Spectra(), steps=10)


def test_a_rate_that_needs_the_length_of_the_run_says_so():
    with pytest.raises(ConfigError, match="optimizer.layerwise.name = 'llr'"):
        optim.build(setting({"name": "llr"}), Spectra())
    assert not ByType().depends_on_steps
