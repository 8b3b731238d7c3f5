"""What the chunked back-end takes unless it is told or tuned otherwise. No JAX in here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.arguments import Call

LARGEST_CHUNK = 256
CHUNK = 64
CHUNK_BY_CHANNEL_ON_CPU = 32
"""A decay a channel costs an exponential a row and level, and there are log2(chunk) levels."""

SPAN = 2**17
"""Numbers of the keys or values that a CPU works on at a time."""
SPAN_CHUNKS = 8
"""A span has at least so many; spans of one or two cost more than they save."""


def spans_of(call: Call, size: int) -> int:
    """Spans that the chunks of `size` tokens are worked on in, one after the other; 1 for all at once.

    More than one only on a CPU, and for rows so long that the arrays of all chunks would leave its caches between one step of
    the algebra and the next.
    """
    chunks = -(-call.length // size)
    chunk = call.batch * call.value_heads * size * max(call.key_size, call.value_size)
    most = max(SPAN_CHUNKS, SPAN // chunk)
    if call.platform != "cpu" or call.sequences is not None or most * chunk > 2 * SPAN or chunks * chunk <= 8 * SPAN:
        return 1
    return -(-chunks // most)


def default_chunk(call: Call) -> int:
    """Tokens a chunk where no table of `kernels.tuning` has been measured."""
    return CHUNK_BY_CHANNEL_ON_CPU if call.decay == "vector" and call.platform == "cpu" else CHUNK
