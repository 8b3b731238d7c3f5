"""The forward pass of a model with everything a diagnostic looks at, layer by layer under `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.block import Block
from models.placements.placement import Context, enter_stream, leave_stream
from models.stack import Forward, Kind, Stack, by_layer, by_repeat
from models.transformer import Transformer


class Branch(NamedTuple):
    """What a part of a layer adds to the stream, against what the stream is without it; float32 [B, T] each.

    The part's update is the state with it less the state with its result set to zero. For pre-norm that is what it adds.
    Where a norm follows the sum it is the difference that the part makes behind the norm.
    """

    update: jax.Array  # length of the update
    base: jax.Array  # length of the state without it
    dot: jax.Array  # inner product of the two


class Taps(NamedTuple):
    """A forward pass through N executed layers, streams summed."""

    states: jax.Array  # [N + 1, B, T, width], before each layer and after the last
    mixer_inputs: jax.Array  # [N, B, T, width], what each mixer read
    mixer: Branch  # [N, B, T]
    ffn: Branch
    layer: Branch  # both sub-layers together


def begin(model: Transformer, batch: dict[str, jax.Array]) -> tuple[Stack, jax.Array, Forward]:
    """The executed layers of a model, the state before the first, and what they read, as `Transformer.hidden` makes them."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    embedded = model.embedding(tokens, model.dtype)
    if model.embedding_norm is not None:
        embedded = model.embedding_norm(embedded)
    stack = model.stack()
    shared = {kind: mixer.prepare(tokens.shape[1], segment_ids) for kind, mixer in stack.mixers.items()}
    forward = Forward(shared, embedded, lambda h: read_out(model, leave_stream(model.options, h)))
    return stack, enter_stream(model.options, embedded), forward


def read_out(model: Transformer, state: jax.Array) -> jax.Array:
    """A state (streams summed) [B, T, width] -> float32 logits [B, T, vocab]."""
    return model.head(state if model.final_norm is None else model.final_norm(state))


def kinds_of(path: str) -> tuple[Kind, str]:
    """The kind of block that a parameter's dotted path belongs to, and its path within the block."""
    _, kind, site = path.split(".", 2)
    return kind, site


def in_block(path: str) -> bool:
    """Whether a parameter's dotted path is inside the stack."""
    return path.startswith("blocks.")


def tapped(
    model: Transformer, stack: Stack, h: jax.Array, forward: Forward, added: jax.Array | None = None
) -> tuple[jax.Array, Taps]:
    """Runs every layer once.

    Args:
      model, stack, h, forward: as `begin` gives.
      added: [N + 1, *h.shape], to the state before each layer and to the last: zeros, whose gradient is the state's. None:
        nothing.

    Returns:
      The last state, with its streams, and the taps.
    """

    def layer(block: Block, h: jax.Array, context: Context, more: jax.Array | None) -> tuple[jax.Array, Any]:
        h = h if more is None else h + more
        out, seen = taps_of(block, h, context)

        def plain(x: jax.Array) -> jax.Array:
            return leave_stream(model.options, x).astype(jnp.float32)

        branches = [
            branch(plain(after) - plain(before), plain(before))
            for after, before in ((seen["middle"], seen["no mixer"]), (out, seen["no ffn"]), (out, seen["neither"]))
        ]
        return out, (plain(h), seen["input"], *branches)

    h, (states, inputs, mixer, ffn, both) = scan_layers(stack, h, forward, layer, None if added is None else added[:-1])
    h = h if added is None else h + added[-1]
    last = leave_stream(model.options, h).astype(jnp.float32)
    return h, Taps(jnp.concatenate([states, last[None]]), inputs, mixer, ffn, both)


def skipped(model: Transformer, stack: Stack, h: jax.Array, forward: Forward, keep: jax.Array) -> jax.Array:
    """The states [N + 1, B, T, width] of a pass in which a layer without `keep` (bool [N]) leaves the state as it is."""

    def layer(block: Block, h: jax.Array, context: Context, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(kept, block(h, context), h), leave_stream(model.options, h).astype(jnp.float32)

    h, states = scan_layers(stack, h, forward, layer, keep)
    return jnp.concatenate([states, leave_stream(model.options, h).astype(jnp.float32)[None]])


def taps_of(block: Block, h: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The state after a block and those inside it, with and without its parts; each sub-layer is computed once."""
    seen: dict[str, jax.Array] = {}

    def mix(x: jax.Array) -> jax.Array:
        seen["input"] = x
        seen["mixed"] = block.mixer(x, context.shared)
        return seen["mixed"]

    halves = block.placement.halves
    seen["middle"], out = halves(h, mix, block.ffn, context)
    seen["no mixer"], seen["neither"] = halves(h, jnp.zeros_like, jnp.zeros_like, context)
    seen["no ffn"] = halves(h, lambda _: seen["mixed"], jnp.zeros_like, context)[1]
    return out, seen


def branch(update: jax.Array, base: jax.Array) -> Branch:
    """The lengths and the inner product of an update and the state that it joins, [..., width] float32."""

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=-1)

    return Branch(jnp.sqrt(dot(update, update)), jnp.sqrt(dot(base, base)), dot(update, base))


def scan_layers(
    stack: Stack,
    h: jax.Array,
    forward: Forward,
    layer: Callable[[Block, jax.Array, Context, Any], tuple[jax.Array, Any]],
    inputs: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """`layer` for every executed layer in order, compiled once a pattern of blocks.

    Args:
      stack, h, forward: as `begin` gives.
      layer: `(block, state, context, its input) -> (state, result)`; results are equal in shape for all layers.
      inputs: [N, ...], one a layer; None: each is None.

    Returns:
      The last state, and the results stacked, [N, ...].
    """
    found = []
    for span in stack.spans(0, len(stack)):
        count, period = span.repeats, len(span.kinds)
        numbers = span.layer + period * jnp.arange(count, dtype=jnp.int32)
        mine = None
        if inputs is not None:
            mine = inputs[span.layer : span.layer + count * period].reshape(count, period, *inputs.shape[1:])

        def body(h: jax.Array, each: Any, span: Any = span) -> tuple[jax.Array, Any]:
            states, number, mine = each
            results = []
            for j, (kind, state) in enumerate(zip(span.kinds, by_layer(span, states), strict=True)):
                h, result = layer(
                    stack.block(kind, state), h, forward.context(kind, number + j), None if mine is None else mine[j]
                )
                results.append(result)
            return h, jax.tree.map(lambda *parts: jnp.stack(parts), *results)

        h, results = jax.lax.scan(body, h, (by_repeat(span, stack.states(span)), numbers, mine))
        found.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results))
    return h, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
