"""Documents to a corpus: two streams of tokens, one to train on and one held out."""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from strata import DataError
from trainer.data.stream import Stream
from trainer.data.tokenizer import Tokenizer, dtype

ENCODE_BYTES = 1 << 20
"""Documents are handed to the tokenizer in groups of about this size, which keeps all its threads busy."""


class Document(NamedTuple):
    """One text, and the side it is on."""

    name: str  # where it comes from, for messages
    data: bytes
    held_out: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Packed text of one source.

    Attributes:
      train, held_out: streams that open every document with the separator.
      fingerprint: SHA-256 of the text and of its split.
      exact: every token of the held-out text stands for exactly its `token_bytes` bytes of it.
      raw: gives the held-out documents as one stream of bytes.
      description: JSON-able.
    """

    train: Stream
    held_out: Stream
    fingerprint: str
    exact: bool
    raw: Callable[[], bytes]
    description: dict[str, Any]


def skip_words(counts: Mapping[str, int]) -> str:
    """What was left out, by reason: `skipped 2 duplicate, 1 not utf8`; empty if nothing was."""
    words = [f"{count} {why.replace('_', ' ')}" for why, count in counts.items() if count]
    return f"skipped {', '.join(words)}" if words else ""


def falls_in(key: bytes, fraction: float) -> bool:
    """Whether a hash of `key` falls in the first `fraction` of its range: the same for the same key, on any machine."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < fraction * 2**64


class Tally:
    """Counts and a fingerprint of the documents that pass through; `named`: their names belong to the fingerprint."""

    def __init__(self, named: bool = False):
        self._named = named
        self.documents = {False: 0, True: 0}
        self.bytes = {False: 0, True: 0}
        self.empty = 0
        self._hash = hashlib.sha256()

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass on the documents that are not empty."""
        for document in documents:
            if not document.data:
                self.empty += 1
                continue
            self.documents[document.held_out] += 1
            self.bytes[document.held_out] += len(document.data)
            name = document.name if self._named else ""
            content = hashlib.sha256(document.data).hexdigest()
            self._hash.update(f"{name}\0{document.held_out:d}\0{len(document.data)}\0{content}\n".encode())
            yield document

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all documents so far, their order and their sides."""
        return self._hash.hexdigest()


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its token ids, separator first.

    Raises:
      DataError: a document is not UTF-8 and the tokenizer reads text; it names the document.
    """
    separator = np.array([tokenizer.separator], dtype(tokenizer.vocab_size))
    for group in _groups(documents):
        try:
            ids = tokenizer.encode_many([document.data for document in group])
        except UnicodeDecodeError:
            raise DataError(f"{_not_text(group)} is not UTF-8, which the tokenizer {tokenizer.name} needs") from None
        for document, tokens in zip(group, ids, strict=True):
            yield document, np.concatenate([separator, tokens])


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.data)
        if size >= ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _not_text(group: list[Document]) -> str:
    for document in group:
        try:
            document.data.decode()
        except UnicodeDecodeError:
            return document.name
    raise AssertionError("every document is UTF-8")


def is_exact(document: Document, tokens: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a document stand for exactly its bytes, by count."""
    return tokenizer.token_bytes is not None and int(tokenizer.token_bytes[tokens].sum()) == len(document.data)


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    what: str,
    description: dict[str, Any],
    *,
    named: bool = False,
    unsplit: str = "none of them was held out; give a larger held_out",
) -> Corpus:
    """Tokenize documents into memory, 2 bytes a token (4 for a vocabulary above 65,536).

    Args:
      documents: in the order in which they are laid out.
      tokenizer: for all of them.
      what: the source in words, for messages.
      description: of the source; counts and fingerprint are added.
      named: the names of documents mean the same on any machine and belong to the fingerprint.
      unsplit: what to say, and to do, where no text is held out.

    Raises:
      DataError: there is nothing to train on, or nothing held out.
    """
    code = "H" if dtype(tokenizer.vocab_size) == np.uint16 else "I"
    tokens = {False: array.array(code), True: array.array(code)}  # Grows in place, so a corpus is never held twice.
    tally, exact, held_out = Tally(named), True, []
    for document, ids in encoded(tally(documents), tokenizer):
        tokens[document.held_out].frombytes(memoryview(ids).cast("B"))
        if document.held_out:
            exact = exact and is_exact(document, ids, tokenizer)
            held_out.append(document.data)
    if not tally.documents[False]:
        raise DataError(f"{what} holds no text to train on ({tally.documents[True]} documents held out, {tally.empty} empty)")
    if not tally.documents[True]:
        raise DataError(f"{what} has {tally.documents[False]} documents and {unsplit}")
    streams = {side: Stream([np.frombuffer(held, held.typecode)]) for side, held in tokens.items()}
    return Corpus(
        train=streams[False],
        held_out=streams[True],
        fingerprint=tally.fingerprint,
        exact=exact,
        raw=lambda: b"".join(held_out),
        description=described(description, tally, {side: len(stream) for side, stream in streams.items()}, exact),
    )


def described(description: dict[str, Any], tally: Tally, tokens: dict[bool, int], exact: bool) -> dict[str, Any]:
    """`description` with what was counted while documents were tokenized."""
    sides = {
        name: {"documents": tally.documents[side], "bytes": tally.bytes[side], "tokens": tokens[side]}
        for name, side in (("train", False), ("validation", True))
    }
    return (
        description
        | sides
        | {
            "fingerprint": tally.fingerprint,
            "empty_documents": tally.empty,
            "bytes_exact": exact,
        }
    )
