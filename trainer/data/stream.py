"""A stream of tokens, and the windows that training and validation cut from it.

Documents are laid end to end, each behind a separator: `| d0 d0 d0 | d1 d1 | d2 ...`. Training takes the stream as an
endless circle and cuts it into windows of T targets, so no token is dropped, none is repeated and there is no padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from trainer.data.dataset import Batch, derived_seed


class Stream:
    """Token arrays (in memory or memory-mapped) seen as one array of `len(stream)` tokens."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = [array for array in arrays if len(array)]
        self._starts = np.cumsum([0] + [len(array) for array in self.arrays])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on, going round at the end of the stream."""
        start %= len(self)
        which = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset, filled = start - int(self._starts[which]), 0
        while filled < len(out):
            piece = self.arrays[which][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled, offset, which = filled + len(piece), 0, (which + 1) % len(self.arrays)


def packed(rows: np.ndarray, separator: int) -> Batch:
    """A batch from rows int32[B, T + 1] of a stream: documents are told apart by the separator that opens each."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    opens = tokens == separator
    segment_ids = np.cumsum(opens, axis=1, dtype=np.int32)
    segment_ids += 1 - opens[:, :1]
    return {
        "tokens": np.ascontiguousarray(tokens),
        "targets": np.ascontiguousarray(targets),
        "segment_ids": segment_ids,
        "weights": (targets != separator).astype(np.float32),
    }


@functools.cache
def _permutation() -> Callable[..., int]:
    """Grain's keyed permutation of 0 .. max_index. Imported late: Grain imports JAX."""
    from grain.experimental import index_shuffle

    return index_shuffle


class Windows:
    """Endless training examples: every epoch visits all windows of the circle once, in an order of its own.

    With N tokens in the stream and windows of T targets, window w of the endless circle holds the targets at positions
    wT + 1 to wT + T, modulo N. Epoch e is the windows from ceil(eN / T) up to ceil((e + 1)N / T), in the order of a seeded
    permutation (a small block cipher, so it needs no memory). When T does not divide N, the windows of each epoch lie at
    another offset; at the end of any epoch each token has been a target equally often, but for fewer than T that are one
    ahead. Two windows of an epoch share no target.
    """

    def __init__(self, stream: Stream, sequence_length: int, separator: int, seed: int):
        self._stream, self._length, self._separator, self._seed = stream, sequence_length, separator, seed
        self._epoch_seed = functools.lru_cache(maxsize=4)(lambda epoch: derived_seed(seed, "epoch", epoch))

    def epoch_start(self, epoch: int) -> int:
        """The number of the first example of an epoch."""
        return -(-epoch * len(self._stream) // self._length)

    def window(self, example: int) -> int:
        """The window of the endless circle that example number `example` shows."""
        epoch = example * self._length // len(self._stream)
        start = self.epoch_start(epoch)
        count = self.epoch_start(epoch + 1) - start
        return start + _permutation()(example - start, max_index=count - 1, seed=self._epoch_seed(epoch), rounds=4)

    def read(self, indices: Sequence[int]) -> Batch:
        """The examples with these numbers."""
        rows = np.empty((len(indices), self._length + 1), np.int32)
        for row, example in zip(rows, indices, strict=True):
            self._stream.copy(self.window(example) * self._length, row)
        return packed(rows, self._separator)


class HeldOutWindows:
    """Validation rows in order: every token after the first is a target once, the last row is filled with padding."""

    def __init__(self, stream: Stream, sequence_length: int, separator: int):
        self._stream, self._length, self._separator = stream, sequence_length, separator

    def __len__(self) -> int:
        return -(-(len(self._stream) - 1) // self._length)

    def read(self, indices: Sequence[int]) -> Batch:
        """The rows with these numbers."""
        rows = np.full((len(indices), self._length + 1), self._separator, np.int32)
        real = np.zeros((len(indices), self._length), bool)
        for row, mask, index in zip(rows, real, indices, strict=True):
            start = index * self._length
            end = min(start + self._length + 1, len(self._stream))
            self._stream.copy(start, row[: end - start])
            mask[: end - start - 1] = True
        batch = packed(rows, self._separator)
        batch["segment_ids"] *= real
        batch["weights"] *= real
        return batch
