"""Token shards: a header, then the ids, in a file that can be memory-mapped.

    bytes    field
    0-7      magic "STRATATK"
    8-11     version, uint32 (all integers are little-endian)
    12-15    bytes per id: 2 (uint16) or 4 (uint32)
    16-23    number of ids the tokenizer has, uint64
    24-31    number of tokens in this file, uint64
    32-63    SHA-256 of the vocabulary (the tokenizer's fingerprint)
    64-95    SHA-256 of the tokens
    96-99    CRC-32 of bytes 0-95
    128-     tokens

A shard appears under its name only when it is complete and on the disk.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from strata import DataError
from trainer.data.tokenizer import Tokenizer, dtype

MAGIC = b"STRATATK"
VERSION = 1
TOKENS_AT = 128
_FIELDS = struct.Struct("<8sIIQQ32s32s")
_READ_BYTES = 1 << 24


class Header(NamedTuple):
    """What a shard says of itself."""

    itemsize: int
    vocab_size: int
    count: int
    vocabulary: str  # hexadecimal SHA-256
    checksum: str  # hexadecimal SHA-256 of the tokens

    def to_bytes(self) -> bytes:
        """The first `TOKENS_AT` bytes of the file."""
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.itemsize,
            self.vocab_size,
            self.count,
            bytes.fromhex(self.vocabulary),
            bytes.fromhex(self.checksum),
        )
        return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(TOKENS_AT, b"\0")


def read_header(path: Path) -> Header:
    """The header of a shard. Raises DataError if it is missing, damaged, or does not fit the size of the file."""
    try:
        with open(path, "rb") as file:
            raw = file.read(TOKENS_AT)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"cannot read the token shard {path}: {error.strerror}") from None
    if len(raw) < TOKENS_AT:
        raise DataError(f"the token shard {path} is truncated: {len(raw)} bytes, its header alone has {TOKENS_AT}")
    magic, version, itemsize, vocab_size, count, vocabulary, checksum = _FIELDS.unpack_from(raw)
    if magic != MAGIC:
        raise DataError(f"{path} is not a token shard (it does not begin with {MAGIC.decode()})")
    if struct.unpack_from("<I", raw, _FIELDS.size)[0] != zlib.crc32(raw[: _FIELDS.size]):
        raise DataError(f"the header of the token shard {path} is damaged: its CRC-32 does not fit")
    if version != VERSION:
        raise DataError(f"the token shard {path} has format version {version}; this program reads version {VERSION}")
    if size != TOKENS_AT + count * itemsize:
        state = "truncated" if size < TOKENS_AT + count * itemsize else "longer than it should be"
        raise DataError(f"the token shard {path} is {state}: {size} bytes, {TOKENS_AT + count * itemsize} expected")
    return Header(itemsize, vocab_size, count, vocabulary.hex(), checksum.hex())


def verify(path: Path) -> Header:
    """Read a whole shard and compare it with its checksum (about 1 s a GB). Raises DataError if it is damaged."""
    header, digest = read_header(path), hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(TOKENS_AT)
        while block := file.read(_READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != header.checksum:
        raise DataError(f"the token shard {path} is damaged: its tokens do not have the SHA-256 in its header")
    return header


def map_tokens(path: Path, header: Header) -> np.ndarray:
    """The tokens of a shard, memory-mapped, read-only."""
    return np.memmap(path, np.dtype(f"<u{header.itemsize}"), mode="r", offset=TOKENS_AT, shape=(header.count,))


def write_shard(path: Path, tokens: np.ndarray, tokenizer: Tokenizer) -> Header:
    """Write a shard and make it durable before it gets its name. Equal tokens give equal bytes."""
    kind = dtype(tokenizer.vocab_size)
    data = np.ascontiguousarray(tokens, kind.newbyteorder("<")).tobytes()
    header = Header(kind.itemsize, tokenizer.vocab_size, len(tokens), tokenizer.fingerprint, hashlib.sha256(data).hexdigest())
    replace_durably(path, header.to_bytes(), data)
    return header


def replace_durably(path: Path, *pieces: bytes) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it, so that `path` is never half-written."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
