"""What a call is, checked: static facts in `Call`, arrays in `Tensors`. Every mistake is listed at once."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.tuning import device_name
from kernels.xla.limits import LARGEST_CHUNK
from strata.errors import ConfigError

Decay = Literal["none", "constant", "scalar", "vector"]
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Tensors(NamedTuple):
    """The arrays of a call; what a call does not have is None.

    q, k [B,T,H,K]; v [B,T,HV,V]; g [HV] (constant), [B,T,HV] (scalar) or [B,T,HV,K] (vector); beta [B,T,HV];
    initial_state [B or N,HV,K,V]; segment_ids int [B,T]; cu_seqlens int [N+1].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array | None = None
    beta: jax.Array | None = None
    initial_state: jax.Array | None = None
    segment_ids: jax.Array | None = None
    cu_seqlens: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Everything static about one call; hashable. Back-ends decide on it alone whether they can serve."""

    op: str
    decay: Decay
    delta: bool
    batch: int
    length: int
    heads: int
    value_heads: int
    key_size: int
    value_size: int
    dtype: str  # of q, k and v, and of the output
    scale: float
    segmented: bool  # segment_ids are given
    sequences: int | None  # N of cu_seqlens; None when a row is one sequence
    stateful: bool  # an initial state is given
    output_final_state: bool
    chunk_size: int | None
    interpret: Any
    platform: str  # of the device in question, `default_device`
    device: str  # its name in tuning tables
    capability: str  # its compute capability; empty where there is none
    devices: int  # that XLA may split the call over; 1 within a `jax.shard_map` that has split it already
    varies: bool  # an array does over the mesh, within a `jax.shard_map` that checks it: there JAX refuses Pallas kernels

    @property
    def group(self) -> int:
        """Value heads a query head serves."""
        return self.value_heads // self.heads

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[B or N, HV, K, V]"""
        return (self.sequences or self.batch, self.value_heads, self.key_size, self.value_size)

    @property
    def accumulator(self) -> np.dtype:
        """float64 for float64 inputs, float32 for all others: states, decays, sums."""
        return np.dtype("float64" if self.dtype == "float64" else "float32")


def value_heads(op: str, q: Any, k: Any, v: Any, *, step: bool = False) -> int:
    """HV of a call whose q, k and v are at least arrays of the right number of dimensions, none of them empty.

    Args:
      op: the name of the function that was called.
      step: the arrays are those of one token, without T.

    Raises:
      ConfigError: they are not; all mistakes are listed.
    """
    wrong: list[str] = []
    for name, array in (("q", q), ("k", k), ("v", v)):
        sizes = f"[{'B' if step else 'B, T'}, {'HV, V' if name == 'v' else 'H, K'}]"
        if not _is_array(array):
            wrong.append(f"{name} is a {type(array).__name__}; expected an array {sizes}")
            continue
        if len(array.shape) != (3 if step else 4):
            wrong.append(f"{name} has shape {list(array.shape)}; expected {sizes}")
        elif 0 in array.shape:
            wrong.append(f"{name} has shape {list(array.shape)}; it must not be empty in any dimension")
        if str(array.dtype) not in DTYPES:
            wrong.append(f"{name} has dtype {array.dtype}; expected one of {', '.join(DTYPES)}")
    if wrong:
        raise refused(op, wrong)
    return v.shape[-2]


def checked(
    op: str,
    tensors: Tensors,
    *,
    decay: Decay,
    delta: bool,
    scale: float | None,
    output_final_state: bool,
    chunk_size: int | None,
    interpret: Any,
    step: bool = False,
) -> Call:
    """The call that `tensors` make. Only shapes and dtypes are read, so `jax.ShapeDtypeStruct` will do.

    With `step` the arrays are those of one token, without T, and so are the shapes in messages.

    Raises:
      ConfigError: shapes, dtypes or options do not fit together; all mistakes are listed.
    """
    name = f"{op}_step" if step else op
    q, k, v = tensors.q, tensors.k, tensors.v
    values = value_heads(name, q, k, v, step=step)
    wrong: list[str] = []
    rows = q.shape[:-2]
    batch, length = rows[0], 1 if step else rows[1]
    heads, key_size = q.shape[-2:]
    value_size = v.shape[-1]
    if k.shape != q.shape:
        wrong.append(f"k has shape {list(k.shape)}; expected that of q, {list(q.shape)}")
    if v.shape[:-2] != rows:
        wrong.append(f"v has shape {list(v.shape)}; expected {'B' if step else 'B, T'} = {list(rows)} as in q")
    if not str(q.dtype) == str(k.dtype) == str(v.dtype):
        wrong.append(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype")
    if values % heads:
        wrong.append(f"v has {values} heads; expected a multiple of the {heads} heads of q and k")
    gate = (*rows, values)
    if decay != "none":
        shape = {"constant": (values,), "scalar": gate, "vector": (*gate, key_size)}[decay]
        wrong += wrong_array("decay" if decay == "constant" else "g", tensors.g, shape)
    if delta:
        wrong += wrong_array("beta", tensors.beta, gate)
    sequences, mistakes = _sequences(tensors, batch, length)
    wrong += mistakes
    if tensors.initial_state is not None:
        shape = (sequences or batch, values, key_size, value_size)
        wrong += wrong_array("state" if step else "initial_state", tensors.initial_state, shape)
    wrong += _wrong_options(scale, chunk_size)
    if wrong:
        raise refused(name, wrong)
    device = default_device()
    return Call(
        op=op,
        decay=decay,
        delta=delta,
        batch=batch,
        length=length,
        heads=heads,
        value_heads=values,
        key_size=key_size,
        value_size=value_size,
        dtype=str(q.dtype),
        scale=float(key_size**-0.5 if scale is None else scale),
        segmented=tensors.segment_ids is not None,
        sequences=sequences,
        stateful=tensors.initial_state is not None,
        output_final_state=bool(output_final_state),
        chunk_size=None if chunk_size is None else int(chunk_size),
        interpret=None if interpret is False else interpret,
        platform=device.platform,
        device=device_name(device.device_kind, device.platform),
        capability=str(getattr(device, "compute_capability", "")),
        devices=1 if _split_already(tensors) else jax.device_count(),
        varies=_varies(tensors),
    )


def _split_already(tensors: Tensors) -> bool:
    """Whether every axis of the mesh is in the hands of a `jax.shard_map`, with `check_vma=False`."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    if mesh.empty or any(kind != jax.sharding.AxisType.Manual and size > 1 for kind, size in axes):
        return False
    return not _varies(tensors)


def _varies(tensors: Tensors) -> bool:
    avals = (getattr(x, "aval", x) for x in tensors if x is not None)
    return any(getattr(getattr(aval, "manual_axis_type", None), "varying", None) for aval in avals)


def default_device() -> jax.Device:
    """The device of a computation that nothing places elsewhere: that of `jax.default_device`, if it is set, or the first one.

    Under a mesh it is the first one: there JAX does not ask `jax.default_device`.
    """
    chosen = jax.config.jax_default_device if jax.sharding.get_abstract_mesh().empty else None
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


def refused(op: str, wrong: list[str]) -> ConfigError:
    """The error that lists what is wrong with a call of `kernels.<op>`."""
    return ConfigError(f"kernels.{op} cannot run:" + "".join(f"\n  {sentence}" for sentence in wrong))


def _is_array(x: Any) -> bool:
    """Or a stand-in for one. Lists and Python numbers are none: what dtype they would get is a guess."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def wrong_array(name: str, array: Any, shape: tuple[int, ...], sizes: str = "") -> list[str]:
    """Sentences about what is wrong with a gate or a state of floating numbers; `sizes` names the dimensions of `shape`."""
    expected = f"{sizes} = {list(shape)}" if sizes else f"{list(shape)}"
    if array is None:
        return [f"{name} is missing; expected shape {expected}"]
    if not _is_array(array):
        return [f"{name} is a {type(array).__name__}; expected an array of shape {expected}"]
    wrong = []
    if tuple(array.shape) != shape:
        wrong.append(f"{name} has shape {list(array.shape)}; expected {expected}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        wrong.append(f"{name} has dtype {array.dtype}; expected a floating one")
    return wrong


def _wrong_options(scale: Any, chunk_size: Any) -> list[str]:
    wrong = []
    if scale is not None and (not isinstance(scale, numbers.Real) or isinstance(scale, bool)):
        wrong.append(f"scale is a {type(scale).__name__}; expected a Python number (multiply q by a learned scale)")
    elif scale is not None and not math.isfinite(scale):
        wrong.append(f"scale = {scale}; expected a finite number")
    # A bool is an int in Python, and a size is no bool.
    whole = isinstance(chunk_size, numbers.Integral) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (whole and 1 <= chunk_size <= LARGEST_CHUNK and chunk_size & (chunk_size - 1) == 0):
        wrong.append(f"chunk_size = {chunk_size!r}; expected a power of two of at most {LARGEST_CHUNK}")
    return wrong


def _sequences(tensors: Tensors, batch: int, length: int) -> tuple[int | None, list[str]]:
    """N of `cu_seqlens`, if there is one, and sentences about what is wrong with it or with `segment_ids`."""
    wrong, given = [], {}
    for name in ("segment_ids", "cu_seqlens"):
        array = getattr(tensors, name)
        if array is None:
            continue
        if not _is_array(array):
            wrong.append(f"{name} is a {type(array).__name__}; expected an array of integers")
        elif not jnp.issubdtype(array.dtype, jnp.integer):
            wrong.append(f"{name} has dtype {array.dtype}; expected an integer one")
        else:
            given[name] = array
    if tensors.segment_ids is not None and tensors.cu_seqlens is not None:
        wrong.append("segment_ids and cu_seqlens are two ways to say the same; give one")
    if "segment_ids" in given and tuple(given["segment_ids"].shape) != (batch, length):
        wrong.append(f"segment_ids has shape {list(given['segment_ids'].shape)}; expected B, T = {[batch, length]}")
    if "cu_seqlens" not in given:
        return None, wrong
    cu_seqlens = given["cu_seqlens"]
    if batch != 1:
        wrong.append(f"cu_seqlens needs the sequences packed into one row; q has B = {batch}")
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] < 2:
        return None, [*wrong, f"cu_seqlens has shape {list(cu_seqlens.shape)}; expected [N + 1] with N >= 1"]
    if not isinstance(cu_seqlens, jax.core.Tracer | jax.ShapeDtypeStruct):
        # Under a trace the numbers are not there to be read; then this is the caller's promise. The difference of two unsigned
        # numbers is never negative.
        offsets = np.asarray(cu_seqlens).astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != length or (np.diff(offsets) < 0).any():
            wrong.append(f"cu_seqlens = {offsets.tolist()}; expected 0 = first <= ... <= last = T = {length}")
    return cu_seqlens.shape[0] - 1, wrong
