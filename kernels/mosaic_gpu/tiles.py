"""A 64 x 64 tile in registers (float32) and in shared memory (bfloat16 pieces), and products of them on the tensor cores."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_gpu.layout import Form, columns
from kernels.mosaic_gpu.limits import TILE

REGISTERS = plgpu.Layout.WGMMA
SHAPE = (TILE, TILE)


def _cut(x: jax.Array) -> jax.Array:
    """The leading eight bits of the mantissa. Not by rounding to bfloat16 and back: a compiler may leave that out."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    return lax.bitcast_convert_type(bits, jnp.float32)


def rounded(x: jax.Array) -> jax.Array:
    """What `put` leaves of finite x in an operand of one piece, in registers: to nearest, to even where two are as near."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = bits + 0x7FFF + (lax.shift_right_logical(bits, 16) & 1)
    return _cut(lax.bitcast_convert_type(bits, jnp.float32))


class Operand(NamedTuple):
    """A tile in shared memory as `pieces` bfloat16 tiles that add up to it: `tiles` [.,64,64] from `start` on."""

    tiles: Any
    start: Any
    pieces: int

    def piece(self, number: int) -> Any:
        """One of its tiles."""
        return self.tiles.at[hidden(self.start + number)]


def hidden(index: Any) -> jax.Array:
    """The same number, unknown to the compiler, which would else keep in registers every address that it may need again."""
    return lax.optimization_barrier(jnp.int32(index))


def put(operand: Operand, x: jax.Array) -> None:
    """Registers to shared memory, in the pieces that the operand has: one rounds to bfloat16, three lose nothing."""
    for number in range(operand.pieces - 1):
        head = _cut(x)
        operand.piece(number)[...] = head.astype(jnp.bfloat16)
        (x,) = now(x - head)
    operand.piece(operand.pieces - 1)[...] = x.astype(jnp.bfloat16)


def read(operand: Operand) -> jax.Array:
    """Shared memory to registers, float32."""

    def part(number: int) -> jax.Array:
        return plgpu.load(operand.piece(number), layout=REGISTERS).astype(jnp.float32)

    x = part(operand.pieces - 1)
    for number in reversed(range(operand.pieces - 1)):
        (x,) = now(part(number) + x)
    return x


class Term(NamedTuple):
    """a b, of either its transpose."""

    a: Operand
    b: Operand
    transpose_a: bool = False
    transpose_b: bool = False


def nn(a: Operand, b: Operand) -> Term:
    """a b"""
    return Term(a, b)


def nt(a: Operand, b: Operand) -> Term:
    """a b^T"""
    return Term(a, b, transpose_b=True)


def tn(a: Operand, b: Operand) -> Term:
    """a^T b"""
    return Term(a, b, transpose_a=True)


def dot(*terms: Term) -> jax.Array:
    """The sum of products, [64,64] float32 in registers. Operands must have been committed.

    Of operands in pieces the products of pieces are taken that count: with three, all but those below 2^-24.
    """

    def turned(ref: Any, transpose: bool) -> Any:
        return ref.transpose((1, 0)) if transpose else ref

    def accumulate(sums: Any) -> jax.Array:
        for a, b, transpose_a, transpose_b in terms:
            most = max(a.pieces, b.pieces)
            for i in range(a.pieces):
                for j in range(min(b.pieces, most - i)):
                    plgpu.wgmma(sums, turned(a.piece(i), transpose_a), turned(b.piece(j), transpose_b))
        return sums[...]

    # Behind a barrier, so that nothing is folded into the accumulator itself.
    return now(pl.run_scoped(accumulate, plgpu.ACC(SHAPE, jnp.float32)))[0]


def now(*tiles: jax.Array) -> list[jax.Array]:
    """The same tiles, computed here. A compiler may else compute them where they are used and keep all they are made of until
    then.
    """
    return list(lax.optimization_barrier(tiles))


def each_row(vector: Any) -> jax.Array:
    """A vector [64] of memory, a number for each row of a tile."""
    return plgpu.load(vector, layout=REGISTERS.reduce(1), optimized=False)


def by_row(vector: Any) -> jax.Array:
    """A vector [64] of shared memory as a factor of every row: entry i along row i."""
    return lax.broadcast_in_dim(each_row(vector), SHAPE, [0])


def by_column(vector: Any) -> jax.Array:
    """A vector [64] of shared memory as a factor of every column: entry j along column j."""
    x = plgpu.load(vector, layout=REGISTERS.reduce(0), optimized=False)
    return lax.broadcast_in_dim(x, SHAPE, [1])


def index(axis: int) -> jax.Array:
    """Numbers of the rows (0) or columns (1) of a tile, int32."""
    return plgpu.broadcasted_iota(jnp.int32, SHAPE, axis, layout=REGISTERS)


class Parked:
    """A sum that grows in shared memory while the registers are needed for something else. Only `read`; not for products
    before a commit.
    """

    def __init__(self, operand: Operand):
        self.operand, self.begun = operand, False

    def add(self, x: jax.Array) -> None:
        (x,) = now(x)
        put(self.operand, read(self.operand) + x if self.begun else x)
        self.begun = True

    def read(self) -> jax.Array:
        return read(self.operand)


def zeros() -> jax.Array:
    """A tile of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(SHAPE, jnp.float32), REGISTERS)


def no_rows() -> jax.Array:
    """Zeros [64] in registers, a number for each row of a tile."""
    return plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), REGISTERS.reduce(1))


def fetched(gmem: Any) -> jax.Array:
    """A tile of device memory straight to registers, float32."""
    return plgpu.load(gmem, layout=REGISTERS, optimized=False).astype(jnp.float32)


class Pool:
    """Hands out operands from the tiles of shared memory that a kernel has; what is given back is handed out again.

    begin, end: of the tiles to hand out, all unless given. shift: of each of them, known when the kernel runs.
    """

    def __init__(self, form: Form, tiles: Any, *, begin: int = 0, end: int | None = None, shift: Any = 0):
        self.tiles, self.pieces, self.shift, self.next = tiles, form.pieces, shift, begin
        self.end = tiles.shape[0] if end is None else end

    def take(self, pieces: int | None = None) -> Operand:
        """An operand of `pieces`, or of as many as the form's inputs need."""
        operand = Operand(self.tiles, self.next + self.shift, pieces or self.pieces)
        self.next += operand.pieces
        if self.next > self.end:
            raise AssertionError(f"{self.next} tiles of a pool that ends at {self.end}")
        return operand

    def many(self, count: int, pieces: int | None = None) -> list[Operand]:
        return [self.take(pieces) for _ in range(count)]

    def back(self, mark: int) -> None:
        """Forget what was taken since `next` was `mark`."""
        self.next = mark


def copy(form: Form, gmem: Any, at: tuple, tile: Any, operand: Operand, barrier: Any) -> None:
    """Begin to bring a tile of device memory, rows `at` and columns of `tile`, to an operand, which has the pieces of what lies
    there: by the copy engine, a copy a piece; or for float32 through registers.
    """
    if form.exact:
        put(operand, fetched(gmem.at[(*at, columns(tile))]))
        plgpu.commit_smem()  # or the compiler would bring every tile to registers first
        return
    for number in range(operand.pieces):
        piece = gmem.at[(*at, columns(tile * operand.pieces + number))]
        plgpu.copy_gmem_to_smem(piece, operand.piece(number), barrier)


def arrived(form: Form, barrier: Any) -> None:
    """Wait for the copies of a barrier; operands may be read afterwards."""
    plgpu.barrier_wait(barrier)
    if form.exact:
        plgpu.commit_smem()


def keep(form: Form, gmem: Any, at: tuple, tile: Any, operand: Operand, x: jax.Array) -> None:
    """A tile to device memory, rows `at` and columns of `tile`, in the pieces of `operand` and by way of it; float32 goes
    straight from the registers.

    Waits for copies begun before, so `operand` may be the same; this one is under way on return, so a kernel ends with `done`.
    """
    if form.exact:
        gmem[(*at, columns(tile))] = x
        return
    done()
    put(operand, x)
    plgpu.commit_smem()
    for number in range(operand.pieces):
        plgpu.copy_smem_to_gmem(operand.piece(number), gmem.at[(*at, columns(tile * operand.pieces + number))])


def keep_both(form: Form, gmem: Any, at: tuple, tile: Any, operand: Operand, x: jax.Array) -> None:
    """As `keep`, and `operand` holds the tile afterwards."""
    keep(form, gmem, at, tile, operand, x)
    if form.exact:
        put(operand, x)
        plgpu.commit_smem()


def done() -> None:
    """Wait until everything that `keep` sent has left shared memory."""
    plgpu.wait_smem_to_gmem(0)
