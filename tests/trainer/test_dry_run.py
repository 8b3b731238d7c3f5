"""The dry run tells the truth about parameters, work and memory."""

import math
import types

import jax
import pytest

import models
from optim.roles import path_of
from strata import ConfigError
from trainer import config as configuration
from trainer.dry_run import dry_run
from trainer.flops import training_flops
from trainer.reporter import Reporter
from trainer.setup import Setup, abstract_params, assemble


@pytest.fixture
def report(tiny, capsys):
    def report(**changes):
        config = configuration.resolve_config(tiny(**changes))
        dry_run(config)
        return capsys.readouterr().out, assemble(config)

    return report


def test_every_parameter_has_a_row_and_the_counts_add_up(report):
    text, setup = report(optimizer__direction={"name": "muon"})
    shapes = abstract_params(setup.model)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert f"{total:,}" in text and "jordan x5" in text
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
        assert ".".join(str(entry.key) for entry in path) in text


def test_the_rate_of_every_group_is_drawn(report):
    text, _ = report(optimizer__direction={"name": "muon"}, optimizer__schedule={"name": "wsd", "decay": 0.25})
    assert "checkpoints that are always kept: stable after step 6" in text
    assert "learning rate of group 'matrix'" in text and "learning rate of group 'rest'" in text and "#" in text


def test_what_layer_sampling_can_save_is_said_with_the_share_of_the_head(report, monkeypatch):
    monkeypatch.setattr("trainer.dry_run._memory", lambda setup: [])  # which compiles the step
    drop = {"direction": {"name": "muon"}, "sampling": {"name": "drop_muon", "buckets": 2}}
    text, setup = report(optimizer=drop)
    # Two layers, cuts 0 and 1: 3 / (1/2 (1 + 2) + 1/2 (1 + 1 - 1/2)).
    assert "cuts at layers 0, 1; a step is at most 1.333 times as fast" in text
    flops = training_flops(setup.model, 16)
    expected = flops.per_token - 1 / 2 * 2 / 3 * (flops.per_token - flops.head) / 2
    tokens = setup.config.data.batch_size * 16
    assert (
        f"{expected * tokens / 1e9:,.2f} GFLOP a step of {tokens:,} tokens ({expected / flops.per_token:.3f} of a full" in text
    )
    assert f"{expected * tokens * setup.config.train.steps:.3g} FLOP for" in text
    share = flops.head_share
    assert share == 6 * 16 * 12 / training_flops(setup.model, 16).per_token
    assert f"{share:.1%} (with it at most {1 / ((1 - share) * 3 / 4 + share):.3f} times)" in text


def test_a_cut_among_layers_that_run_in_parallel_is_said_to_save_nothing_there(report, monkeypatch):
    monkeypatch.setattr("trainer.dry_run._memory", lambda setup: [])
    drop = {"direction": {"name": "muon"}, "sampling": {"name": "drop_muon", "buckets": 2}}
    sentence = "layers from 0 on run in parallel and are differentiated together, so that cuts at 1 save no more than one at 0"
    text, _ = report(optimizer=drop, model__depth={"name": "layer_parallel", "layers": 2})
    assert sentence in text
    text, _ = report(optimizer=drop, model__depth={"name": "layer_parallel", "layers": 1})
    assert "run in parallel" not in text


def test_flops_follow_the_formula(report):
    _, setup = report()
    width, layers, hidden, length, vocabulary = 16, 2, 48, 16, 12
    matrices = layers * (4 * width * width + 3 * width * hidden) + width * vocabulary
    flops = training_flops(setup.model, length)
    assert flops.products == 6 * matrices
    assert flops.attention == 12 * layers * width * length
    assert flops.causal == 12 * layers * width * (length + 1) / 2


def test_a_cut_saves_the_backward_pass_of_the_layers_below_it():
    def of(**depth):
        config = {"width": 16, "heads": 2, "layers": 4, "depth": depth or {"name": "sequential"}}
        return training_flops(models.abstract(config, vocab_size=12), 16)

    plain = of()
    layer = (plain.per_token - plain.head) / 4
    assert [plain.at_cut(cut) for cut in range(4)] == pytest.approx([plain.per_token - 2 / 3 * cut * layer for cut in range(4)])
    looped = of(name="recursive", loops=2)  # gradients still pass through the frozen block in the second loop
    products = (looped.products - looped.head) / 4
    assert looped.at_cut(0) == looped.per_token
    assert looped.at_cut(1) == pytest.approx(looped.per_token - 2 / 3 * layer - 1 / 3 * products)
    parallel = of(name="layer_parallel", layers=3, sweeps=1)
    assert parallel.at_cut(1) == pytest.approx(parallel.per_token - 2 / 3 * layer) == parallel.at_cut(2)


def test_mfu_counts_the_layers_that_the_steps_of_a_row_updated(tiny):
    sampling = {"name": "drop_muon", "buckets": 2}
    setup = assemble(configuration.resolve_config(tiny(optimizer={"direction": {"name": "muon"}, "sampling": sampling})))
    flops, draws = training_flops(setup.model, 16), [setup.cuts.cut(step, setup.config.seed) for step in range(1, 9)]
    assert set(draws) == {0, 1}
    row = types.SimpleNamespace(setup=setup, config=setup.config, flops=flops)
    for step, cut in enumerate(draws, 1):
        assert Reporter._flops_per_token(row, [step]) == flops.at_cut(cut)
    mean = sum(flops.at_cut(cut) for cut in draws[2:]) / 6
    assert Reporter._flops_per_token(row, range(3, 9)) == pytest.approx(mean) and mean < flops.per_token


def test_every_array_of_the_optimizer_that_mirrors_a_parameter_is_laid_out_like_it(tiny, monkeypatch):
    """Of an optax transformation too, whose state is apart for each parameter."""
    monkeypatch.setattr(Setup, "shardings", lambda setup: jax.tree_util.tree_map_with_path(named, abstract_params(setup.model)))
    for direction in ("adamw", "muon", "optax"):
        setup = assemble(configuration.resolve_config(tiny(optimizer__direction={"name": direction})))
        places, mirrored = jax.tree.leaves(setup.state_shardings()["optimizer"]), set()
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(setup.abstract_state()["optimizer"]), places, strict=True
        ):
            mirrored |= {place} if isinstance(place, str) else set()
            assert isinstance(place, str) or leaf.ndim < 2, path
        assert mirrored == set(jax.tree.leaves(setup.shardings()))


def named(path, leaf):
    return path_of(path)


def uses(depth, layers=4):
    """Matrix products of a block a token, and its scores, as multiples of those of one use; of a stack of equal blocks."""
    config = {"width": 16, "heads": 2, "layers": layers}
    plain, other = (training_flops(models.abstract(config | d, vocab_size=12), 16) for d in ({}, {"depth": depth}))
    assert other.head == plain.head
    found = layers * (other.products - plain.head) / (plain.products - plain.head)
    assert layers * other.causal / plain.causal == found == layers * other.attention / plain.attention
    return found


def test_blocks_are_counted_as_often_as_the_depth_strategy_evaluates_them():
    sweeps = {"name": "layer_parallel", "layers": 3, "sweeps": 2}
    assert uses(sweeps) == 1 + 3 * 2
    assert uses(sweeps | {"start": "batched", "correction": "diagonal"}) == 1 + 3 * 5
    assert uses({"name": "recursive", "loops": 2}) == 4
    trained = {"name": "layer_parallel", "layers": 3, "forward": "sequential", "suffixes": [2, 3], "regularizer": 0.5}
    assert uses(trained | {"regularizer": 0.0}) == 4
    assert uses(trained) == 4 + 2  # the last block alone, for each suffix
    assert uses(trained | {"form": "paper"}) == uses(trained | {"stride": 2}) == 4 + 2 + 3
    assert uses(trained | {"suffixes": []}) == 4 + 1
    assert uses(trained | {"suffixes": [1]}) == 4  # exact, so compared with nothing


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_counted_for_every_trained_exit(tied):
    def flops(**depth):
        config = {
            "width": 16,
            "heads": 2,
            "layers": 6,
            "tie_embeddings": tied,
            "depth": {"name": "recursive", "loops": 3} | depth,
        }
        return training_flops(models.abstract(config, vocab_size=12), 16)

    plain, trained = flops(), flops(exits="weighted")
    assert plain.head == 6 * 16 * 12 and trained.head == 3 * plain.head
    assert trained.products - plain.products == 2 * plain.head and trained.causal == plain.causal
    assert flops(exits="aggressive", exit_distillation=0.5) == trained


def test_a_pattern_is_counted_at_the_places_of_its_layers():
    pattern = [{"name": "attention", "window": 4}, {"name": "attention"}]
    config = {"width": 16, "heads": 2, "layers": 4, "mixer": {"name": "hybrid", "pattern": pattern}}
    found = training_flops(
        models.abstract(config | {"depth": {"name": "layer_parallel", "layers": 3, "sweeps": 2}}, vocab_size=12), 16
    )
    seen = [sum(min(i + 1, width) for i in range(16)) / 16 for width in (4, 16, 4, 16)]
    assert found.causal == pytest.approx(12 * 16 * sum(k * s for k, s in zip((1, 2, 2, 2), seen, strict=True)))


def test_a_window_costs_what_it_sees(report):
    _, setup = report(model__mixer={"name": "attention", "window": 4})
    seen = sum(min(i + 1, 4) for i in range(16)) / 16
    assert training_flops(setup.model, 16).causal == pytest.approx(12 * 2 * 16 * seen)


def test_a_run_to_start_from_that_is_none_is_told(tiny, tmp_path):
    config = configuration.resolve_config(tiny(init_from__run=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="gone does not exist"):
        dry_run(config)
