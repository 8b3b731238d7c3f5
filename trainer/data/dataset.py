"""The data set: what the trainer, the evaluator and the sampler may ask of any data.

A batch is a dict of NumPy arrays of shape [B, T]:

    tokens       int32    inputs
    targets      int32    the token after each input
    segment_ids  int32    documents of the row, numbered from 1; 0 is padding
    weights      float32  1 where the target is scored; 0 at a target in another document than its input, and at padding

Training is an endless list of examples, numbered from 0; example i depends on the data, its order's seed and i alone.
So a position is one integer, resuming is O(1), and neither batch size, workers nor processes change what example i is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from strata import ConfigError, DataError
from trainer.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Examples(Protocol):
    """Random access to rows."""

    def read(self, indices: Sequence[int]) -> Batch:
        """The rows with these numbers, as one batch of `len(indices)` rows."""
        ...


class FiniteExamples(Examples, Protocol):
    """Random access to a known number of rows."""

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Batches for training, a fixed validation set, and what is known about both.

    Attributes:
      options: the options it was built from (`trainer.data.options.Batches` and more).
      vocab_size: number of token ids; every id in a batch is below it.
      tokenizer: None if the data is not text.
      token_bytes: int32[V], bytes of raw text each token stands for, 0 for separators. None where a token's bytes are not
        defined (no text, or a tokenizer that does not keep every byte): bits per byte cannot be told then.
      description: JSON-able; kind, files, fingerprint of the text, counts, and the optimum where one is known.
      fingerprint: a hash of everything that decides what training example i is; kept in the state of an iterator.
      examples: the endless training examples.
      held_out: the validation rows, in order.
      raw: gives the held-out text as one stream of bytes; None if there is none.
      optimum: the lowest expected loss in nats per scored token that any model can reach; None if unknown.
      reports_accuracy: whether the share of scored targets that are predicted right means something.
      positions: for data of several sources, the examples taken from each after n examples.
    """

    options: Any
    vocab_size: int
    description: dict[str, Any]
    fingerprint: str
    examples: Examples
    held_out: FiniteExamples
    tokenizer: Tokenizer | None = None
    token_bytes: np.ndarray | None = None
    raw: Callable[[], bytes] | None = None
    optimum: float | None = None
    reports_accuracy: bool = False
    positions: Callable[[int], list[int]] | None = None

    def train(
        self, *, start_state: dict[str, Any] | None = None, process_index: int = 0, process_count: int = 1
    ) -> TrainIterator:
        """An endless iterator of training batches.

        Args:
          start_state: what `get_state` of an earlier iterator returned, in any process; None starts at example 0.
          process_index, process_count: this process gets rows [i * B / n, (i + 1) * B / n) of each batch, so that the
            batches of all processes, concatenated, are the batch of one.

        Raises:
          ConfigError: the processes do not divide the batch.
          DataError: `start_state` belongs to other data.
        """
        return TrainIterator(self, start_state, process_index, process_count)

    def validation(
        self, batch_size: int | None = None, *, rows: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> Validation:
        """The validation batches, the same ones every time.

        Args:
          batch_size: rows of a batch over all processes; None: that of training.
          rows: at most this many, spread evenly over the validation set, the same ones for every batch size; None: every
            row once. The last batch is filled with rows of segment 0.
          process_index, process_count: as in `train`.
        """
        size = batch_size or self.options.batch_size
        mine = _slice(size, process_index, process_count)
        chosen = np.arange(len(self.held_out))
        if rows is not None and rows < len(chosen):
            chosen = np.arange(rows) * len(chosen) // rows
        return Validation(self.held_out, chosen, size, mine)

    @functools.cached_property
    def validation_bytes(self) -> int | None:
        """Bytes of raw text that the whole validation set scores, separators not counted. None as for `token_bytes`."""
        if self.token_bytes is None:
            return None
        scored = (self.token_bytes[batch["targets"]][batch["weights"] > 0].sum() for batch in self.validation(64))
        return int(sum(scored))

    def raw_validation(self) -> bytes:
        """The held-out documents as one stream, such as another compressor would be given.

        Raises:
          DataError: the data is not text, or its tokens cannot be turned back into the exact bytes.
        """
        if self.raw is None:
            raise DataError(f"data.name={self.description['kind']!r} has no held-out text")
        return self.raw()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def derived_seed(*parts: int | str, bits: int = 32) -> int:
    """A seed of its own for each use, from a hash of `parts`, so that neighbouring seeds share nothing."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[: bits // 8], "little")


def data_seed(options: Any, seed: int) -> int:
    """The seed of the data: its own, or the top-level one."""
    return seed if options.seed is None else options.seed


def _slice(batch_size: int, index: int, count: int) -> slice:
    if batch_size % count:
        raise ConfigError(f"{count} processes do not divide a batch of {batch_size} sequences (data.batch_size)")
    rows = batch_size // count
    return slice(index * rows, (index + 1) * rows)


class _BatchSource:
    """Batch k, counted from example `start`: the random-access source that Grain reads."""

    def __init__(self, examples: Examples, start: int, batch_size: int, mine: slice):
        self._examples, self._start, self._size, self._mine = examples, start, batch_size, mine

    def __len__(self) -> int:
        return 2**48  # Endless for any practical purpose; Grain wants a number.

    def __getitem__(self, index: int) -> Batch:
        first = self._start + int(index) * self._size
        return self._examples.read(range(first + self._mine.start, first + self._mine.stop))


class TrainIterator(Iterator[Batch]):
    """Batches read through Grain, in this process, with a state that is one count of examples.

    Whole batches are what Grain reads, and its threads hand them over in order, so neither the number of threads nor
    how far they have read ahead shows in the batches or in the state. Threads and not processes: Grain's worker
    processes are sent a copy of the whole corpus, need absl flags and a guarded `__main__`, and rows are only copied
    here, by NumPy.
    """

    def __init__(self, dataset: Dataset, state: dict[str, Any] | None, process_index: int, process_count: int):
        self._dataset = dataset
        self._mine = _slice(dataset.options.batch_size, process_index, process_count)
        self._fingerprint = dataset.fingerprint
        self._start(0)
        if state is not None:
            self.set_state(state)

    def _start(self, examples: int) -> None:
        import grain  # Imports JAX, which the validation of a config must not.

        options = self._dataset.options
        self._examples = examples
        source = _BatchSource(self._dataset.examples, examples, options.batch_size, self._mine)
        ahead = options.prefetch if options.workers else 0
        reading = grain.ReadOptions(num_threads=options.workers, prefetch_buffer_size=ahead)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(reading))

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._examples += self._dataset.options.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch returned: JSON-able, and the same in every process."""
        state = {"examples": self._examples, "fingerprint": self._fingerprint}
        if self._dataset.positions is not None:
            state["sources"] = self._dataset.positions(self._examples)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to the position `state`. Raises DataError if it was taken from other data."""
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                f"the saved position belongs to other data: its fingerprint is {state['fingerprint'][:12]}, that of "
                f"data.name={self._dataset.description['kind']!r} is now {self._fingerprint[:12]}. Something that decides "
                "the examples has changed: the files, the Python version (python_source), the tokenizer, the sequence "
                "length, the weights or the seed"
            )
        if "sources" in state and state["sources"] != self._dataset.positions(state["examples"]):
            raise DataError("the saved positions of the sources do not fit the number of examples")
        self.close()
        self._start(int(state["examples"]))

    def close(self) -> None:
        """Stop the threads that read ahead."""
        self._iterator.close()


class Validation:
    """A finite, repeatable pass over validation rows; `len` is the number of batches."""

    def __init__(self, held_out: FiniteExamples, chosen: np.ndarray, batch_size: int, mine: slice):
        self._held_out, self._chosen, self._size, self._mine = held_out, chosen, batch_size, mine

    def __len__(self) -> int:
        return -(-len(self._chosen) // self._size)

    def __iter__(self) -> Iterator[Batch]:
        rows = self._mine.stop - self._mine.start
        for first in range(0, len(self._chosen), self._size):
            mine = self._chosen[first : first + self._size][self._mine]
            # A row is read even where this process has none left, for the shapes; then all of it is emptied.
            batch = self._held_out.read(mine.tolist() or [0])
            yield {name: _fill(array[: len(mine)], rows) for name, array in batch.items()}


def _fill(array: np.ndarray, rows: int) -> np.ndarray:
    """`array` with rows of zeros added: padding tokens of segment 0 and weight 0."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
