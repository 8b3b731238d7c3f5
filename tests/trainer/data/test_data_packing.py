"""Windows over a stream of documents."""

import numpy as np
import pytest

from strata import DataError
from trainer.data.stream import HeldOutWindows, Stream, Windows, packed

SEPARATOR = 256


def stream(tokens: int, pieces: int = 1) -> Stream:
    """Distinct tokens, in `pieces` arrays."""
    return Stream(np.array_split(np.arange(1000, 1000 + tokens, dtype=np.uint16), pieces))


@pytest.mark.parametrize(("tokens", "length", "pieces"), [(97, 16, 1), (96, 16, 3), (17, 16, 2), (50, 1, 4), (101, 7, 5)])
def test_an_epoch_shows_every_token_as_a_target_once(tokens, length, pieces):
    windows = Windows(stream(tokens, pieces), length, SEPARATOR, seed=3)
    shown = np.zeros(tokens, int)
    for epoch in range(6):
        examples = range(windows.epoch_start(epoch), windows.epoch_start(epoch + 1))
        targets = windows.read(examples)["targets"].reshape(-1) - 1000
        shown += np.bincount(targets, minlength=tokens)
        assert targets.size - np.unique(targets).size < length  # only the window that goes round repeats anything
        assert shown.min() == epoch + 1
        assert (shown > epoch + 1).sum() == windows.epoch_start(epoch + 1) * length - (epoch + 1) * tokens < length


def test_no_training_row_is_padded():
    batch = Windows(stream(53), 10, SEPARATOR, seed=0).read(range(40))
    assert (batch["segment_ids"] > 0).all() and (batch["weights"] == 1).all()


def test_every_epoch_has_another_order():
    windows = Windows(stream(641), 10, SEPARATOR, seed=0)
    orders = []
    for epoch in range(4):
        start, end = windows.epoch_start(epoch), windows.epoch_start(epoch + 1)
        order = [windows.window(example) - start for example in range(start, end)]
        assert sorted(order) == list(range(end - start)) != order
        orders.append(tuple(order))
    assert len(set(orders)) == 4


def test_the_order_of_an_epoch_is_pinned():
    # Another version of Grain with another permutation would silently change every run: it must fail here instead.
    windows = Windows(stream(100), 10, SEPARATOR, seed=0)
    assert [windows.window(example) for example in range(12)] == [1, 9, 0, 2, 3, 5, 4, 8, 6, 7, 13, 19]


def test_targets_follow_inputs_in_the_stream_and_round_its_end():
    batch = Windows(stream(23), 5, SEPARATOR, seed=1).read(range(30))
    assert (batch["targets"] - 1000 == (batch["tokens"] - 1000 + 1) % 23).all()


def test_segments_begin_at_separators_and_separators_are_not_scored():
    row = np.array([[7, 8, SEPARATOR, 1, 2, SEPARATOR, SEPARATOR, 5]])
    batch = packed(row.astype(np.int32), SEPARATOR)
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 2, 3, 4]]
    assert batch["weights"].tolist() == [[1, 0, 1, 1, 0, 0, 1]]
    opened = packed(row[:, 2:].astype(np.int32), SEPARATOR)
    assert opened["segment_ids"].tolist() == [[1, 1, 1, 2, 3]]


@pytest.mark.parametrize(("tokens", "length"), [(97, 16), (17, 16), (5, 16), (50, 1)])
def test_held_out_windows_show_every_token_after_the_first_once_and_in_order(tokens, length):
    windows = HeldOutWindows(stream(tokens), length, SEPARATOR)
    batch = windows.read(range(len(windows)))
    assert batch["targets"][batch["weights"] > 0].tolist() == list(range(1001, 1000 + tokens))
    assert (batch["segment_ids"] > 0).sum() == tokens - 1


def test_validation_scores_exactly_the_held_out_bytes(build):
    for options in ({}, {"sequence_length": 1}, {"sequence_length": 100, "batch_size": 7}):
        dataset = build("text_files", **options)
        raw = dataset.raw_validation()
        assert dataset.validation_bytes == len(raw) == dataset.description["validation"]["bytes"]
        scored = [batch["targets"][batch["weights"] > 0] for batch in dataset.validation()]
        assert dataset.tokenizer.decode_bytes(np.concatenate(scored)) == raw


def test_a_limited_validation_is_spread_over_the_whole_set(build):
    dataset = build("text_files", sequence_length=4)
    rows = len(dataset.held_out)
    limited = list(dataset.validation(rows=12))
    assert len(limited) == len(dataset.validation(rows=12)) == 3
    last = dataset.held_out.read([11 * rows // 12])
    assert all(np.array_equal(limited[-1][name][-1], last[name][0]) for name in last)
    assert rows // 12 > 1
    everything = dataset.validation(rows=10**6)
    assert len(everything) == len(dataset.validation())
    for size in (1, 2, 6):
        parts = [batch["tokens"] for batch in dataset.validation(size, rows=12)]
        np.testing.assert_array_equal(np.concatenate(parts), np.concatenate([batch["tokens"] for batch in limited]))


def test_a_corpus_shorter_than_a_sequence_is_an_error(build, tmp_path):
    (tmp_path / "short.txt").write_text("0123456789" * 2)
    options = dict(files=[str(tmp_path / "short.txt")], split="tail", held_out=0.5)
    assert next(build("text_files", sequence_length=10, **options).train())["tokens"].shape == (4, 10)
    with pytest.raises(DataError, match=r"11 tokens, fewer than one sequence of 11 \+ 1"):
        build("text_files", sequence_length=11, **options)


def test_rows_of_one_token_work(build):
    dataset = build("text_files", sequence_length=1)
    epoch = len(dataset.examples._stream)
    batch = dataset.examples.read(range(epoch))
    assert batch["weights"].sum() == dataset.description["train"]["bytes"]
