"""Which calls the Hopper kernels serve. No JAX in here: the registry asks before anything is imported."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.arguments import Call

TILE = 64
"""Rows of a chunk, and side of every tile: what one warpgroup multiplies at once."""
LARGEST_KEY_SIZE = 128
LARGEST_VALUE_SIZE = 256
USUAL_VALUE_SIZE = 128
SHARED_MEMORY = 232448
"""Bytes a block may have on Hopper."""
WORKERS = 2
"""Warpgroups of a specialised block that compute, beside one that brings what they read."""
STARTING, COMPUTING, BRINGING = 168, 208, 88
"""Registers of a thread of such a block: when it starts, and what it then gives up or gets. A block that started with fewer
would wait for ever for what nobody gives up; `compiled` refuses another number.
"""
VERSIONS = ((0, 11, 2), (0, 12))
"""JAX from the first and before the second: the Mosaic GPU interface changes between minor versions."""


def tiles(size: int) -> int:
    """Tiles that hold `size` columns."""
    return -(-size // TILE)


def pieces(dtype: str) -> int:
    """bfloat16 numbers that add up to one of `dtype`: what a tile takes in shared memory."""
    return 3 if dtype == "float32" else 1


def too_wide(decay: str, dtype: str, value_size: int) -> bool:
    """Whether the gradient kernel of a form would spill registers."""
    return decay == "vector" and dtype == "float32" and value_size > USUAL_VALUE_SIZE


def version() -> tuple[int, ...]:
    """Of the JAX that is installed."""
    return tuple(int(part) for part in importlib.metadata.version("jax").split(".")[:3] if part.isdigit())


def refusal(call: Call) -> str | None:
    """Why the Hopper kernels cannot serve `call`; None when they can."""
    first, last = VERSIONS
    if not first <= version() < last:
        bounds = f">={'.'.join(map(str, first))},<{'.'.join(map(str, last))}"
        return f"jax {'.'.join(map(str, version()))} is installed; the kernels are written for jax{bounds}"
    interpreted = type(call.interpret).__name__ == "InterpretGPUParams"
    if call.interpret not in (None, False) and not interpreted:
        return "interpret= must be parameters of the GPU interpreter here: kernels.mosaic_gpu.interpreter.parameters()"
    if not interpreted and call.platform != "gpu":
        return f"the default device is {call.platform}; the kernels need a Hopper GPU, or interpret="
    if not interpreted and call.capability != "9.0":
        return f"the default device has compute capability {call.capability or 'unknown'}; the kernels need 9.0 (Hopper)"
    if call.dtype not in ("bfloat16", "float32"):
        return f"q, k, v are {call.dtype}; the kernels take bfloat16 and float32"
    if call.chunk_size not in (None, TILE):
        return f"chunk_size = {call.chunk_size}; the kernels take {TILE}"
    if call.key_size > LARGEST_KEY_SIZE or call.value_size > LARGEST_VALUE_SIZE:
        most = f"K = {LARGEST_KEY_SIZE} and V = {LARGEST_VALUE_SIZE}"
        return f"K = {call.key_size}, V = {call.value_size}; the state must fit the registers: at most {most}"
    if not interpreted and too_wide(call.decay, call.dtype, call.value_size):
        return f"V = {call.value_size}: {call.op} in float32 would spill registers; at most {USUAL_VALUE_SIZE} there"
    if call.dtype == "float32" and call.delta and call.key_size > TILE:
        return f"K = {call.key_size} in float32: the tiles of a delta rule fit shared memory up to K = {TILE}"
    return None
