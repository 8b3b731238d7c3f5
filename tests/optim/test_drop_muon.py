"""Drop-Muon: a drawn suffix of the layers is updated, and nothing below it moves by a bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optim
from optim import roles
from optim.options import DropMuon
from optim.sampling import Cuts
from strata import ConfigError

LAYERS = 4


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


class Deep(nnx.Module):
    """Four layers in one stack, an embedding, a head, a final gain."""

    def __init__(self, head: bool = True):
        self.embedding = nnx.Param(normal(11, 6), role="embedding", axes=("vocab", "embed"))
        self.up = nnx.Param(normal(LAYERS, 6, 10), role="matrix", axes=("layer", "embed", "mlp"))
        self.down = nnx.Param(normal(LAYERS, 10, 6), role="matrix", axes=("layer", "mlp", "embed"))
        self.gain = nnx.Param(jnp.ones((LAYERS, 6)), role="vector", axes=("layer", "embed"))
        self.final = nnx.Param(jnp.ones(6), role="vector", axes=("embed",))
        if head:
            self.head = nnx.Param(normal(6, 11), role="head", axes=("embed", "vocab"))


def setting(direction="muon", **sampling):
    return {
        "direction": {"name": direction, "weight_decay": 0.1},
        "sampling": {"name": "drop_muon", **sampling},
        "schedule": {"name": "constant"},
        "clip_norm": None,
    }


@pytest.fixture
def deep():
    return nnx.to_pure_dict(nnx.state(Deep(), nnx.Param))


def gradient(k, params):
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(31 * k + x.size), x.shape), params)


def run(config, params, draws, steps=None, model=None):
    """Parameters and states after every update, with the given cuts."""
    tx = optim.build(config, model or Deep(), steps=steps)
    state, update, found = tx.init(params), jax.jit(tx.update, static_argnames="cut"), []
    for k, cut in enumerate(draws):
        moved, state = update(gradient(k, params), state, params, cut=cut)
        params = optax.apply_updates(params, moved)
        found.append((params, state))
    return found


def rows_of(tree, rows):
    """The given layers of a tree of parameters or of their state."""
    return {name: np.asarray(tree[name])[rows] for name in ("up", "down", "gain") if name in tree}


@pytest.mark.parametrize("direction", ["muon", "normuon", "adamw", "sgd", "lmo"])
def test_updating_every_layer_always_is_the_plain_optimizer_bit_for_bit(direction, deep):
    sampled = run(setting(direction, distribution="full", buckets=1), deep, [0, 0, 0])[-1][0]
    plain = {name: value for name, value in setting(direction).items() if name != "sampling"}
    jax.tree.map(np.testing.assert_array_equal, sampled, run(plain, deep, [0, 0, 0])[-1][0])


@pytest.mark.parametrize("direction", ["muon", "normuon", "adamw"])
@pytest.mark.parametrize("cut", [1, 3])
def test_frozen_weights_and_their_state_keep_every_bit(direction, cut, deep):
    deep["up"] = deep["up"].at[0, 0, 0].set(-0.0)
    deep["embedding"] = deep["embedding"].at[0, 0].set(-0.0)
    (one, before), (other, after) = run(setting(direction), deep, [0, cut])
    for name in ("up", "down", "gain"):
        assert one[name][:cut].tobytes() == other[name][:cut].tobytes()
        assert np.all(np.any(one[name][cut:] != other[name][cut:], axis=tuple(range(1, one[name].ndim))))
    assert np.signbit(other["up"][0, 0, 0]) == np.signbit(one["up"][0, 0, 0])
    assert np.asarray(one["embedding"]).tobytes() == np.asarray(other["embedding"]).tobytes()
    assert np.any(one["head"] != other["head"]) and np.any(one["final"] != other["final"])
    checked = 0
    for (keys, x), y in zip(
        jax.tree_util.tree_leaves_with_path(before.directions), jax.tree.leaves(after.directions), strict=True
    ):
        path = next((key.key for key in reversed(keys) if getattr(key, "key", None) in deep), None)
        if path in ("up", "down", "gain"):
            assert np.asarray(x)[:cut].tobytes() == np.asarray(y)[:cut].tobytes() and np.any(x[cut:] != y[cut:])
            checked += 1
        elif path == "embedding":
            assert np.array_equal(x, y)
            checked += 1
    assert checked >= 4


def test_a_negative_zero_stays_one(deep):
    deep["up"] = jnp.full_like(deep["up"], -0.0)
    (after, _), *_ = run(setting(), deep, [2])
    assert np.all(np.signbit(after["up"][:2]))


@pytest.mark.parametrize("direction", ["muon", "adamw"])
def test_active_layers_move_as_they_would_alone(direction, deep):
    """At the first update nothing is remembered, so active rows move as in a full update, weight decay included."""
    full = run(setting(direction), deep, [0])[0][0]
    part = run(setting(direction), deep, [2])[0][0]
    for name in ("up", "down", "gain"):
        np.testing.assert_allclose(part[name][2:], full[name][2:], atol=1e-6)
        np.testing.assert_array_equal(part[name][:2], deep[name][:2])
    np.testing.assert_allclose(part["head"], full["head"], atol=1e-6)


def test_momentum_corrections_count_the_updates_that_a_layer_had(deep):
    """A layer that is active for the first time in update 3 moves as Adam does in its first update."""
    found = run(setting("adamw"), deep, [2, 2, 0])
    before, after = found[1][0], found[2][0]
    g = gradient(2, deep)
    adam = optax.adamw(3e-3, 0.9, 0.95, weight_decay=0.1)
    own = {"up": before["up"][:2]}
    moved, _ = jax.jit(adam.update)({"up": g["up"][:2]}, adam.init(own), own)
    np.testing.assert_allclose(after["up"][:2] - before["up"][:2], moved["up"], rtol=1e-3, atol=1e-6)


def test_updates_in_between_leave_no_trace_on_layers_that_were_frozen(deep):
    """Momentum neither decays nor grows while a layer is frozen."""
    once = run(setting(), deep, [0])[-1][1].directions["matrix"].momentum
    later = run(setting(), deep, [0, 3, 3, 3])[-1][1].directions["matrix"].momentum
    assert np.array_equal(once["up"][:3], later["up"][:3]) and not np.array_equal(once["up"][3], later["up"][3])


@pytest.mark.parametrize("direction", ["muon", "adamw"])
def test_a_gradient_of_the_active_rows_alone_is_enough(direction, deep):
    tx, g, cut = optim.build(setting(direction), Deep()), gradient(0, deep), 2
    whole, _ = jax.jit(tx.update, static_argnames="cut")(g, tx.init(deep), deep, cut=cut)
    short = {name: x[cut:] if name in ("up", "down", "gain") else x for name, x in g.items()} | {"embedding": None}
    part, _ = jax.jit(tx.update, static_argnames="cut")(short, tx.init(deep), deep, cut=cut)
    jax.tree.map(np.testing.assert_array_equal, part, whole)


def test_the_gradient_of_frozen_rows_does_not_matter_even_for_clipping(deep):
    tx = optim.build({**setting(), "clip_norm": 0.5}, Deep())
    g = gradient(0, deep)
    wild = {name: x.at[:2].set(1e6) if name in ("up", "down", "gain") else x for name, x in g.items()}
    wild["embedding"] = jnp.full_like(g["embedding"], np.nan)
    one, _ = jax.jit(tx.update, static_argnames="cut")(g, tx.init(deep), deep, cut=2)
    other, _ = jax.jit(tx.update, static_argnames="cut")(wild, tx.init(deep), deep, cut=2)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_layers_of_interleaved_stacks_are_cut_by_their_place_in_the_model(deep):
    class Hybrid(nnx.Module):
        def __init__(self):
            self.linear = nnx.Param(normal(3, 6, 6), role="matrix", axes=("layer", "a", "b"), positions=(0, 1, 3))
            self.softmax = nnx.Param(normal(1, 6, 7), role="matrix", axes=("layer", "a", "b"), positions=(2,))
            self.head = nnx.Param(normal(6, 11), role="head", axes=("embed", "vocab"))

    model = Hybrid()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for cut, moving in ((1, (1, 2)), (2, (2,)), (3, (2,))):
        after = run(setting(), params, [cut], model=model)[-1][0]
        changed = [row for row in range(3) if np.any(after["linear"][row] != params["linear"][row])]
        assert tuple(changed) == moving and np.any(after["softmax"] != params["softmax"]) == (cut <= 2)


def test_a_shared_block_is_frozen_by_the_place_of_its_first_use():
    """A looped model has fewer rows than executed layers; a cut beyond its blocks leaves adapters and head."""

    class Looped(nnx.Module):
        def __init__(self):
            self.up = nnx.Param(normal(2, 6, 10), role="matrix", axes=("layer", "embed", "mlp"))
            self.adapter = nnx.Param(normal(4, 6, 2), role="factor", axes=("layer", "embed", "rank"))
            self.head = nnx.Param(normal(6, 11), role="head", axes=("embed", "vocab"))

    model = Looped()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for cut, blocks, adapters in ((1, [1], [1, 2, 3]), (3, [], [3])):
        after = run(setting(), params, [cut], model=model)[-1][0]
        assert [row for row in range(2) if np.any(after["up"][row] != params["up"][row])] == blocks
        assert [row for row in range(4) if np.any(after["adapter"][row] != params["adapter"][row])] == adapters


def test_layerwise_rates_of_frozen_layers_wait(deep):
    lanton = {"layerwise": {"name": "lanton", "interval": 1}}
    found = run({**setting(), **lanton}, deep, [0, 0, 2, 0])
    noise = [state.layerwise.inner.noise["up"] for _, state in found]
    assert np.array_equal(noise[1][:2], noise[2][:2]) and not np.array_equal(noise[1][2:], noise[2][2:])
    assert np.all(noise[3] != noise[2])
    llr = {"layerwise": {"name": "llr", "smallest": 4, "ramp": 0, "adapt": 1.0}}
    (after, state), *_ = run({**setting(), **llr}, deep, [2], steps=9)
    (plain, _), *_ = run(setting(), deep, [2])
    rate = optim.multipliers(state)["rate"]["up"][2:, None, None]
    np.testing.assert_allclose(
        after["up"][2:] - deep["up"][2:], rate * (plain["up"][2:] - deep["up"][2:]), rtol=1e-3, atol=1e-6
    )


# ---- draws


def cuts(depth=8, steps=100, **fields):
    return Cuts(DropMuon(**fields), depth, steps)


def test_cuts_are_evenly_spaced_from_the_first_layer():
    assert cuts(buckets=4).first == (0, 2, 4, 6) and cuts(depth=6, buckets=4).first == (0, 1, 3, 4)


@pytest.mark.parametrize(
    "chosen",
    [
        cuts(),
        cuts(distribution="shifted"),
        cuts(distribution="optimal", smoothness=(1.0, 3.0, 2.0, 8.0)),
        cuts(distribution="full"),
    ],
    ids=lambda chosen: chosen.options.distribution,
)
def test_layers_are_active_as_often_as_their_probability_says(chosen):
    draws = np.array([chosen.cut(1 + step, seed) for step in range(4) for seed in range(600)])
    assert set(draws) <= set(chosen.first)
    expected = np.cumsum([chosen.probabilities(1 + step) for step in range(4)], axis=1).mean(0)
    assert chosen.probabilities(1).sum() == pytest.approx(1)
    for cut, p in zip(chosen.first, expected, strict=True):
        assert abs(np.mean(draws <= cut) - p) <= 4 * np.sqrt(p * (1 - p) / len(draws)) + 1e-12


def test_the_draw_of_a_step_is_the_same_after_every_restart_and_differs_between_steps_and_seeds():
    chosen = cuts(buckets=8)
    path = [chosen.cut(step, 3) for step in range(1, 40)]
    assert path == [cuts(buckets=8).cut(step, 3) for step in range(1, 40)] and len(set(path)) > 4
    assert path != [chosen.cut(step, 4) for step in range(1, 40)]


def test_a_shifted_distribution_mirrors_itself_over_the_run():
    chosen = cuts(distribution="shifted")
    np.testing.assert_allclose(chosen.probabilities(1), chosen.probabilities(100)[::-1])
    assert np.all(np.diff(chosen.probabilities(1)) < 0)


def test_optimal_activity_is_proportional_to_growing_smoothness():
    chosen = cuts(distribution="optimal", smoothness=(1.0, 2.0, 4.0, 8.0))
    np.testing.assert_allclose(np.cumsum(chosen.probabilities(1)), np.array([1, 2, 4, 8]) / 8)
    equal = cuts(distribution="optimal", smoothness=(3.0, 3.0, 3.0, 3.0))
    np.testing.assert_allclose(equal.probabilities(1), [1, 0, 0, 0])


def test_the_ceiling_for_many_layers_and_buckets_is_one_and_a_half():
    assert cuts(depth=1000, buckets=1000).ceiling == pytest.approx(1.5, rel=2e-3)
    assert cuts(depth=8, buckets=1).ceiling == 1.0
    # Only where something below is trained does the lowest active layer need the gradient of its input.
    assert cuts(depth=2, buckets=2).ceiling == pytest.approx(3 / np.mean([1 + 1 + 1, 1 + 1 / 2]))
    assert cuts(depth=8, buckets=8).ceiling == pytest.approx(3 / (2 + 1 / 8**2))
    assert cuts(depth=8, buckets=2).ceiling < cuts(depth=8, buckets=4).ceiling < 1.5


def test_the_host_draws_from_the_model_of_the_run():
    found = optim.cuts(setting(buckets=2), Deep())
    assert found.first == (0, 2) and found.frozen(roles.parameters(Deep())["embedding"], 2) == 1
    assert optim.cuts({"schedule": {"name": "constant"}}, Deep()) is None


def test_the_table_says_how_often_a_parameter_is_updated():
    rows = {row.path: row.sampling for row in optim.assignment(setting(buckets=4), Deep())}
    assert rows["embedding"] == "25% of updates" and rows["head"] == "100% of updates"
    assert rows["up"] == "25% to 100% of updates"


@pytest.mark.parametrize(
    ("sampling", "head", "sentence"),
    [
        ({}, False, "optimizer.sampling.name.*no head of its own"),
        ({"buckets": 5}, True, "optimizer.sampling.buckets.*more than the 4 layers"),
        ({"distribution": "optimal", "smoothness": [1.0]}, True, "optimizer.sampling.smoothness"),
        ({"smoothness": [1.0, 2.0, 3.0, 4.0]}, True, "optimizer.sampling.smoothness.*only distribution = 'optimal'"),
        ({"shift": 1.0}, True, "optimizer.sampling.shift.*only distribution = 'shifted'"),
        ({"buckets": 0}, True, "optimizer.sampling.buckets"),
    ],
)
def test_sampling_that_cannot_be_is_refused(sampling, head, sentence):
    with pytest.raises(ConfigError, match=f"(?s){sentence}"):
        optim.build(setting(**sampling), Deep(head))


def test_cuts_that_cannot_be_drawn_are_refused(deep):
    tx = optim.build(setting(buckets=2), Deep())
    with pytest.raises(ValueError, match="none of those that can be drawn"):
        jax.jit(tx.update, static_argnames="cut")(gradient(0, deep), tx.init(deep), deep, cut=1)
    plain = optim.build({"schedule": {"name": "constant"}}, Deep())
    with pytest.raises(ValueError, match="needs layer sampling"):
        jax.jit(plain.update, static_argnames="cut")(gradient(0, deep), plain.init(deep), deep, cut=1)
    short = gradient(0, deep) | {"up": None}
    with pytest.raises(ValueError, match="no gradient of up"):
        jax.jit(tx.update, static_argnames="cut")(short, tx.init(deep), deep, cut=2)
