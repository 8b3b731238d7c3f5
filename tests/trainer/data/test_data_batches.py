"""What holds for the batches of every data set."""

import dataclasses
import json

import numpy as np
import pytest

from strata import ConfigError, DataError


def take(iterator, count):
    """The next `count` batches."""
    return [next(iterator) for _ in range(count)]


def test_batches_keep_the_contract(dataset):
    for batch in [*take(dataset.train(), 3), *dataset.validation()]:
        types = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
        assert types == {
            "tokens": ("int32", (4, 16)),
            "targets": ("int32", (4, 16)),
            "segment_ids": ("int32", (4, 16)),
            "weights": ("float32", (4, 16)),
        }
        assert all(0 <= batch[name].min() and batch[name].max() < dataset.vocab_size for name in ("tokens", "targets"))
        assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
        assert not batch["weights"][batch["segment_ids"] == 0].any()
        inner = batch["segment_ids"][:, 1:] > 0
        assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1])[inner].all()


@pytest.mark.parametrize("position", [1, 5, 23])
def test_a_resumed_iterator_goes_on_as_the_uninterrupted_one(dataset, position, same):
    straight = dataset.train()
    take(straight, position)
    state = json.loads(json.dumps(straight.get_state()))
    resumed = dataset.train(start_state=state)
    assert resumed.get_state() == state
    assert all(same(a, b) for a, b in zip(take(straight, 12), take(resumed, 12), strict=True))
    assert straight.get_state() == resumed.get_state()
    straight.set_state(state)
    assert same(next(straight), next(dataset.train(start_state=state)))


def test_a_position_far_away_is_reached_without_reading_up_to_it(dataset):
    state = dataset.train().get_state() | {"examples": 10**9}
    if dataset.positions is not None:
        state["sources"] = dataset.positions(10**9)
    resumed = dataset.train(start_state=state)
    next(resumed)
    assert resumed.get_state()["examples"] == 10**9 + 4


def test_threads_that_read_ahead_change_neither_order_nor_state(dataset, same):
    plain = dataset.train()
    threaded = dataclasses.replace(dataset, options=dataclasses.replace(dataset.options, workers=2, prefetch=3)).train()
    for _ in range(9):
        assert same(next(plain), next(threaded))
        assert plain.get_state() == threaded.get_state()
    moved = dataset.train(start_state=threaded.get_state())
    assert same(next(moved), next(threaded))
    threaded.close()


def test_processes_hold_the_rows_of_the_whole_batch_in_order(dataset, same):
    whole = dataset.train()
    parts = [dataset.train(process_index=i, process_count=2) for i in range(2)]
    for _ in range(3):
        halves = [next(part) for part in parts]
        assert same(next(whole), {name: np.concatenate([half[name] for half in halves]) for name in halves[0]})
    assert all(part.get_state() == whole.get_state() for part in parts)
    passes = [dataset.validation(process_index=i, process_count=2) for i in range(2)]
    for batch, *halves in zip(dataset.validation(), *passes, strict=True):
        assert same(batch, {name: np.concatenate([half[name] for half in halves]) for name in batch})


def test_the_batch_size_does_not_change_the_examples(dataset, same):
    small = take(dataset.train(), 4)
    large = dataclasses.replace(dataset, options=dataclasses.replace(dataset.options, batch_size=8)).train()
    for i in range(2):
        assert same(next(large), {name: np.concatenate([small[2 * i][name], small[2 * i + 1][name]]) for name in small[0]})


def test_validation_is_the_same_every_time_and_apart_from_training_position(dataset, same):
    first = list(dataset.validation())
    take(dataset.train(), 3)
    assert all(same(a, b) for a, b in zip(first, dataset.validation(), strict=True))
    assert len(first) == len(dataset.validation())


def test_a_seed_changes_the_order_and_equal_seeds_do_not(build, same):
    for name, options in (("text_files", {}), ("bigram", {}), ("recall", {"pairs": 2})):
        first, again, other = (next(build(name, seed, **options).train()) for seed in (1, 1, 2))
        assert same(first, again) and not same(first, other)
        assert same(first, next(build(name, 7, **options | {"seed": 1}).train()))


def test_processes_that_do_not_divide_the_batch_are_refused(build):
    with pytest.raises(ConfigError, match="3 processes do not divide a batch of 4"):
        build("bigram").train(process_count=3)


def test_a_position_of_other_data_is_refused(build, corpus):
    state = build("text_files").train().get_state()
    (corpus / "00.txt").write_text("another text")
    with pytest.raises(DataError, match="belongs to other data"):
        build("text_files").train(start_state=state)


def test_a_position_is_bound_to_seed_and_sequence_length(build):
    state = build("bigram").train().get_state()
    for other in (build("bigram", 1), build("bigram", sequence_length=8)):
        with pytest.raises(DataError, match="belongs to other data"):
            other.train(start_state=state)
