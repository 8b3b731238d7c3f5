"""The nine ops. One signature: `op(q, k, v, *gates, *, options) -> (o, final_state)`.

Per batch row and value head, with state S [K,V], for every token in order:

    S <- decay * S;   S <- S + k write^T;   o = scale * q S          write = v, or beta (v - k^T S) for the delta rules

so a decay acts before the write and the output reads the updated state. Keys are used as given: normalise them outside.

Arrays: q, k [B,T,H,K]; v [B,T,HV,V] with HV a multiple of H (value head j reads query head j // (HV / H)); g natural
logarithm of the decay, at most 0, [B,T,HV] (one a head) or [B,T,HV,K] (one a channel); beta [B,T,HV]. q, k, v share a dtype:
bfloat16, float16, float32 or float64; gates may be any floating dtype. States and sums are float32, float64 when q is.

Options of every op:
  scale: factor of the output, a Python number; K**-0.5 unless given.
  initial_state: [B,HV,K,V], or [N,HV,K,V] with cu_seqlens; zero unless given. With segment_ids it belongs to the first
    segment of each row.
  output_final_state: return the state after the last token too; with segment_ids that of each row's last segment.
  segment_ids: int [B,T]; the state is reset wherever the number changes along a row.
  cu_seqlens: int [N+1], B = 1; sequence n is tokens cu_seqlens[n] .. cu_seqlens[n+1]-1 and has its own initial and final
    state. Starts at 0, ends at T; empty sequences are allowed and hand their initial state on.
  chunk_size: tokens the chunked back-ends take at once, a power of two; None lets the back-end choose.
  backend: "auto", "reference", "xla", "tpu" or "mosaic_gpu"; see `explain`.
  interpret: run a Pallas kernel interpreted (True, or the interpreter's parameters).

Returns (o [B,T,HV,V] in the dtype of v, final_state of initial_state's shape in float32 or float64; None unless asked for).

Raises `strata.ConfigError` when shapes, dtypes or options do not fit, or the back-end named cannot serve.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from kernels import decays, registry
from kernels.arguments import Call, Decay, Tensors, checked, refused, value_heads, wrong_array
from kernels.running import running_logsumexp
from kernels.varying import varying_alike
from strata.errors import ConfigError
from strata.resolve import nearest

State = jax.Array
GATES: dict[str, tuple[Decay, bool]] = {
    "linear_attention": ("none", False),
    "retention": ("constant", False),
    "lightning_attention": ("constant", False),
    "simple_gla": ("scalar", False),
    "gla": ("vector", False),
    "delta_rule": ("none", True),
    "gated_delta_rule": ("scalar", True),
    "kda": ("vector", True),
    "lightnet": ("vector", False),
}
"""op -> (kind of decay, whether it writes by the delta rule)."""


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, State | None]:
    """S <- S + k v^T. Katharopoulos et al. 2020, arXiv:2006.16236, without feature map and denominator."""
    tensors = Tensors(q, k, v, None, None, initial_state, segment_ids, cu_seqlens)
    return _run("linear_attention", tensors, scale, output_final_state, chunk_size, backend, interpret)


def retention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, State | None]:
    """S <- gamma_h S + k v^T. RetNet, Sun et al. 2023, arXiv:2307.08621.

    `decay` is log gamma [HV]; unless given it is log(1 - 2^(-5-h)), h counting value heads (`kernels.retention_decay`).
    """
    heads = value_heads("retention", q, k, v)
    g = decays.retention_decay(heads) if decay is None else decay
    tensors = Tensors(q, k, v, g, None, initial_state, segment_ids, cu_seqlens)
    return _run("retention", tensors, scale, output_final_state, chunk_size, backend, interpret)


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layer: int = 0,
    layers: int = 1,
    decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, State | None]:
    """S <- lambda_h S + k v^T. Lightning Attention-2, Qin et al. 2024, arXiv:2401.04658.

    `decay` is log lambda [HV]; unless given it is -(8/HV)(1 - layer/layers) h, `layer` counting from 0
    (`kernels.lightning_decay`).
    """
    heads = value_heads("lightning_attention", q, k, v)
    g = decays.lightning_decay(heads, layer, layers) if decay is None else decay
    tensors = Tensors(q, k, v, g, None, initial_state, segment_ids, cu_seqlens)
    return _run("lightning_attention", tensors, scale, output_final_state, chunk_size, backend, interpret)


def simple_gla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, State | None]:
    """S <- e^g S + k v^T with g [B,T,HV]: the core of Mamba-2, Dao and Gu 2024, arXiv:2405.21060."""
    tensors = Tensors(q, k, v, g, None, initial_state, segment_ids, cu_seqlens)
    return _run("simple_gla", tensors, scale, output_final_state, chunk_size, backend, interpret)


def gla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, State | None]:
    """S <- Diag(e^g) S + k v^T with g [B,T,HV,K]. Gated linear attention, Yang et al. 2023, arXiv:2312.06635."""
    tensors = Tensors(q, k, v, g, None, initial_state, segment_ids, cu_seqlens)
    return _run("gla", tensors, scale, output_final_state, chunk_size, backend, interpret)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, State | None]:
    """S <- S + k beta (v - k^T S)^T. DeltaNet, Yang et al. 2024, arXiv:2406.06484. Stable for |k| = 1 and 0 <= beta <= 2."""
    tensors = Tensors(q, k, v, None, beta, initial_state, segment_ids, cu_seqlens)
    return _run("delta_rule", tensors, scale, output_final_state, chunk_size, backend, interpret)


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, State | None]:
    """S <- e^g S, then S <- S + k beta (v - k^T S)^T, g [B,T,HV]. Gated DeltaNet, Yang et al. 2024, arXiv:2412.06464."""
    tensors = Tensors(q, k, v, g, beta, initial_state, segment_ids, cu_seqlens)
    return _run("gated_delta_rule", tensors, scale, output_final_state, chunk_size, backend, interpret)


def kda(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, State | None]:
    """S <- Diag(e^g) S, then S <- S + k beta (v - k^T S)^T, g [B,T,HV,K]. Kimi Delta Attention, 2025, arXiv:2510.26692."""
    tensors = Tensors(q, k, v, g, beta, initial_state, segment_ids, cu_seqlens)
    return _run("kda", tensors, scale, output_final_state, chunk_size, backend, interpret)


def lightnet(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    initial_state: tuple[State, State] | None = None,
    output_final_state: bool = False,
    segment_ids: jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, tuple[State, State] | None]:
    """S_t = sum_{s<=t} e^{k_s} v_s^T / sum_{s<=t} e^{k_s}, channel by channel. LightNet, Qin et al. 2024, arXiv:2405.21022.

    This is `gla` with keys e^{k_t - z_t} and decay z_{t-1} - z_t, z the running logsumexp of k. The state is the pair
    (S [B or N,HV,K,V], z [B or N,H,K]): an average and the logarithm of its weight. The empty state is S = 0, z = -inf.
    """
    call, tensors, weight = lightnet_call(
        Tensors(q, k, v, None, None, initial_state, segment_ids, cu_seqlens), scale, output_final_state, chunk_size, interpret
    )
    tensors = _arrays(tensors)
    keys = tensors.k.astype(call.accumulator)
    weight = None if weight is None else jnp.asarray(weight)
    before, after, last = running_logsumexp(keys, weight, tensors.segment_ids, tensors.cu_seqlens)
    # An empty past has no weight (-inf): what decays is then zero, and its gate must not be -inf - something in a gradient.
    g = jnp.where(before == -jnp.inf, -jnp.inf, jnp.where(before == -jnp.inf, 0.0, before) - after)
    # A key of -inf weighs nothing, even where nothing has weighed before it.
    none = keys == -jnp.inf
    tensors = tensors._replace(
        q=tensors.q.astype(call.accumulator),
        k=jnp.where(none, 0.0, jnp.exp(jnp.where(none, 0.0, keys - jnp.where(none, 0.0, after)))),
        v=tensors.v.astype(call.accumulator),
        g=jnp.repeat(g, call.group, axis=2),
    )
    o, final = _run("lightnet", tensors, call.scale, output_final_state, chunk_size, backend, interpret)
    return o.astype(v.dtype), (final, last) if output_final_state else None


def explain(op: str, q: Any, k: Any, v: Any, *, backend: str = "auto", **options: Any) -> registry.Choice:
    """Which back-end would serve a call, and why the others would not. Print it.

    Args:
      op: name of the op; q, k, v and `options` as the op takes them (`g=`, `beta=`, `segment_ids=` ...); arrays or
        `jax.ShapeDtypeStruct`.

    Raises:
      ConfigError: there is no such op or option, the call is wrong, or nothing can serve it.
    """
    return registry.choose(call_of(op, q, k, v, **options), backend)


def call_of(op: str, q: Any, k: Any, v: Any, **options: Any) -> Call:
    """What the registry and tuning tables are asked about a call; arguments and errors as in `explain`."""
    if op not in GATES:
        raise ConfigError(f"kernels.explain: there is no op {op!r}{nearest(op, list(GATES))} Ops: {', '.join(GATES)}")
    known = [name for name in inspect.signature(globals()[op]).parameters if name not in ("q", "k", "v", "backend")]
    # LightNet makes its g itself; who goes by `GATES` gives one all the same, and it is not read.
    known += ["g"] * (op == "lightnet")
    unknown = [f"\n  kernels.{op} has no option {name!r}{nearest(name, known)}" for name in options if name not in known]
    if unknown:
        raise ConfigError(f"kernels.explain:{''.join(unknown)}\n  Options: {', '.join(known)}")
    arrays = {name: options.get(name) for name in ("g", "beta", "initial_state", "segment_ids", "cu_seqlens")}
    if GATES[op][0] == "constant":
        heads = value_heads(op, q, k, v)
        layer = {name: options[name] for name in ("layer", "layers") if name in options}
        made = decays.retention_decay(heads) if op == "retention" else decays.lightning_decay(heads, **layer)
        arrays["g"] = made if options.get("decay") is None else options["decay"]
    static = [
        options.get("scale"),
        options.get("output_final_state", False),
        options.get("chunk_size"),
        options.get("interpret"),
    ]
    if op == "lightnet":
        return lightnet_call(Tensors(q, k, v, **arrays), *static)[0]
    return _call(op, Tensors(q, k, v, **arrays), *static)


def lightnet_call(
    tensors: Tensors,
    scale: float | None,
    output_final_state: bool,
    chunk_size: int | None,
    interpret: Any,
    *,
    step: bool = False,
) -> tuple[Call, Tensors, jax.Array | None]:
    """The call that LightNet runs, on wider arrays than it is given; its tensors, S for the initial state; and the initial z.

    Args:
      tensors: as given, initial_state being the pair. Shapes are checked before the running sum is taken, on a stand-in for the
        g that it will give.
      step: as in `checked`.

    Raises:
      ConfigError: something does not fit.
    """
    name = "lightnet_step" if step else "lightnet"
    heads = value_heads(name, tensors.q, tensors.k, tensors.v, step=step)
    pair = (None, None) if tensors.initial_state is None else tensors.initial_state
    if not isinstance(pair, tuple | list) or len(pair) != 2 or (pair[0] is None) != (pair[1] is None):
        what = "state" if step else "initial_state"
        raise refused(name, [f"{what} must be a pair of arrays (S [B or N, HV, K, V], z [B or N, H, K]), or None for no past"])
    state, weight = pair
    k = tensors.k
    g = jax.ShapeDtypeStruct((*k.shape[:-2], heads, k.shape[-1]), k.dtype)
    tensors = tensors._replace(initial_state=state)
    call = _call("lightnet", tensors._replace(g=g), scale, output_final_state, chunk_size, interpret, step=step)
    if weight is not None:
        shape = (call.state_shape[0], call.heads, call.key_size)
        wrong = wrong_array("z of the state" if step else "initial z", weight, shape, "[B or N, H, K]")
        if wrong:
            raise refused(name, wrong)
    return dataclasses.replace(call, dtype=str(call.accumulator)), tensors, weight


def _call(
    op: str,
    tensors: Tensors,
    scale: float | None,
    output_final_state: bool,
    chunk_size: int | None,
    interpret: Any,
    *,
    step: bool = False,
) -> Call:
    decay, delta = GATES[op]
    return checked(
        op,
        tensors,
        decay=decay,
        delta=delta,
        scale=scale,
        output_final_state=output_final_state,
        chunk_size=chunk_size,
        interpret=interpret,
        step=step,
    )


def _arrays(tensors: Tensors) -> Tensors:
    """JAX arrays, all varying over the axes of a `jax.shard_map` that one of them varies over."""
    arrays = Tensors(*(None if x is None else jnp.asarray(x) for x in tensors))
    if arrays.cu_seqlens is not None:  # offsets are subtracted, and compared with T: unsigned or short integers will not do
        arrays = arrays._replace(cu_seqlens=arrays.cu_seqlens.astype(jnp.int32))
    return varying_alike(arrays)


def _run(
    op: str,
    tensors: Tensors,
    scale: float | None,
    output_final_state: bool,
    chunk_size: int | None,
    backend: str,
    interpret: Any,
) -> tuple[jax.Array, State | None]:
    call = _call(op, tensors, scale, output_final_state, chunk_size, interpret)
    chosen = registry.choose(call, backend)
    arrays = _arrays(tensors)
    with jax.named_scope(f"{op}_{chosen.backend}"):
        o, final_state = registry.run(call, chosen.backend, arrays)
    return o, final_state if output_final_state else None
