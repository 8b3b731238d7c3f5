"""Decoding: tokens a second of `kernels.<op>_step` against softmax attention with a cache of keys and values.

    python -m benchmarks.decode                                   # every op; contexts of 1k, 8k and 64k tokens
    python -m benchmarks.decode --ops kda --contexts 1024 --batch 8

One layer's mixing alone, without projections: B rows, H heads, K = V. A contestant decodes `--tokens` tokens in one compiled
scan, its state or cache donated and so updated in place. Attention writes each token into its cache, which is full up to the
context, and looks at all of it; an op reads and writes a state whose size no context changes. Contestants alternate in short
segments, and the ratio of speeds is taken within each round.
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
    """`count` tokens of softmax attention, the last of `context` tokens: keys and values [B,H,L,K], products accumulated in
    float32.
    """
    cache = [jnp.swapaxes(x, 1, 2) for x in inputs("linear_attention", batch, context, heads, size, dtype, seed=1)[1:]]

    def step(cache: Carry, x: tuple[jax.Array, ...]) -> tuple[Carry, jax.Array]:
        q, k, v, at = x
        keys, values = (
            lax.dynamic_update_slice_in_dim(old, new[:, :, None], at, 2) for old, new in zip(cache, (k, v), strict=True)
        )
        scores = jnp.einsum("bhk,bhlk->bhl", q, keys, preferred_element_type=jnp.float32) * size**-0.5
        scores = jnp.where(jnp.arange(context) <= at, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        return [keys, values], jnp.einsum("bhl,bhlv->bhv", weights, values, preferred_element_type=jnp.float32).astype(dtype)

    tokens = (jnp.moveaxis(x, 1, 0) for x in inputs("linear_attention", batch, count, heads, size, dtype))
    return Decoder(step, cache, (*tokens, jnp.arange(context - count, context)))


def segment(decoder: Decoder, seconds: float) -> tuple[float, float | None]:
    """Tokens a second of every row over about `seconds`, and the cores that others used meanwhile."""
    neighbours, begin, cpu, count = Neighbours(), time.perf_counter(), time.process_time(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        decoder()
        count += 1
    wall = time.perf_counter() - begin
    return count * decoder.count / wall, neighbours.cores(wall, time.process_time() - cpu)


def race(decoders: dict[str, Decoder], rounds: int, seconds: float, patience: float) -> dict[str, dict[str, list[Any]]]:
    """Tokens a second and the cores of others, round by round; in each round every contestant has a segment."""
    for decoder in decoders.values():
        decoder()
    names, quiet = list(decoders), Patience(patience)
    found: dict[str, dict[str, list[Any]]] = {name: {"speed": [], "others": []} for name in names}
    for number in range(rounds):
        quiet.wait()
        for name in names if number % 2 else names[::-1]:
            speed, others = segment(decoders[name], seconds)
            found[name]["speed"].append(speed)
            found[name]["others"].append(others)
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
    shape = (options.batch, options.heads, options.size, options.dtype, options.tokens)
    softmax = {context: f"attention, {context}" for context in options.contexts}
    decoders = {name: attention(context, *shape) for context, name in softmax.items()}
    decoders |= {op: linear(op, *shape) for op in options.ops}
    raced = race(decoders, options.rounds, options.seconds, options.patience)
    results: dict[str, Any] = {}
    for name, decoder in decoders.items():
        over = {
            str(context): spread([a / b for a, b in zip(raced[name]["speed"], raced[other]["speed"], strict=True)])
            for context, other in softmax.items()
        }
        others = [x for x in raced[name]["others"] if x is not None]
        results[name] = {
            "tokens_per_second": spread(raced[name]["speed"]),
            "bytes": decoder.bytes,
            "speed_over_attention": over,
            "others_cores": spread(others or [0.0]),
        }
    rows = [
        [name, f"{x['tokens_per_second']['median']:.0f}", f"{x['bytes'] / 2**20:.2f}"]
        + [shown_ratio(ratio, 2) for ratio in x["speed_over_attention"].values()]
        for name, x in results.items()
    ]
    columns = ["", "tokens/s a row", "MiB kept", *(f"speed / {name}" for name in softmax.values())]
    title = f"decoding, B = {options.batch}, H = {options.heads}, K = V = {options.size}, {options.dtype}"
    show(title, columns, rows, ["median of ratios within a round [95 %]"])
    shown = {name: value for name, value in vars(options).items() if name not in ("out", "ops")}
    write_result("decode", {"options": shown, "contestants": results}, options.out)


if __name__ == "__main__":
    main()
