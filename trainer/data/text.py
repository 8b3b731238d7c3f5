"""Data sets of text: one source, or a mixture of several with fixed shares."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

import strata
from strata import DataError
from trainer.data import python_source as python_files
from trainer.data import text_files as documents_of_files
from trainer.data import tokens as token_shards
from trainer.data.corpus import Corpus
from trainer.data.dataset import Batch, Dataset, Examples, FiniteExamples, data_seed, derived_seed, fingerprint
from trainer.data.options import MIXTURE_BLOCK, Mixture, PythonSourceData, Text, TextFilesData, TokensData
from trainer.data.stream import HeldOutWindows, Windows
from trainer.data.tokenizer import load_tokenizer


class Mixed:
    """Endless examples of several sources, each read in its own order from its own position.

    Numbers are taken in blocks of `MIXTURE_BLOCK`. In every block source s appears exactly `quotas[s]` times, at places
    drawn from the seed and the block's number, so the position of every source after n examples is computed, not kept.
    """

    def __init__(self, sources: Sequence[Examples], weights: Sequence[float], seed: int):
        self._sources, self._seed = sources, seed
        self.quotas = quotas(weights)
        self._block = functools.lru_cache(maxsize=4)(self._draw)

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For one block: the source of each example, and how many examples of the block it has given before."""
        random = np.random.Generator(np.random.PCG64(derived_seed(self._seed, "mixture", block, bits=64)))
        source = random.permutation(np.repeat(np.arange(len(self.quotas)), self.quotas))
        before = np.empty(MIXTURE_BLOCK, np.int64)
        for which, quota in enumerate(self.quotas):
            before[source == which] = np.arange(quota)
        return source, before

    def locate(self, example: int) -> tuple[int, int]:
        """The source of an example, and its number there."""
        block, place = divmod(example, MIXTURE_BLOCK)
        source, before = self._block(block)
        which = int(source[place])
        return which, block * self.quotas[which] + int(before[place])

    def positions(self, examples: int) -> list[int]:
        """How many of the first `examples` examples came from each source."""
        block, place = divmod(examples, MIXTURE_BLOCK)
        counts = np.bincount(self._block(block)[0][:place], minlength=len(self.quotas))
        return [block * quota + int(count) for quota, count in zip(self.quotas, counts, strict=True)]

    def read(self, indices: Sequence[int]) -> Batch:
        """The examples with these numbers."""
        return _gathered(self._sources, [self.locate(example) for example in indices])


class Concatenated:
    """The held-out rows of several sources, one source after another."""

    def __init__(self, sources: Sequence[FiniteExamples]):
        self._sources = sources
        self._starts = np.cumsum([0] + [len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Sequence[int]) -> Batch:
        """The rows with these numbers."""
        which = np.searchsorted(self._starts, indices, side="right") - 1
        places = [(int(source), int(index - self._starts[source])) for source, index in zip(which, indices, strict=True)]
        return _gathered(self._sources, places)


def _gathered(sources: Sequence[Examples], places: Sequence[tuple[int, int]]) -> Batch:
    """Rows given as (source, number), read with one call a source and put back in order."""
    rows: dict[int, list[int]] = {}
    for row, (source, _) in enumerate(places):
        rows.setdefault(source, []).append(row)
    batch: Batch = {}
    for source, mine in rows.items():
        for name, array in sources[source].read([places[row][1] for row in mine]).items():
            batch.setdefault(name, np.empty((len(places), *array.shape[1:]), array.dtype))[mine] = array
    return batch


def quotas(weights: Sequence[float]) -> list[int]:
    """Shares of a block as whole numbers that sum to `MIXTURE_BLOCK`: largest remainders, at least 1 each."""
    exact = np.asarray(weights, float) / sum(weights) * MIXTURE_BLOCK
    counts = np.maximum(1, np.floor(exact)).astype(int)
    while counts.sum() != MIXTURE_BLOCK:
        step = 1 if counts.sum() < MIXTURE_BLOCK else -1
        gain = step * (exact - counts)
        gain[(counts + step) < 1] = -np.inf
        counts[int(np.argmax(gain))] += step
    return counts.tolist()


def python_source(options: PythonSourceData, seed: int) -> Dataset:
    """Python source text on this machine."""
    return _dataset(options, seed, [options], [python_files.read_corpus], [1.0])


def text_files(options: TextFilesData, seed: int) -> Dataset:
    """Documents from files."""
    return _dataset(options, seed, [options], [documents_of_files.read_corpus], [1.0])


def tokens(options: TokensData, seed: int) -> Dataset:
    """Memory-mapped token shards."""
    return _dataset(options, seed, [options], [token_shards.read_corpus], [1.0])


def mixture(options: Mixture, seed: int) -> Dataset:
    """Several sources with weights; the held-out rows of all of them are the validation set."""
    readers = [strata.implementation(source) for source in options.sources]
    return _dataset(options, seed, options.sources, readers, [source.weight for source in options.sources])


def _dataset(options: Text, seed: int, parts: Sequence[Any], readers: Sequence[Any], weights: Sequence[float]) -> Dataset:
    tokenizer, seed, length = load_tokenizer(options.tokenizer), data_seed(options, seed), options.sequence_length
    corpora: list[Corpus] = [read(part, tokenizer) for part, read in zip(parts, readers, strict=True)]
    for corpus in corpora:
        _check_length(corpus, length)
    windows = [
        Windows(corpus.train, length, tokenizer.separator, derived_seed(seed, "source", i, bits=64))
        for i, corpus in enumerate(corpora)
    ]
    held_out = [HeldOutWindows(corpus.held_out, length, tokenizer.separator) for corpus in corpora]
    mixed = Mixed(windows, weights, seed) if isinstance(options, Mixture) else None
    exact = all(corpus.exact for corpus in corpora)
    description = {"tokenizer": tokenizer.name, "vocabulary": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    if mixed is None:
        description = corpora[0].description | description
    else:
        description |= {
            "kind": "mixture",
            "sources": [corpus.description for corpus in corpora],
            "shares": [quota / MIXTURE_BLOCK for quota in mixed.quotas],
            "fingerprint": fingerprint([corpus.fingerprint for corpus in corpora]),
        }
    decisive = [[corpus.fingerprint for corpus in corpora], tokenizer.fingerprint, length, seed, mixed and mixed.quotas]
    return Dataset(
        options=options,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes if exact else None,
        description=description,
        fingerprint=fingerprint(decisive),
        examples=mixed or windows[0],
        held_out=Concatenated(held_out) if mixed else held_out[0],
        raw=lambda: b"".join(corpus.raw() for corpus in corpora),
        positions=mixed.positions if mixed else None,
    )


def _check_length(corpus: Corpus, length: int) -> None:
    kind = corpus.description["kind"]
    if len(corpus.train) < length + 1:
        raise DataError(
            f"{kind}: the training text has {len(corpus.train)} tokens, fewer than one sequence of {length} + 1 "
            "(data.sequence_length); give more text or shorter sequences"
        )
    if len(corpus.held_out) < 2:
        raise DataError(f"{kind}: the validation text has no token to predict")
