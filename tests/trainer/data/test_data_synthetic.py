"""The two tasks with a known optimum."""

import math

import numpy as np
import pytest

from trainer.data.bigram import draw_chain
from trainer.data.options import Bigram


def test_the_stationary_distribution_is_left_unchanged_by_a_step():
    for options in (Bigram(), Bigram(vocabulary=7, successors=7, concentration=0.3), Bigram(deterministic=1.0)):
        chain = draw_chain(options)
        assert np.allclose(chain.matrix().sum(axis=1), 1) and np.isclose(chain.stationary.sum(), 1)
        assert (chain.stationary > 0).all()
        assert np.allclose(chain.stationary @ chain.matrix(), chain.stationary)


def test_the_entropy_rate_of_uniform_and_of_certain_successors_is_analytic():
    assert draw_chain(Bigram(deterministic=1.0)).entropy_rate == pytest.approx(0, abs=1e-12)
    assert draw_chain(Bigram(deterministic=0.0, successors=8)).entropy_rate == pytest.approx(math.log(8))
    half = draw_chain(Bigram(deterministic=0.5, successors=4))
    uncertain = half.entropies > 0
    assert uncertain.sum() == 32
    assert half.entropy_rate == pytest.approx(half.stationary[uncertain].sum() * math.log(4))


def test_the_true_model_scores_the_entropy_rate(build):
    dataset = build("bigram", sequence_length=64, batch_size=256, vocabulary=12, successors=5, concentration=1.0)
    chain = draw_chain(dataset.options)
    batch = next(dataset.train())
    nats = -np.log(chain.matrix()[batch["tokens"], batch["targets"]])
    tolerance = 4 * nats.std() / math.sqrt(nats.size)
    assert nats.mean() == pytest.approx(dataset.optimum, abs=tolerance) and tolerance < 0.05 * dataset.optimum
    assert dataset.optimum == dataset.description["entropy_rate_nats_per_token"]
    counts = np.bincount(batch["tokens"].reshape(-1), minlength=12) / batch["tokens"].size
    assert np.abs(counts - chain.stationary).max() < 0.02


def test_the_seed_of_examples_leaves_the_chain_alone(build):
    assert build("bigram", 1).optimum == build("bigram", 2).optimum != build("bigram", table_seed=1).optimum


@pytest.mark.parametrize("name", ["bigram", "recall"])
def test_validation_is_another_stream_than_training(build, name):
    options = {} if name == "bigram" else {"pairs": 2}
    dataset = build(name, validation_examples=10, **options)
    held_out, train = dataset.held_out.read(range(10))["tokens"], dataset.examples.read(range(10))["tokens"]
    assert not (held_out == train).all(axis=1).any()
    assert sum(int((batch["segment_ids"][:, 0] > 0).sum()) for batch in dataset.validation()) == 10
    assert len({row.tobytes() for row in train}) == 10


@pytest.mark.parametrize("filler", ["random", "blank"])
@pytest.mark.parametrize("length", [31, 32, 63])
def test_every_recall_answer_is_determined_by_the_pairs(build, filler, length):
    dataset = build("recall", sequence_length=length, pairs=8, filler=filler, vocabulary=41)
    batch = dataset.examples.read(range(50))
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
        pairs = dict(zip(tokens[0:16:2].tolist(), tokens[1:16:2].tolist(), strict=True))
        assert len(pairs) == 8
        scored = np.flatnonzero(weights)
        assert sorted(tokens[scored].tolist()) == sorted(pairs)
        assert [pairs[key] for key in tokens[scored].tolist()] == targets[scored].tolist()
        assert (scored >= 16).all()
        assert not set(tokens[16:].tolist()) - set(tokens[scored].tolist()) & set(pairs)
    assert dataset.optimum == 0.0 and dataset.reports_accuracy


def test_recall_queries_come_early_when_the_power_is_small(build):
    def mean_place(power):
        weights = build("recall", sequence_length=255, pairs=4, power=power).examples.read(range(200))["weights"]
        return np.nonzero(weights)[1].mean()

    assert mean_place(0.01) < mean_place(1.0)
    assert mean_place(1.0) == pytest.approx((8 + 255) / 2, abs=10)
