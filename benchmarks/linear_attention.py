"""Linear attention: the chunked back-end against the recurrence, against jax-linear-attention, and against itself.

    python -m benchmarks.linear_attention                    # speed, cost by length
    python -m benchmarks.linear_attention --gpu_shapes --dtype bfloat16    # the four shapes of the comparison with fla
    python -m benchmarks.linear_attention --chunks 16 32 64  # which chunk size
    python -m benchmarks.linear_attention --spans --length 8192    # long rows in spans of chunks, and all chunks at once
    python -m benchmarks.linear_attention --inverse          # the study of triangular inversion: errors only
    python -m benchmarks.linear_attention --reflections      # errors where a delta rule is ill-conditioned, by length

Contestants run in one process in short alternating segments, forward and forward + backward (gradients of a sum of squares with
respect to all inputs). The ratio of times is taken within each round. The Pallas back-ends take part where they serve the call;
jax-linear-attention (`jla`; its chunked tier, on a GPU the tier it chooses; needs jax 0.11.2) and flash-linear-attention
(`fla`; needs torch with CUDA) where they are installed. On an H200 a table of floors follows: the time that memory traffic
alone and matrix products alone would take, as a part of the time measured, and the memory of the compiled program.

Targets on CPU at T = 2048, forward + backward: the recurrence takes at least 4 times as long; jla at least as long;
T = 8192 takes at most 4.6 times as long as T = 2048.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from benchmarks.linear_attention_errors import inversion, reflections
from benchmarks.measure import QUIET, Neighbours, Patience, parser, quiet_only, show, shown_ratio, spread, write_result
from kernels.ops import GATES
from kernels.samples import inputs
from kernels.xla import chunked
from strata.cpu import tune_cpu
from strata.errors import ConfigError
from trainer import command

Run = Callable[[tuple[Any, ...]], Any]
JLA = {
    "simple_gla": "simple_gla",
    "gla": "gla",
    "delta_rule": "deltanet",
    "gated_delta_rule": "gated_deltanet",
    "kda": "kda",
}
"""Ops that jax-linear-attention has, and its names for them."""
FLA = {
    "linear_attention": "linear_attn:chunk_linear_attn",
    "retention": "retention:chunk_retention",
    "simple_gla": "simple_gla:chunk_simple_gla",
    "gla": "gla:chunk_gla",
    "delta_rule": "delta_rule:chunk_delta_rule",
    "gated_delta_rule": "gated_delta_rule:chunk_gated_delta_rule",
    "kda": "kda:chunk_kda",
}
"""Ops that flash-linear-attention has in chunks: module and function below `fla.ops`."""
FLA_OPTIONS = {"linear_attention": {"normalize": False}}
"""What makes them the same function: fla divides by the sum of the weights unless told not to."""
PEERS = ("fla", "jla")
GPU_SHAPES = ((8, 4096, 16, 128), (2, 16384, 16, 128), (1, 8192, 96, 128), (4, 2048, 16, 128))
"""(B, T, H, K = V)"""
PEAKS = {"NVIDIA H200": (4.3e12, 790e12)}
"""Bytes and bfloat16 operations a second that a device reaches in practice."""


def contestants(op: str, x: tuple[Any, ...], options: Any) -> dict[str, Callable[..., Any]]:
    """What is timed on the inputs x, by name; `xla` is first."""

    def ours(**options: Any) -> Callable[..., Any]:
        return lambda *x: getattr(kernels, op)(*x, **options)[0]

    found = {"xla": ours(backend="xla")}
    if options.chunks:
        return found | {f"chunks of {size}": ours(backend="xla", chunk_size=size) for size in options.chunks}
    if options.spans:
        return found | {"all at once": all_at_once(found["xla"])}
    if not options.gpu_shapes:
        found["recurrence"] = ours(backend="reference")
    for backend in ("tpu", "mosaic_gpu"):
        try:
            kernels.explain(op, *x[:3], **dict(zip(gate_names(op), x[3:], strict=True)), backend=backend)
        except ConfigError:
            continue
        found[backend] = ours(backend=backend)
    if op in JLA and importlib.util.find_spec("jla"):
        run, gates = importlib.import_module("jla.ops").linear_attention, gate_names(op)
        # Its own choice on a GPU: a Hopper kernel where it has one.
        options = {"impl": "auto" if jax.default_backend() == "gpu" else "chunked"}
        found["jla"] = lambda q, k, v, *g: run(JLA[op], q, k, v, **options, **dict(zip(gates, g, strict=True)))[0]
    return found


def all_at_once(f: Callable[..., Any]) -> Callable[..., Any]:
    """f traced without spans of chunks."""

    def traced(*x: Any) -> Any:
        with mock.patch.object(chunked, "spans_of", lambda call, size: 1):
            return f(*x)

    return traced


def gate_names(op: str) -> tuple[str, ...]:
    """Of the gates that `inputs` gives, in order."""
    decay, delta = GATES[op]
    return ("g",) * (decay in ("scalar", "vector") and op != "lightnet") + ("beta",) * delta


def fla_forms(op: str, x: tuple[Any, ...], dtype: str) -> dict[str, tuple[Run, tuple[Any, ...]]]:
    """The runs of `timed_forms` by flash-linear-attention and what they run on; empty where it cannot take part."""
    if op not in FLA or not (importlib.util.find_spec("fla") and importlib.util.find_spec("torch")):
        return {}
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {}
    module, _, name = FLA[op].partition(":")
    chosen, names = getattr(importlib.import_module(f"fla.ops.{module}"), name), ("q", "k", "v", *gate_names(op))
    run = functools.partial(chosen, **FLA_OPTIONS.get(op, {}))
    wide = [torch.from_numpy(np.array(value, np.float32)).cuda() for value in x]
    given = [value.to(getattr(torch, dtype)) if i < 3 else value for i, value in enumerate(wide)]
    learned = [value.detach().requires_grad_() for value in given]

    def forward(x: tuple[Any, ...]) -> None:
        with torch.no_grad():
            run(**dict(zip(names, x, strict=True)))
        torch.cuda.synchronize()

    def both(x: tuple[Any, ...]) -> None:
        o = run(**dict(zip(names, x, strict=True)))[0]
        torch.autograd.grad(o.square().sum(), x)
        torch.cuda.synchronize()

    return {"forward": (forward, tuple(given)), "forward+backward": (both, tuple(learned))}


def floors(op: str, shape: tuple[int, int, int, int], dtype: str, form: str) -> tuple[float, float]:
    """Bytes that must move and floating-point operations of dense products in chunks of 64: (B, T, H, K = V).

    Forward reads q, k, v and gates and writes o; backward reads them and do and writes their gradients. Gates are float32. The
    backward pass multiplies 7/3 as much as the forward pass, of delta rules 2.55 times.
    """
    batch, length, heads, size = shape
    decay, delta = GATES[op]
    tokens, chunk, width = batch * length * heads, 64, jnp.dtype(dtype).itemsize
    gate = 4 * ({"scalar": 1, "vector": size}.get(decay, 0) + delta)
    moved, products = 4 * size * width + gate, 2 * chunk * size + 2 * size * size
    if delta:
        products += 2 * chunk * size + size * size + 2 * chunk * chunk
    if form == "forward+backward":
        moved += 7 * size * width + 2 * gate
        products *= 1 + (2.55 if delta else 7 / 3)
    return float(tokens * moved), float(2 * tokens * products)


def program_memory(run: Run, x: tuple[Any, ...]) -> int | None:
    """Bytes of the arguments, the results and the temporary buffers of a compiled run; None where XLA does not say."""
    found = run.lower(x).compile().memory_analysis()
    if found is None:
        return None
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


def add_floors(rows: dict[str, Any], op: str, shape: tuple[int, int, int, int], dtype: str, form: str) -> None:
    """Into every row of a race: floors as a part of its time, where the peaks of the device are known."""
    peaks = PEAKS.get(jax.devices()[0].device_kind)
    if peaks is None:
        return
    shown = []
    for name, row in rows.items():
        seconds = row["milliseconds"]["median"] / 1e3
        parts = [need / peak / seconds for need, peak in zip(floors(op, shape, dtype, form), peaks, strict=True)]
        row |= dict(zip(("memory_floor_over_time", "tensor_floor_over_time"), parts, strict=True))
        memory = row.get("program_bytes")
        shown.append([name, *(f"{100 * part:.1f} %" for part in parts), f"{memory / 2**30:.2f}" if memory else "not known"])
    show(f"{op}, {form}, floors", ["", "memory floor", "tensor floor", "GiB"], shown)


def timed_forms(f: Callable[..., Any]) -> dict[str, Run]:
    """Compiled forward and forward + backward of o = f(*inputs)."""
    objective = lambda x: jnp.sum(jnp.square(f(*x)))  # noqa: E731
    return {"forward": jax.jit(lambda x: f(*x)), "forward+backward": jax.jit(jax.value_and_grad(objective))}


def segment(run: Run, x: tuple[Any, ...], seconds: float) -> dict[str, float | None]:
    """Milliseconds a call over about `seconds`, CPU milliseconds, and the cores that others used meanwhile."""
    neighbours, begin, cpu, count = Neighbours(), time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        jax.block_until_ready(run(x))
        count += 1
    wall, own = time.perf_counter() - begin, time.process_time() - cpu
    return {"ms": 1e3 * wall / count, "cpu_ms": 1e3 * own / count, "others": neighbours.cores(wall, own)}


def race(runs: dict[str, tuple[Run, tuple[Any, ...]]], rounds: int, seconds: float, patience: float) -> dict[str, Any]:
    """Alternate the runs; times of each and the ratio to the first, and to peers that take part, round by round."""
    for run, x in runs.values():
        jax.block_until_ready(run(x))
    names, quiet = list(runs), Patience(patience)
    found: dict[str, list[dict[str, float | None]]] = {name: [] for name in names}
    for i in range(rounds):
        quiet.wait()
        for name in names if i % 2 else names[::-1]:
            found[name].append(segment(*runs[name], seconds))
    rows = {}
    for name in names:
        over = {
            other: [a["ms"] / b["ms"] for a, b in zip(found[name], found[other], strict=True)]
            for other in names
            if other in (names[0], *PEERS)
        }
        ratios = over[names[0]]
        own = [a["cpu_ms"] / b["cpu_ms"] for a, b in zip(found[name], found[names[0]], strict=True)]
        both = zip(found[name], found[names[0]], strict=True)
        busy = [None if a["others"] is None or b["others"] is None else max(a["others"], b["others"]) for a, b in both]
        still = quiet_only(ratios, busy)
        rows[name] = {
            "milliseconds": spread([x["ms"] for x in found[name]]),
            "cpu_milliseconds": spread([x["cpu_ms"] for x in found[name]]),
            "time_over_first": spread(ratios),
            "cpu_time_over_first": spread(own),
            "time_over_first_quiet": spread(still) if still else None,
            "others_cores": spread([x["others"] for x in found[name] if x["others"] is not None] or [0.0]),
        } | {f"time_over_{other}": spread(over[other]) for other in PEERS if other in over}
    return rows


def speed(op: str, shape: tuple[int, int, int, int], options: Any) -> dict[str, Any]:
    """One op at (B, T, H, K = V): all contestants, then T against 4 T of the chunked back-end."""
    x = inputs(op, *shape, dtype=options.dtype)
    alone = bool(options.chunks or options.spans)
    forms = {name: timed_forms(f) for name, f in contestants(op, x, options).items()}
    others = {} if alone else fla_forms(op, x, options.dtype)
    found: dict[str, Any] = {"op": op, "shape": shape}
    for form in ("forward", "forward+backward"):
        runs = {name: (made[form], x) for name, made in forms.items()}
        runs |= {"fla": others[form]} if others else {}
        found[form] = race(runs, options.rounds, options.seconds, options.patience)
        for name, made_by in forms.items():
            found[form][name]["program_bytes"] = program_memory(made_by[form], x)
        report(f"{op}, {form}, {options.dtype}, (B, T, H, K = V) = {shape}", found[form])
        add_floors(found[form], op, shape, options.dtype, form)
    if not alone and not options.gpu_shapes:
        longer = inputs(op, options.batch, 4 * options.length, options.heads, options.size, dtype=options.dtype)
        run = forms["xla"]["forward+backward"]
        runs = {f"T = {options.length}": (run, x), f"T = {4 * options.length}": (run, longer)}
        found["by_length"] = race(runs, options.rounds, options.seconds, options.patience)
        report(f"{op}, forward+backward, cost by length", found["by_length"])
    return found


def report(title: str, rows: dict[str, Any]) -> None:
    """Print the table of one race."""
    shown = []
    for name, row in rows.items():
        quiet = row["time_over_first_quiet"]
        shown.append(
            [
                name,
                f"{row['milliseconds']['median']:.1f}",
                f"{row['cpu_milliseconds']['median']:.1f}",
                shown_ratio(row["time_over_first"]),
                shown_ratio(row["cpu_time_over_first"]),
                f"{shown_ratio(quiet)} n={quiet['count']}" if quiet else "none",
                f"{row['others_cores']['median']:.2f}",
            ]
        )
    first = next(iter(rows))
    columns = ["", "ms", "CPU ms", f"time / {first}", f"CPU time / {first}", "time, quiet rounds", "others"]
    show(title, columns, shown, [f"median [95 %]; others: cores used elsewhere; quiet: at most {QUIET}."])


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--ops", nargs="+", choices=GATES, default=list(GATES))
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--length", type=int, default=2048)
    arguments.add_argument("--heads", type=int, default=4)
    arguments.add_argument("--size", type=int, default=64, help="K = V")
    arguments.add_argument("--gpu_shapes", action="store_true", help=f"{GPU_SHAPES} instead, without recurrence and 4 T")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of q, k and v")
    arguments.add_argument("--rounds", type=int, default=16, help="segments of every contestant")
    arguments.add_argument("--seconds", type=float, default=0.5, help="length of a segment")
    arguments.add_argument("--chunks", type=int, nargs="+", default=[], help="compare these chunk sizes, nothing else")
    arguments.add_argument("--spans", action="store_true", help="compare spans of chunks with all at once, nothing else")
    arguments.add_argument("--inverse", action="store_true", help="errors of triangular inversion, nothing else")
    arguments.add_argument("--reflections", action="store_true", help="errors with one key and beta = 2, nothing else")
    arguments.add_argument("--seeds", type=int, default=8, help="with --inverse or --reflections: draws of each kind")
    options = arguments.parse_args(argv)
    if options.inverse:
        found = {"seeds": options.seeds, "errors": inversion([64, 128], options.seeds)}
        write_result("triangular_inverse", found, options.out)
        return
    if options.reflections:
        found = {"seeds": options.seeds, "errors": reflections([65, 200, 512, 2048], options.seeds)}
        write_result("reflections", found, options.out)
        return
    tune_cpu()
    jla = importlib.metadata.version("jax-linear-attention") if importlib.util.find_spec("jla") else None
    if jla is None and not options.chunks and not options.spans:
        print("jax-linear-attention is not installed and was not measured: pip install jax-linear-attention (jax 0.11.2)")
    shown = {
        name: value for name, value in vars(options).items() if name not in ("out", "ops", "inverse", "reflections", "seeds")
    }
    shapes = GPU_SHAPES if options.gpu_shapes else ((options.batch, options.length, options.heads, options.size),)
    results = [speed(op, shape, options) for op in options.ops for shape in shapes]
    kind = "_chunks" if options.chunks else "_spans" if options.spans else ""
    title = f"linear_attention{kind}-jax-{jax.__version__}"
    installed = {"flash-linear-attention": "fla", "torch": "torch", "triton": "triton"}
    peers = {name: importlib.metadata.version(name) for name, module in installed.items() if importlib.util.find_spec(module)}
    write_result(title, {"options": shown, "jla": jla, "peers": peers, "ops": results}, options.out)


if __name__ == "__main__":
    command.run(main)
