"""A sequential model's weights as those of a looped one (arXiv:2410.20672)."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

import models
from models import options as parts
from models.construct import resolve_model
from models.conversion import by_layer, from_layers
from models.conversion import convert as converted
from models.looped import sources
from strata import ConfigError


def flat(model):
    return {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}


def with_params(model, params):
    state = nnx.from_flat_state([(path, nnx.Param(value)) for path, value in params.items()])
    return nnx.merge(nnx.graphdef(model), nnx.State(nnx.to_pure_dict(state)))


@pytest.fixture
def convert(config, awake):
    """`convert(donor, initial=..., adapters=..., **depth)`: the looped model, and what it lost."""

    def make(donor, initial="stepwise", adapters="svd", **depth):
        target = nnx_tree(donor) | {"depth": {"name": "recursive", **depth}}
        fresh = models.build(target, vocab_size=11, seed=1)
        option = parts.Looped(initial=initial, adapters=adapters)
        new, lost = converted(option, donor.options, flat(donor), resolve_model(target), flat(fresh))
        return with_params(fresh, new), lost

    return make


def nnx_tree(model):
    from strata import to_tree

    return {key: value for key, value in to_tree(model.options).items() if key != "depth"}


@pytest.mark.parametrize(
    ("layers", "unique", "expected"),
    [
        (6, 3, [0, 2, 5]),
        (6, 2, [0, 5]),
        (18, 9, [0, 2, 4, 6, 8, 11, 13, 15, 17]),
        (18, 6, [0, 3, 7, 10, 14, 17]),
    ],
)
def test_stepwise_takes_both_ends_and_rounds_half_to_even(layers, unique, expected):
    assert [source for (source,) in sources("stepwise", layers, unique)] == expected


def test_other_sources():
    assert sources("lower", 6, 2) == [[0], [1]] and sources("upper", 6, 2) == [[4], [5]]
    assert sources("average", 6, 2) == [[0, 2, 4], [1, 3, 5]]
    drawn = [source for (source,) in sources("random", 12, 4, seed=3)]
    assert drawn == sorted(set(drawn)) and drawn == [source for (source,) in sources("random", 12, 4, seed=3)]


@pytest.mark.parametrize("initial", ["stepwise", "average", "lower", "random"])
def test_full_rank_reproduces_the_donors_logits(config, awake, run, tokens, convert, initial):
    donor, rows = awake(config(layers=4)), tokens(2, 8)
    model, lost = convert(donor, initial, loops=2, rank=16, alpha=32.0, share_norms=False)  # the scale must not matter
    expected = run(donor, rows)
    np.testing.assert_allclose(run(model, rows), expected, atol=1e-5 * np.abs(expected).max())
    assert max(lost.values()) < 1e-6


WINDOWS = {"name": "hybrid", "pattern": [{"name": "attention", "window": 3}, {"name": "attention"}]}


@pytest.mark.parametrize(
    "fields",
    [
        {"mixer": WINDOWS, "norm": {"name": "layer_norm", "bias": True}},
        {"kv_heads": 1, "placement": {"name": "sandwich"}},
        {"placement": {"name": "mhc", "streams": 2, "form": "dynamic"}},
        {"mixer": {"name": "gated_delta_net"}, "placement": {"name": "blend"}},
        {"mixer": {"name": "kda"}},
        {"mixer": {"name": "gla"}},
        {"mixer": {"name": "linear_attention", "feature_map": "hedgehog"}},
    ],
    ids=["windows", "grouped", "dynamic mhc", "gated delta", "kda", "gla", "hedgehog"],
)
def test_every_kind_of_donor_comes_back_at_full_rank(config, awake, run, tokens, convert, fields):
    donor, rows = awake(config(layers=4, **fields)), tokens(2, 8)
    model, _ = convert(donor, "average", loops=2, rank=16, share_norms=False)
    expected = run(donor, rows)
    np.testing.assert_allclose(run(model, rows), expected, atol=1e-4 * np.abs(expected).max())


def test_one_loop_and_identical_layers_reproduce_the_donor_without_adapters(config, awake, run, tokens, convert):
    donor, rows = awake(config(layers=3)), tokens(2, 8)
    for initial in ("stepwise", "average", "lower", "upper"):
        np.testing.assert_allclose(run(convert(donor, initial, loops=1)[0], rows), run(donor, rows), atol=1e-5)
    equal = flat(donor)
    equal |= {path: np.repeat(value[:1], 3, axis=0) for path, value in equal.items() if path[0] == "blocks"}
    donor = with_params(donor, equal)
    for initial in ("stepwise", "average"):
        model, lost = convert(donor, initial, loops=3)
        np.testing.assert_allclose(run(model, rows), run(donor, rows), atol=1e-5)
        assert max(lost.values()) < 1e-6


def test_the_error_of_each_matrix_is_the_tail_of_its_singular_values(config, awake, convert):
    donor, rank = awake(config(layers=4)), 3
    model, _ = convert(donor, "average", loops=2, rank=rank)
    old, new = flat(donor), flat(model)
    block = ("blocks", "block0")
    for site in ("query", "key", "value", "out"):
        path = (*block, "mixer", site)
        for layer in range(4):
            whole, shared = old[(*path, "kernel")][layer], new[(*path, "main", "kernel")][layer % 2]
            adapter = new[(*path, "adapter", "down")][layer] @ new[(*path, "adapter", "up")][layer]
            tail = np.linalg.svd(whole - shared, compute_uv=False)[rank:]
            assert np.sum((whole - shared - adapter) ** 2) == pytest.approx(np.sum(tail**2), rel=1e-4)
        # Residuals of the average cancel over the loops.
        total = sum(old[(*path, "kernel")][layer] - new[(*path, "main", "kernel")][layer % 2] for layer in (0, 2))
        np.testing.assert_allclose(total, 0, atol=1e-6)


def test_lower_keeps_the_first_loop_and_zero_adapters_change_nothing(config, awake, run, tokens, convert):
    donor, rows = awake(config(layers=4)), tokens(2, 8)
    plain, relaxed = convert(donor, "lower", loops=2)[0], convert(donor, "lower", "zero", loops=2, rank=4)[0]
    np.testing.assert_allclose(run(plain, rows), run(relaxed, rows), atol=1e-5)
    path = ("blocks", "block0", "ffn", "up", "kernel")
    np.testing.assert_array_equal(flat(plain)[path], flat(donor)[path][:2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 32}, "model.width is 16 in the donor and 32"),
        ({"layers": 6}, "the donor has 4 layers and the looped model executes 6"),
        ({"norm": {"name": "layer_norm"}}, "model.norm is"),
    ],
)
def test_models_that_do_not_match_are_refused_with_the_reason(config, awake, change, sentence):
    donor = awake(config(layers=4))
    target = resolve_model(config(layers=4) | change | {"depth": {"name": "recursive", "loops": 2}})
    with pytest.raises(ConfigError, match=sentence):
        converted(parts.Looped(), donor.options, flat(donor), target, {})


def test_other_kinds_of_donor_are_refused(config):
    def options(**fields):
        return resolve_model(config(layers=4, **fields))

    loop = {"name": "recursive", "loops": 2}
    with pytest.raises(ConfigError, match="looped already"):
        converted(parts.Looped(), options(depth=loop), {}, options(depth=loop), {})
    for rank in (0, 2):
        with pytest.raises(ConfigError, match=r"low-rank matrices of its own \(model.depth.rank = 3\)"):
            relaxed = {"name": "recursive", "loops": 1, "rank": 3}
            converted(parts.Looped(), options(depth=relaxed), {}, options(depth=loop | {"rank": rank}), {})
    with pytest.raises(ConfigError, match="take zero adapters"):
        noble = {"name": "noble", "rank": 2}
        converted(parts.Looped(), options(linear=noble), {}, options(linear=noble, depth=loop | {"rank": 2}), {})
    mixed = {"name": "mix", "alpha": 0.5}
    with pytest.raises(ConfigError, match="layer 1 of the donor is of another kind than layer 1"):
        converted(parts.Looped(), options(placement=mixed), {}, options(placement=mixed, depth=loop), {})


@pytest.mark.parametrize("initial", ["stepwise", "random", "upper"])
@pytest.mark.parametrize("pattern", [WINDOWS["pattern"], [{"name": "gla"}, {"name": "attention"}]], ids=["windows", "mixers"])
def test_a_block_never_starts_from_a_layer_of_another_kind(config, awake, run, tokens, convert, pattern, initial):
    donor, rows = awake(config(layers=8, mixer={"name": "hybrid", "pattern": pattern})), tokens(2, 8)
    plan = [layer.mixer for layer in donor.options.plan()]
    fits = all(plan[source] == plan[k] for k, (source,) in enumerate(sources(initial, 8, 4)))
    if fits:  # the last layers of an even pattern
        model, _ = convert(donor, initial, loops=2, rank=16, share_norms=False)
        expected = run(donor, rows)
        np.testing.assert_allclose(run(model, rows), expected, atol=1e-4 * np.abs(expected).max())
    else:
        with pytest.raises(ConfigError, match=rf"initial = '{initial}': block \d would start from layer \d .* of another kind"):
            convert(donor, initial, loops=2)
    assert fits == (initial == "upper")


def test_layers_apart_and_together_again_are_the_blocks(config, awake):
    model = awake(config(layers=5, mixer=WINDOWS))
    params = flat(model)
    again = from_layers(model.options, by_layer(model.options, params))
    assert again.keys() == {path for path in params if path[0] == "blocks"}
    assert all(np.array_equal(again[path], params[path]) for path in again)
    with pytest.raises(ConfigError, match="4 layers are given for a model of 5"):
        from_layers(model.options, by_layer(model.options, params)[:4])


def test_a_conversion_that_makes_other_parameters_is_refused(config, awake, monkeypatch):
    donor = awake(config(layers=4))
    monkeypatch.setattr("models.looped.looped", lambda option, donor, params, target, fresh, seed: (params, {}))
    target = resolve_model(config(layers=6))
    fresh = flat(models.build(config(layers=6), vocab_size=11, seed=1))
    with pytest.raises(ConfigError, match=r"blocks.block0.ffn.down.kernel is \[4, .*and the model has \[6, "):
        converted(parts.Looped(), donor.options, flat(donor), target, fresh)
