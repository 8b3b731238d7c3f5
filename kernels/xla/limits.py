"""What the chunked back-end takes unless it is told or tuned otherwise. No JAX in here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.arguments import Call

LARGEST_CHUNK = 256
CHUNK = 64
CHUNK_BY_CHANNEL_ON_CPU = 32
"""A decay a channel costs an exponential a row and level, and there are log2(chunk) levels."""


def default_chunk(call: Call) -> int:
    """Tokens a chunk where no table of `kernels.tuning` has been measured."""
    return CHUNK_BY_CHANNEL_ON_CPU if call.decay == "vector" and call.platform == "cpu" else CHUNK
