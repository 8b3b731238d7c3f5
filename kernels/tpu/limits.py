"""Which calls the TPU kernels serve. No JAX in here: the registry asks before anything is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.arguments import Call

CHUNK = 128
LARGEST_CHUNK = 128
SMALLEST_CHUNK = 16
USUAL_SIZE = 128
LARGEST_SIZE = 256
"""Of K and V. `kernels.tpu.compiled` compiles both sizes."""


def heads_a_step(decay: str, delta: bool, value_heads: int, dtype: str, key_size: int, value_size: int) -> int:
    """Heads a grid step: independent work for the scheduler to interleave. Long bodies fill it with fewer.

    Half as many for float32 where K or V is above `USUAL_SIZE`: with more the backward kernels of additive forms with a decay
    overflow the 16 MiB of VMEM that the compiler gives a kernel on v5e and v5p.
    """
    most = 2 if delta or decay == "vector" else 4
    if dtype == "float32" and max(key_size, value_size) > USUAL_SIZE:
        most //= 2
    return max(count for count in range(1, most + 1) if value_heads % count == 0)


def too_large(decay: str, delta: bool, dtype: str, key_size: int, value_size: int) -> bool:
    """Whether the backward kernel overflows VMEM with a single head: KDA's in float32, on v5e by 1.2 MiB at K = V = 256."""
    return delta and decay == "vector" and dtype == "float32" and max(key_size, value_size) > USUAL_SIZE


def untried(call: Call) -> str | None:
    """Why `auto` passes over the TPU kernels although they can serve `call`: no compiler has seen them at its sizes."""
    sizes = (USUAL_SIZE, LARGEST_SIZE) if call.sequences is None else (USUAL_SIZE,)
    seen = call.key_size == call.value_size and call.key_size in sizes and call.chunk_size in (None, CHUNK)
    if call.interpret is not None or seen:
        return None
    which = "its kernels" if call.sequences is None else "its kernels of packed rows"
    return (
        f"by name only at K = {call.key_size}, V = {call.value_size}: {which} "
        f"were compiled at K = V = {' and '.join(map(str, sizes))} in chunks of {CHUNK}, and have not run on a TPU"
    )


def refusal(call: Call) -> str | None:
    """Why the TPU kernels cannot serve `call`; None when they can."""
    if call.interpret is not None and call.interpret is not True and type(call.interpret).__name__ != "InterpretParams":
        return "interpret= must be True here, or jax.experimental.pallas.tpu.InterpretParams"
    if call.interpret is None and call.platform != "tpu":
        return f"the default device is {call.platform}; TPU kernels need a TPU, or interpret=True"
    if call.dtype not in ("bfloat16", "float32"):
        return f"q, k, v are {call.dtype}; the kernels take bfloat16 and float32"
    if max(call.key_size, call.value_size) > LARGEST_SIZE:
        return f"K = {call.key_size}, V = {call.value_size}; the state of a head must fit VMEM: at most {LARGEST_SIZE} each"
    if too_large(call.decay, call.delta, call.dtype, call.key_size, call.value_size):
        return f"K = {call.key_size}, V = {call.value_size} in float32; {call.op} must fit VMEM: at most {USUAL_SIZE} each"
    if call.chunk_size is not None and not SMALLEST_CHUNK <= call.chunk_size <= LARGEST_CHUNK:
        return f"chunk_size = {call.chunk_size}; the kernels take {SMALLEST_CHUNK} to {LARGEST_CHUNK}"
    return None
