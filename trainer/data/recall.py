"""Multi-query associative recall: pairs, then their keys again, each followed by the value to be recalled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.bigram import numbered
from trainer.data.dataset import Batch, Dataset, data_seed, derived_seed, fingerprint
from trainer.data.options import Recall

BLANK = 0


class RecallExamples:
    """Rows `k1 v1 ... kn vn` and then `n` queries `k v` among fillers; row i depends on the seed and i alone.

    After the pairs the row is divided into places of two tokens. The n queries, in random order of their keys, stand at
    n distinct places drawn with probability proportional to `a x**(a - 1)`, x = 1, 2, ... being the number of the place
    and a the option `power` (Zoology, appendix on MQAR). Fillers are values, never keys, so a key after the pairs is always
    a query and its answer is certain; Zoology draws fillers from the whole vocabulary and puts the answer in a label only.
    """

    def __init__(self, options: Recall, seed: int, stream: str, count: int = 2**48):
        self._options, self._count = options, count
        self._key = derived_seed(seed, "recall", stream, bits=64)
        self._keys = (options.vocabulary - 1) // 2  # ids 1 .. keys; values are the same number of ids behind them
        places = (options.sequence_length + 1 - 2 * options.pairs) // 2
        self._log_odds = (options.power - 1) * np.log(np.arange(1, places + 1))

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Batch:
        """The rows with these numbers; the only targets with weight 1 are the values that follow a query."""
        shape = (len(indices), self._options.sequence_length + 1)
        rows, scored = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, answers, index in zip(rows, scored, indices, strict=True):
            self._fill(numbered(self._key, index), row, answers)
        return {
            "tokens": np.ascontiguousarray(rows[:, :-1]),
            "targets": np.ascontiguousarray(rows[:, 1:]),
            "segment_ids": np.ones((shape[0], shape[1] - 1), np.int32),
            "weights": np.ascontiguousarray(scored[:, 1:]),
        }

    def _fill(self, random: np.random.Generator, row: np.ndarray, answers: np.ndarray) -> None:
        pairs, keys = self._options.pairs, self._keys
        key = 1 + random.choice(keys, pairs, replace=False)
        value = 1 + keys + random.integers(keys, size=pairs)
        # The pairs with the largest log-odds + Gumbel noise are a draw without replacement.
        place = np.argsort(-(self._log_odds + random.gumbel(size=len(self._log_odds))))[:pairs]
        place = random.permutation(place)
        if self._options.filler == "random":
            row[2 * pairs :] = 1 + keys + random.integers(keys, size=len(row) - 2 * pairs)
        row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2] = key, value
        at = 2 * pairs + 2 * place
        row[at], row[at + 1] = key, value
        answers[at + 1] = 1


def recall(options: Recall, seed: int) -> Dataset:
    """The data set."""
    seed = data_seed(options, seed)
    decisive = [options.vocabulary, options.pairs, options.power, options.filler, options.sequence_length, seed]
    description = {
        "kind": "recall",
        "vocab_size": options.vocabulary,
        "scored_tokens_per_sequence": options.pairs,
        "chance_nats_per_token": float(np.log((options.vocabulary - 1) // 2)),
        "fingerprint": fingerprint(["recall", *decisive]),
        "validation": {"sequences": options.validation_examples, "tokens": options.validation_examples * options.pairs},
    }
    return Dataset(
        options=options,
        vocab_size=options.vocabulary,
        description=description,
        fingerprint=fingerprint(["recall", *decisive]),
        examples=RecallExamples(options, seed, "train"),
        held_out=RecallExamples(options, seed, "validation", options.validation_examples),
        optimum=0.0,
        reports_accuracy=True,
    )
