"""A corpus of token shards: `index.json` lists them, so that a missing one is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from strata import DataError
from trainer.data import shards
from trainer.data.corpus import Corpus
from trainer.data.options import Tokens
from trainer.data.stream import Stream
from trainer.data.tokenizer import Tokenizer

INDEX = "index.json"
PROGRESS = "progress.json"


def read_index(directory: Path) -> dict[str, Any]:
    """`index.json` of a directory of shards. Raises DataError if it is missing, unfinished or damaged."""
    path = directory / INDEX
    if not path.is_file():
        if (directory / PROGRESS).is_file():
            raise DataError(
                f"the token shards in {directory} are not finished; "
                "give `python -m trainer.data write` the same arguments again"
            )
        raise DataError(f"there is no {path}; `python -m trainer.data write` writes it with the shards")
    try:
        index = json.loads(path.read_text())
        for split in ("train", "validation"):
            for entry in index[split]["shards"]:
                entry["file"], entry["tokens"], entry["sha256"]
        index["description"], index["vocabulary"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged") from None
    return index


def open_shard(path: Path, entry: dict[str, Any], check: bool) -> tuple[shards.Header, Any]:
    """The header and the mapped tokens of a shard that the index lists. Raises DataError naming the file."""
    header = shards.verify(path) if check else shards.read_header(path)
    if header.count != entry["tokens"] or header.checksum != entry["sha256"]:
        raise DataError(f"{path} is not the token shard that {path.parent / INDEX} lists under this name")
    return header, shards.map_tokens(path, header)


def read_corpus(options: Tokens, tokenizer: Tokenizer) -> Corpus:
    """The corpus of a directory of shards, memory-mapped.

    Raises:
      DataError: a shard is missing, truncated or damaged, or was written with another vocabulary; it names the file.
    """
    directory = Path(options.directory)
    index = read_index(directory)
    streams = {}
    for split in ("train", "validation"):
        arrays = []
        for entry in index[split]["shards"]:
            path = directory / entry["file"]
            header, tokens = open_shard(path, entry, options.verify)
            if header.vocabulary != tokenizer.fingerprint:
                raise DataError(
                    f"the vocabulary of {path} ({header.vocab_size} ids, {header.vocabulary[:12]}) is not that of "
                    f"data.tokenizer={tokenizer.name!r} ({tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}); "
                    f"it was written with {index['description'].get('tokenizer')!r}"
                )
            arrays.append(tokens)
        streams[split] = Stream(arrays)

    def raw() -> bytes:
        return b"".join(tokenizer.decode_bytes(array) for array in streams["validation"].arrays)

    return Corpus(
        train=streams["train"],
        held_out=streams["validation"],
        fingerprint=index["description"]["fingerprint"],
        exact=index["description"]["bytes_exact"],
        raw=raw,
        description=index["description"] | {"kind": "tokens", "source": index["description"]["kind"]},
    )
