"""The dry run tells the truth about parameters, work and memory."""

import math

import jax
import pytest

from trainer import config as configuration
from trainer.dry_run import dry_run
from trainer.flops import training_flops
from trainer.setup import abstract_params, assemble


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
    text, _ = report(optimizer__direction={"name": "muon"})
    assert "learning rate of group 'matrix'" in text and "learning rate of group 'rest'" in text and "#" in text


def test_flops_follow_the_formula(report):
    _, setup = report()
    width, layers, hidden, length, vocabulary = 16, 2, 48, 16, 12
    matrices = layers * (4 * width * width + 3 * width * hidden) + width * vocabulary
    flops = training_flops(setup.model, length)
    assert flops.products == 6 * matrices
    assert flops.attention == 12 * layers * width * length
    assert flops.causal == 12 * layers * width * (length + 1) / 2


def test_a_window_costs_what_it_sees(report):
    _, setup = report(model__mixer={"name": "attention", "window": 4})
    seen = sum(min(i + 1, 4) for i in range(16)) / 16
    assert training_flops(setup.model, 16).causal == pytest.approx(12 * 2 * 16 * seen)
