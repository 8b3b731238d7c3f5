"""Tiny corpora and data sets built on them."""

from pathlib import Path

import numpy as np
import pytest

import trainer.data
from strata import lookup, resolve
from trainer.data import python_source
from trainer.data.__main__ import main
from trainer.data.tokenizer import train_bpe

WORDS = "the norm of a block is taken before the layer and its loss falls with depth ünïcode 层 def return self".split()


def text(seed: int, words: int) -> str:
    """Reproducible prose of a given number of words."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words).tolist())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty .txt documents, about 9 kB."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for i in range(40):
        (directory / f"{i:02d}.txt").write_text(text(i, 20 + 3 * i))
    return directory


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A byte-level BPE of 320 ids."""
    path = tmp_path / "tokenizer.json"
    train_bpe([text(99, 2000)], 320, path)
    return path


@pytest.fixture
def shards(corpus: Path, tmp_path: Path) -> Path:
    """The corpus as byte-token shards of 1,000 tokens."""
    out = tmp_path / "shards"
    assert main(["write", "--out", str(out), "--shard_tokens", "1000", "--held_out", "0.2", str(corpus / "*.txt")]) == 0
    return out


@pytest.fixture
def build(corpus: Path):
    """`build(name, top_seed=0, **options)`: a data set; text_files reads the tiny corpus unless told otherwise."""

    def make(name: str, top_seed: int = 0, **options):
        sizes = {"sequence_length": 16, "batch_size": 4}
        files = {"files": [str(corpus / "*.txt")], "held_out": 0.2} if name == "text_files" else {}
        chosen, found = resolve(lookup("data", name), sizes | files | options)
        assert not found.problems, found.problems
        return trainer.data.build(chosen, top_seed)

    return make


KINDS = ["python_source", "text_files", "tokens", "mixture", "bigram", "recall"]


@pytest.fixture(params=KINDS)
def dataset(request, build, corpus: Path, monkeypatch):
    """One small data set of every kind."""
    if request.param == "python_source":
        monkeypatch.setattr(python_source, "roots", lambda which: [("standard_library", corpus)])
        return build("python_source", held_out=0.3)
    if request.param == "text_files":
        return build("text_files", tokenizer=str(request.getfixturevalue("bpe")))
    if request.param in ("bigram", "recall"):
        return build(request.param, validation_examples=10, **{"pairs": 2} if request.param == "recall" else {})
    tokens = {"directory": str(request.getfixturevalue("shards"))}
    texts = {"name": "text_files", "files": [str(corpus / "*.txt")], "held_out": 0.2, "weight": 3}
    if request.param == "mixture":
        return build("mixture", sources=[texts, {"name": "tokens"} | tokens])
    return build("tokens", **tokens)


@pytest.fixture
def prose():
    """`prose(seed, words)`: reproducible text."""
    return text


@pytest.fixture
def same():
    """`same(first, second)`: whether two batches are equal in every array, dtypes included."""

    def compare(first: dict, second: dict) -> bool:
        return first.keys() == second.keys() and all(
            first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name]) for name in first
        )

    return compare
