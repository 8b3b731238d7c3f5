"""Blocks one after another: a scan over the stacked layers, or every layer written out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from models import options
from models.stack import Forward, Span, Stack, by_kind, by_layer, by_repeat

UNROLLED_ON_CPU = 16
"""Most layers that are written out on CPU when the config leaves it open.

A step that scans takes about 15 % longer on CPU than one written out (`benchmarks/step_speed.py`), and compiling grows with
the number of layers."""


class Sequential:
    """Run every executed layer once, in order."""

    def __init__(self, option: options.SequentialDepth):
        self.option = option

    def __call__(self, stack: Stack, h: jax.Array, forward: Forward, progress: Any = None) -> tuple[jax.Array, dict[str, Any]]:
        """The state before the stack -> the state after it, and what else the strategy gives (nothing here)."""
        del progress
        return run(stack, h, forward, unroll=self.option.unroll)[0], {}

    def step(self, stack: Stack, h: jax.Array, forward: Forward, caches: dict[Any, Any]) -> tuple[jax.Array, dict[Any, Any]]:
        """One decoding step of n tokens through all layers, with the cache of each kind."""
        return step(stack, h, forward, caches)


def run(
    stack: Stack,
    h: jax.Array,
    forward: Forward,
    *,
    first: int = 0,
    stop: int | None = None,
    unroll: bool | None = None,
    every: bool = False,
    hold: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Executed layers `first` to `stop` - 1 in order.

    Args:
      stack: the layers.
      h: the state before them.
      forward: what they read.
      first, stop: which layers; by default all.
      unroll: as the option.
      every: also return the state after each of these layers.
      hold: bool [B, T]; where it is True the state stays as it is, and only what other positions read of it is computed.

    Returns:
      The state after the last, and with `every` those after each, [layers, ...].
    """
    stop = len(stack) if stop is None else stop
    written_out = unroll if unroll is not None else jax.default_backend() == "cpu" and len(stack) <= UNROLLED_ON_CPU
    kept = []
    frozen = min(forward.cut, stop) if forward.cut >= first else first
    for part in ((first, frozen), (frozen, stop)):
        for span in stack.spans(*part):
            h, states = _run(stack, span, h, forward, written_out, every, hold)
            kept.append(states)
        if part[1] == frozen and forward.cut and forward.cut >= first:
            h = jax.lax.stop_gradient(h)
    return h, (jnp.concatenate(kept) if every and kept else None)


def _run(
    stack: Stack, span: Span, h: jax.Array, forward: Forward, written_out: bool, every: bool, hold: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    period = len(span.kinds)

    def body(h: jax.Array, repeat: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
        states, number = repeat
        kept = []
        for j, (kind, state) in enumerate(zip(span.kinds, by_layer(span, states), strict=True)):
            with jax.named_scope(kind):
                h = held(h, stack.block(kind, state)(h, forward.context(kind, number + j)), hold)
            kept.append(h)
        return h, (jnp.stack(kept) if every else None)

    body = forward.checkpointed(body, prevent_cse=written_out)
    numbers = span.layer + period * jnp.arange(span.repeats, dtype=jnp.int32)
    if not written_out:
        h, kept = jax.lax.scan(body, h, (by_repeat(span, stack.states(span)), numbers))
        return h, (kept.reshape(-1, *h.shape) if every else None)
    kept = []
    for repeat in range(span.repeats):
        h, states_after = body(h, (stack.states(span, repeat), numbers[repeat]))
        kept.append(states_after)
    return h, (jnp.concatenate(kept) if every else None)


def held(before: jax.Array, after: jax.Array, hold: jax.Array | None) -> jax.Array:
    """`after`, but `before` where `hold` [B, T] is True."""
    if hold is None:
        return after
    return jnp.where(hold.reshape(*hold.shape, *(1,) * (before.ndim - 2)), before, after)


def step(
    stack: Stack,
    h: jax.Array,
    forward: Forward,
    caches: dict[Any, Any],
    *,
    first: int = 0,
    stop: int | None = None,
    hold: jax.Array | bool | None = None,
) -> tuple[jax.Array, dict[Any, Any]]:
    """A decoding step through executed layers `first` to `stop` - 1.

    Args:
      stack, h, forward, first, stop: as in `run`, for n new tokens.
      caches: a cache of each kind, stacked over loops and layers.
      hold: as in `run`; True holds every position and only writes what the layers cache of it.

    Returns:
      The state after them and all caches.
    """
    caches = dict(caches)
    for span in stack.spans(first, len(stack) if stop is None else stop):
        rows = stack.rows(span)
        own = {kind: jax.tree.map(lambda x, at=at: x[at], caches[kind]) for kind, at in rows.items()}
        numbers = span.layer + len(span.kinds) * jnp.arange(span.repeats, dtype=jnp.int32)

        def body(h, repeat, span=span):
            states, caches, number = repeat
            new = []
            layers = zip(span.kinds, by_layer(span, states), by_layer(span, caches), strict=True)
            for j, (kind, state, cache) in enumerate(layers):
                out, updated = stack.block(kind, state).step(h, forward.context(kind, number + j), cache)
                h = h if hold is True else held(h, out, hold)
                new.append(updated)
            return h, by_kind(span, new)

        h, updated = jax.lax.scan(body, h, (by_repeat(span, stack.states(span)), by_repeat(span, own), numbers))
        for kind, new in updated.items():
            new = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), new)
            whole = rows[kind] == slice(0, stack.count(kind) * stack.loops)
            caches[kind] = (
                new if whole else jax.tree.map(lambda old, part, at=rows[kind]: old.at[at].set(part), caches[kind], new)
            )
    return h, caches
