"""Tokenizers: bytes, and any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from strata import ConfigError, DataError

SEPARATORS = (
    "<|separator|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<bos>",
    "<s>",
    "</s>",
    "<eos>",
    "[SEP]",
    "[CLS]",
)
"""Special tokens that may open a document, in order of preference."""


class Tokenizer(Protocol):
    """What data needs of a tokenizer.

    Attributes:
      name: the option that chose it.
      vocab_size: number of token ids.
      separator: the id that stands before every document, and nowhere else.
      token_bytes: int32[V], bytes of raw text of each token, 0 for special tokens; None if a token is not a fixed run of
        bytes (see `HuggingFaceTokenizer`).
      fingerprint: SHA-256 of all that decides the ids of a text (vocabulary, merges, preparation), in hexadecimal.
    """

    name: str
    vocab_size: int
    separator: int
    token_bytes: np.ndarray | None
    fingerprint: str

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text, or its UTF-8 bytes, to token ids (`dtype`), without a separator."""
        ...

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` for many documents, on all cores where that helps."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids to text; separators give nothing, bytes that are not UTF-8 give U+FFFD."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Token ids to exact bytes; needs `token_bytes`."""
        ...


def dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ByteTokenizer:
    """Every byte is its own id, and id 256 is the separator."""

    name = "bytes"
    vocab_size = 257
    separator = 256

    def __init__(self):
        self.token_bytes = np.r_[np.ones(256, np.int32), np.int32(0)]
        self.fingerprint = hashlib.sha256(b"bytes, separator 256").hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        """Bytes (those of UTF-8 for a string) as uint16."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.uint16)

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """One array a document."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes, separators left out."""
        array = _as_array(ids)
        return array[array < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """Text; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library.

    Special tokens that appear inside a text are encoded as ordinary text, so the separator stands only where a document
    begins. It is the first of `SEPARATORS` that the file declares special; a file with none gets one more id.

    `token_bytes` is known for byte-level models without a normalizer or an added space (those of GPT-2, Llama 3, Qwen and of
    `python -m trainer.data tokenizer`). For others it is None, and bits per byte are not reported rather than wrong.
    """

    def __init__(self, path: str | Path):
        self.name = str(path)
        tokenizers = _tokenizers()
        if not Path(path).is_file():
            raise DataError(f"there is no tokenizer file {path} (data.tokenizer is bytes, or the path of a tokenizer.json)")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception for anything it cannot parse.
            raise DataError(f"{path} is not a tokenizer.json that the tokenizers library can read: {error}") from None
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self._special = {
            token: id
            for id, added in self._model.get_added_tokens_decoder().items()
            if added.special
            for token in [added.content]
        }
        if not vocabulary:
            raise DataError(f"{path} is a tokenizer without a single token")
        ids = max(vocabulary.values()) + 1
        known = [self._special[token] for token in SEPARATORS if token in self._special]
        self.separator = known[0] if known else ids
        self.vocab_size = ids if known else ids + 1
        self._bytes = self._table(vocabulary)
        self.token_bytes = None if self._bytes is None else np.array([len(piece) for piece in self._bytes], np.int32)
        layout = json.loads(self._model.to_str())
        decisive = [layout["model"].get("merges"), layout.get("normalizer"), layout.get("pre_tokenizer")]
        content = json.dumps([sorted(vocabulary.items()), self.separator, decisive], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def _table(self, vocabulary: dict[str, int]) -> list[bytes] | None:
        """The bytes of every id, or None if this kind of model has none."""
        layout = json.loads(self._model.to_str())
        pre = layout.get("pre_tokenizer") or {}
        stages = pre.get("pretokenizers", [pre])
        levels = [stage for stage in stages if stage.get("type") == "ByteLevel"]
        if layout.get("normalizer") or not levels or any(stage.get("add_prefix_space") for stage in levels):
            return None
        plain = {added.content for added in self._model.get_added_tokens_decoder().values() if not added.special}
        table = [b""] * self.vocab_size
        for token, id in vocabulary.items():
            if token in self._special:
                continue
            if token in plain:
                table[id] = token.encode()
            elif all(character in _byte_of() for character in token):
                table[id] = bytes(_byte_of()[character] for character in token)
            else:
                return None
        return table

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids. Raises UnicodeDecodeError for bytes that are not UTF-8."""
        return self.encode_many([text.encode() if isinstance(text, str) else text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Token ids of every text, in parallel."""
        words = [text.decode() for text in texts]
        try:
            encoded = self._model.encode_batch_fast(words, add_special_tokens=False)
        except Exception as error:  # the library has no other: a word that is unknown to a model without a token for it
            raise DataError(f"the tokenizer {self.name} cannot encode this text: {error}") from None
        return [np.array(item.ids, dtype(self.vocab_size)) for item in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes, special tokens left out. Raises DataError for a model that has no bytes of a token."""
        if self._bytes is None:
            raise DataError(f"the tokens of {self.name} are not runs of bytes, so they cannot be turned back exactly")
        return b"".join(self._bytes[id] for id in _as_array(ids).tolist())

    def decode(self, ids: Iterable[int]) -> str:
        """Text, special tokens left out."""
        if self._bytes is not None:
            return self.decode_bytes(ids).decode(errors="replace")
        known = [id for id in _as_array(ids).tolist() if id != self.separator]
        return self._model.decode(known, skip_special_tokens=True)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer an option names: `"bytes"`, or the path of a tokenizer.json.

    Raises:
      DataError: the file is missing or is not a tokenizer.
      ConfigError: the `tokenizers` package is not installed.
    """
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE (Sennrich et al. 2016; the byte alphabet of GPT-2) and write it as a tokenizer.json."""
    tokenizers = _tokenizers()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATORS[0]], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    model.save(str(partial))
    partial.replace(path)


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "a tokenizer.json needs the package tokenizers, which is not installed: pip install 'strata-lm[text]'"
        ) from None
    return tokenizers


@functools.cache
def _byte_of() -> dict[str, int]:
    """The character that byte-level models write for each byte, inverted: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _as_array(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
