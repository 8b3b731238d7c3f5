"""A Markov source with a known entropy rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from trainer.data.dataset import Batch, Dataset, data_seed, derived_seed, fingerprint
from trainer.data.options import Bigram


@dataclasses.dataclass(frozen=True)
class Chain:
    """A stationary, irreducible Markov chain over V symbols with at most K successors each.

    Attributes:
      successors: int32[V, K].
      probabilities: float64[V, K], rows sum to 1; a deterministic symbol has 1 in the first place.
      stationary: float64[V], the long-run frequency of each symbol.
    """

    successors: np.ndarray
    probabilities: np.ndarray
    stationary: np.ndarray

    @property
    def entropies(self) -> np.ndarray:
        """float64[V]: entropy of the next symbol after each symbol, in nats."""
        p = self.probabilities
        return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)

    @property
    def entropy_rate(self) -> float:
        """Nats per token, sum over symbols of stationary x entropy: the least expected loss of any model."""
        return float(self.stationary @ self.entropies)

    def matrix(self) -> np.ndarray:
        """float64[V, V]: probability of column after row."""
        full = np.zeros((len(self.stationary),) * 2)
        np.add.at(full, (np.arange(len(full))[:, None], self.successors), self.probabilities)
        return full


def draw_chain(options: Bigram) -> Chain:
    """The chain of a table seed.

    A random cycle through all symbols gives everyone its first successor, which makes the chain irreducible, so that its
    stationary distribution is unique whatever the other successors are.
    """
    size, width = options.vocabulary, options.successors
    random = np.random.Generator(np.random.PCG64(derived_seed(options.table_seed, "bigram table", bits=64)))
    cycle = random.permutation(size)
    first = np.empty(size, np.int32)
    first[cycle] = np.roll(cycle, -1)
    successors = np.empty((size, width), np.int32)
    successors[:, 0] = first
    for symbol in range(size):
        others = np.delete(np.arange(size), first[symbol])
        successors[symbol, 1:] = random.permutation(others)[: width - 1]
    if options.concentration is None:
        probabilities = np.full((size, width), 1 / width)
    else:
        probabilities = random.dirichlet(np.full(width, options.concentration), size=size)
        # A draw of exactly 0 for the cycle's successor would cut the chain apart.
        probabilities = np.maximum(probabilities, 1e-6)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    certain = random.permutation(size)[: round(options.deterministic * size)]
    probabilities[certain] = np.eye(width)[0]
    unsolved = Chain(successors, probabilities, np.full(size, 1 / size))
    # Stationary: pi (P - I) = 0 and sum(pi) = 1, one redundant row replaced by the sum.
    system = unsolved.matrix().T - np.eye(size)
    system[-1] = 1
    stationary = np.linalg.solve(system, np.eye(size)[-1])
    return dataclasses.replace(unsolved, stationary=stationary)


class ChainExamples:
    """Rows of T + 1 symbols from the stationary chain; row i depends on the seed and i alone."""

    def __init__(self, chain: Chain, sequence_length: int, seed: int, stream: str, count: int = 2**48):
        self._chain, self._length, self._count = chain, sequence_length, count
        self._key = derived_seed(seed, "bigram", stream, bits=64)
        self._start = np.cumsum(chain.stationary)
        self._steps = np.cumsum(chain.probabilities, axis=1)[:, :-1]  # the last step is always reached

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Batch:
        """The rows with these numbers. Every token is in segment 1 and every target is scored."""
        rows, chain = np.empty((len(indices), self._length + 1), np.int32), self._chain
        uniform = np.stack([numbered(self._key, index).random(self._length + 1) for index in indices])
        last = len(chain.stationary) - 1
        rows[:, 0] = np.minimum(np.searchsorted(self._start, uniform[:, 0], side="right"), last)
        for t in range(self._length):
            here = rows[:, t]
            step = (uniform[:, t + 1, None] >= self._steps[here]).sum(axis=1)
            rows[:, t + 1] = chain.successors[here, step]
        shape = (len(indices), self._length)
        return {
            "tokens": np.ascontiguousarray(rows[:, :-1]),
            "targets": np.ascontiguousarray(rows[:, 1:]),
            "segment_ids": np.ones(shape, np.int32),
            "weights": np.ones(shape, np.float32),
        }


def numbered(key: int, index: int) -> np.random.Generator:
    """Random numbers that belong to (key, index): a counter-based generator whose counter begins at the index."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, int(index)]))


def bigram(options: Bigram, seed: int) -> Dataset:
    """The data set; `chain` of its examples holds the truth."""
    seed, chain, length = data_seed(options, seed), draw_chain(options), options.sequence_length
    rate, entropies = chain.entropy_rate, chain.entropies
    certain = entropies < 1e-12
    description = {
        "kind": "bigram",
        "vocab_size": options.vocabulary,
        "entropy_rate_nats_per_token": rate,
        "entropy_rate_bits_per_token": rate / float(np.log(2)),
        "deterministic_share_of_tokens": float(chain.stationary[certain].sum()),
        "validation": {"sequences": options.validation_examples, "tokens": options.validation_examples * length},
    }
    decisive = [
        options.vocabulary,
        options.deterministic,
        options.successors,
        options.concentration,
        options.table_seed,
        length,
        seed,
    ]
    return Dataset(
        options=options,
        vocab_size=options.vocabulary,
        description=description | {"fingerprint": fingerprint(["bigram", *decisive])},
        fingerprint=fingerprint(["bigram", *decisive]),
        examples=ChainExamples(chain, length, seed, "train"),
        held_out=ChainExamples(chain, length, seed, "validation", options.validation_examples),
        optimum=rate,
        reports_accuracy=True,
    )
