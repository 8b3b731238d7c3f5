"""Decoding: tokens a second of `kernels.<op>_step` against softmax attention with a cache of keys and values.

    python -m benchmarks.decode                                   # every op; contexts of 1k, 8k and 64k tokens
    python -m benchmarks.decode --ops kda --contexts 1024 --batch 8

One layer's mixing alone, without projections: B rows, H heads, K = V. A contestant decodes `--tokens` tokens in one compiled
scan, its state or cache donated and so updated in place. Attention writes each token into its cache, which is full up to the
context, and looks at all of it; an op reads and writes a state whose size no context changes. Contestants alternate in short
segments, and the ratio of speeds is taken within each round: of tokens a second, and of tokens a second of our own CPU time,
which other load on the machine disturbs less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import kernels
from benchmarks.measure import Neighbours, Patience, parser, show, shown_ratio, spread, write_result
from kernels.ops import GATES
from kernels.samples import inputs
from strata.cpu import tune_cpu
from trainer import command

Carry = Any
Step = Callable[[Carry, Any], tuple[Carry, jax.Array]]


class Decoder:
    """Decodes the same tokens again and again, on from the state that it has."""

    def __init__(self, step: Step, carry: Carry, tokens: Any):
        self.run = jax.jit(lambda carry, tokens: lax.scan(step, carry, tokens), donate_argnums=0)
        self.carry, self.tokens = carry, tokens
        self.count = jax.tree.leaves(tokens)[0].shape[0]
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(carry))

    def __call__(self) -> jax.Array:
        """The outputs [n,B,H,V] of all tokens."""
        self.carry, o = self.run(self.carry, self.tokens)
        return jax.block_until_ready(o)


def linear(op: str, batch: int, heads: int, size: int, dtype: str, count: int) -> Decoder:
    """`count` tokens of one of the ops."""
    x = inputs(op, batch, count, heads, size, dtype)
    state: Any = jnp.zeros((batch, heads, size, size), jnp.float32)
    if op == "lightnet":
        state = (state, jnp.zeros((batch, heads, size), jnp.float32))

    def step(state: Carry, x: tuple[jax.Array, ...]) -> tuple[Carry, jax.Array]:
        o, state = getattr(kernels, f"{op}_step")(*x, state)
        return state, o

    return Decoder(step, state, tuple(jnp.moveaxis(a, 1, 0) for a in x))


def attention(context: int, batch: int, heads: int, size: int, dtype: str, count: int) -> Decoder:
    """`count` tokens of softmax attention, the last of `context` tokens: keys and values [B,H,L,K], arithmetic in
    float32.
    """
    cache = [jnp.swapaxes(x, 1, 2) for x in inputs("linear_attention", batch, context, heads, size, dtype, seed=1)[1:]]

    def step(cache: Carry, x: tuple[jax.Array, ...]) -> tuple[Carry, jax.Array]:
        q, k, v, at = x
        keys, values = (
            lax.dynamic_update_slice_in_dim(old, new[:, :, None], at, 2) for old, new in zip(cache, (k, v), strict=True)
        )
        # Sums of products and no matrix products: with one query those read the cache no faster, and on a CPU XLA copies it
        # for them, which takes several times as long.
        scores = jnp.sum(keys.astype(jnp.float32) * q[:, :, None], axis=-1) * size**-0.5
        weights = jax.nn.softmax(jnp.where(jnp.arange(context) <= at, scores, -jnp.inf), axis=-1)
        return [keys, values], jnp.sum(values.astype(jnp.float32) * weights[..., None], axis=2).astype(dtype)

    tokens = (jnp.moveaxis(x, 1, 0) for x in inputs("linear_attention", batch, count, heads, size, dtype))
    return Decoder(step, cache, (*tokens, jnp.arange(context - count, context)))


def segment(decoder: Decoder, seconds: float) -> dict[str, float | None]:
    """Over about `seconds`: tokens of a row a second, the same a second of CPU time, and the cores that others used."""
    neighbours, begin, cpu, count = Neighbours(), time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        decoder()
        count += 1
    wall, own = time.perf_counter() - begin, time.process_time() - cpu
    tokens = count * decoder.count
    return {"speed": tokens / wall, "cpu_speed": tokens / max(own, 1e-6), "others": neighbours.cores(wall, own)}


def race(decoders: dict[str, Decoder], rounds: int, seconds: float, patience: float) -> dict[str, list[dict[str, Any]]]:
    """What `segment` gives, round by round; in each round every contestant has one."""
    for decoder in decoders.values():
        decoder()
    names, quiet = list(decoders), Patience(patience)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        quiet.wait()
        for name in names if number % 2 else names[::-1]:
            found[name].append(segment(decoders[name], seconds))
    return found


def summary(own: list[dict[str, Any]], softmax: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Speeds of one contestant, and over those of attention at every context within a round."""
    found: dict[str, Any] = {"others_cores": spread([x["others"] for x in own if x["others"] is not None] or [0.0])}
    for name, title in (("speed", "tokens_per_second"), ("cpu_speed", "tokens_per_cpu_second")):
        found[title] = spread([x[name] for x in own])
        found[f"{title}_over_attention"] = {
            str(context): spread([a[name] / b[name] for a, b in zip(own, other, strict=True)])
            for context, other in softmax.items()
        }
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--ops", nargs="+", choices=tuple(GATES), default=list(GATES))
    arguments.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 65536])
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--heads", type=int, default=8)
    arguments.add_argument("--size", type=int, default=64, help="K = V")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of q, k, v and the cache")
    arguments.add_argument("--tokens", type=int, default=16, help="decoded in one compiled call")
    arguments.add_argument("--rounds", type=int, default=16)
    arguments.add_argument("--seconds", type=float, default=0.3, help="length of a segment")
    options = arguments.parse_args(argv)
    tune_cpu()
    shape = (options.batch, options.heads, options.size, options.dtype, options.tokens)
    softmax = {context: f"attention, {context}" for context in options.contexts}
    decoders = {name: attention(context, *shape) for context, name in softmax.items()}
    decoders |= {op: linear(op, *shape) for op in options.ops}
    raced = race(decoders, options.rounds, options.seconds, options.patience)
    against = {context: raced[name] for context, name in softmax.items()}
    results = {name: {"bytes": x.bytes} | summary(raced[name], against) for name, x in decoders.items()}
    rows = [
        [
            name,
            f"{x['tokens_per_second']['median']:.0f}",
            f"{x['tokens_per_cpu_second']['median']:.0f}",
            f"{x['bytes'] / 2**20:.2f}",
        ]
        + [shown_ratio(ratio, 2) for ratio in x["tokens_per_cpu_second_over_attention"].values()]
        for name, x in results.items()
    ]
    columns = ["", "tokens/s", "tokens/CPU s", "MiB kept", *(f"CPU speed / {name}" for name in softmax.values())]
    title = f"decoding, B = {options.batch}, H = {options.heads}, K = V = {options.size}, {options.dtype}, tokens of a row"
    show(title, columns, rows, ["median of ratios within a round [95 %]"])
    shown = {name: value for name, value in vars(options).items() if name not in ("out", "ops")}
    write_result("decode", {"options": shown, "contestants": results}, options.out)


if __name__ == "__main__":
    command.run(main)
