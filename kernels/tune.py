"""Measure which chunk size is the fastest on this device, and keep it in its tuning table (`kernels.tuning`).

    python -m kernels.tune --machine "two cores of an AMD EPYC (Zen 3, AVX2)"
    python -m kernels.tune --ops gla kda --sizes 64 128 --lengths 2048 --rounds 9

Timed is forward + backward, gradients of a sum of squares with respect to all inputs. Candidates alternate with the default in
short segments, and each is judged by the ratio of the times within a round. Another size than the default is taken only when
the upper quartile of its ratio is below `LARGEST_RATIO`: a smaller gain is noise, or not worth other rounding. The entry says
what was measured, also where the default stays.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kernels
from kernels import ops, registry, tuning
from kernels.arguments import Call, default_device
from kernels.ops import GATES
from kernels.samples import inputs
from strata.cpu import tune_cpu
from strata.errors import ConfigError

LARGEST_RATIO = 0.97
FAR = 1.3
"""A candidate that takes this many times as long as the best one in a first try is not tried again."""


LEAST_ROUNDS = 2
"""For an upper quartile."""


def run_of(op: str, backend: str, chunk_size: int) -> Callable[[tuple[jax.Array, ...]], Any]:
    """Compiled forward + backward."""

    def objective(x: tuple[jax.Array, ...]) -> jax.Array:
        o, _ = getattr(kernels, op)(*x, backend=backend, chunk_size=chunk_size)
        return jnp.sum(jnp.square(o.astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(objective))


def seconds_a_call(run: Callable[[Any], Any], x: Any, seconds: float) -> float:
    """Mean over about `seconds`, at least one call."""
    begin, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        jax.block_until_ready(run(x))
        count += 1
    return (time.perf_counter() - begin) / count


def compare(runs: dict[int, Callable[[Any], Any]], default: int, x: Any, rounds: int, seconds: float) -> dict[int, list[float]]:
    """Chunk size -> its time over that of the default, round by round; those far behind in a first try have one round."""
    for run in runs.values():
        jax.block_until_ready(run(x))
    first = {size: seconds_a_call(run, x, seconds) for size, run in runs.items()}
    near = [size for size in runs if size == default or first[size] <= FAR * min(first.values())]
    ratios = {size: [first[size] / first[default]] for size in runs if size not in near} | {size: [] for size in near}
    for number in range(rounds):
        order = near if number % 2 else near[::-1]
        times = {size: seconds_a_call(runs[size], x, seconds) for size in order}
        for size in near:
            ratios[size].append(times[size] / times[default])
    return ratios


def best(ratios: dict[int, list[float]], default: int) -> int:
    """The chunk size with the smallest median ratio, if its upper quartile is small enough; else the default."""
    tried = {size: found for size, found in ratios.items() if len(found) > 1}
    size = min(tried, key=lambda size: statistics.median(tried[size]))
    upper = statistics.quantiles(tried[size], n=4, method="inclusive")[2]
    return size if size != default and upper < LARGEST_RATIO else default


def call_of(op: str, x: tuple[jax.Array, ...]) -> Call:
    """The call that `inputs` make, without a chunk size."""
    q, k, v, *gates = x
    names = ("g", "beta") if len(gates) == 2 else ("beta",) if GATES[op][1] else ("g",)
    return ops.call_of(op, q, k, v, **dict(zip(names, gates, strict=False)))


def tune(op: str, backend: str, dtype: str, shape: tuple[int, int, int, int], options: Any) -> dict[str, Any]:
    """One entry, measured on the shape (B, T, H, K = V)."""
    x = inputs(op, *shape, dtype=dtype)
    call = registry.converted(call_of(op, x), backend)
    default, (least, most) = tuning.DEFAULTS[backend](call), tuning.LEGAL[backend]
    sizes = sorted({default, *(size for size in options.chunks if least <= size <= most)})
    ratios = compare({size: run_of(op, backend, size) for size in sizes}, default, x, options.rounds, options.seconds)
    medians = {str(size): round(statistics.median(found), 3) for size, found in ratios.items()}
    measured = {
        "shape": dict(zip(("batch", "length", "heads", "size"), shape, strict=True)),
        "time_over_default": medians,
        "default": default,
        "rounds": options.rounds,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }
    key = dict(zip(tuning.KEY, tuning.key_of(call, backend), strict=True))
    return key | {"chunk_size": best(ratios, default), "measured": measured}


def write(path: Path, machine: str | None, device: str, entries: list[dict[str, Any]]) -> None:
    """Put entries into a table; others of it stay.

    Raises:
      ConfigError: the table that is there is malformed.
    """
    table = tuning.Table(path, device, {})
    if path.exists():
        _, table, wrong = tuning.read(path)
        if wrong:
            raise ConfigError(f"{path}: " + "; ".join(wrong))
    kept = table.entries | {tuple(entry[name] for name in tuning.KEY): entry for entry in entries}
    text = {"device": device, "machine": machine or table.machine, "entries": [kept[key] for key in sorted(kept)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line an entry, so that a change of one shows as one.
    lines = ",\n  ".join(json.dumps(entry) for entry in text["entries"])
    head = json.dumps({name: text[name] for name in ("device", "machine")}, indent=1)[:-2]
    path.write_text(f'{head},\n "entries": [\n  {lines}\n ]\n}}\n')
    tuning.tables.cache_clear()


def _power_of_two(text: str) -> int:
    number = int(text)
    if number < 1 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"{number} is not a power of two")
    return number


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def main(argv: list[str] | None = None) -> None:
    """Measure and write, entry by entry."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--backend", choices=("xla", "tpu"), default="xla", help="mosaic_gpu takes one chunk size only")
    made.add_argument("--ops", nargs="+", choices=tuple(GATES), default=list(GATES))
    made.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    made.add_argument("--sizes", nargs="+", type=_whole, default=[64], help="K = V")
    made.add_argument("--lengths", nargs="+", type=_whole, default=[512, 2048])
    made.add_argument("--batch", type=_whole, default=1)
    made.add_argument("--heads", type=_whole, default=8)
    made.add_argument(
        "--chunks", nargs="+", type=_power_of_two, default=[16, 32, 64, 128], help="candidates besides the default"
    )
    made.add_argument("--rounds", type=int, default=7, help=f"at least {LEAST_ROUNDS}")
    made.add_argument("--seconds", type=_seconds, default=0.3, help="of a segment")
    made.add_argument("--machine", help="the device in words; kept from the table unless given")
    made.add_argument("--out", type=Path, default=tuning.TABLES, help="directory of the tables")
    options = made.parse_args(argv)
    if options.rounds < LEAST_ROUNDS:
        made.error(f"--rounds {options.rounds}: expected at least {LEAST_ROUNDS}")
    tune_cpu()
    device = default_device()
    name = tuning.device_name(device.device_kind, device.platform)
    path = options.out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    measure = functools.partial(tune, backend=options.backend, options=options)
    for op in options.ops:
        for dtype in options.dtypes:
            for size in options.sizes:
                for length in options.lengths:
                    entry = measure(op, dtype=dtype, shape=(options.batch, length, options.heads, size))
                    write(path, options.machine, name, [entry])
                    ratios = ", ".join(f"{size}: {x}" for size, x in entry["measured"]["time_over_default"].items())
                    print(f"{op} {dtype} K = V = {size}, T = {length}: chunks of {entry['chunk_size']} ({ratios})", flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
