"""How far one layer-parallel sweep is from the sequential states: the loss that trains a model to be run in parallel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.depth.sequential import run
from models.depth.suffix import Suffix
from models.stack import Forward, Stack


def sweep_error(strategy: Any, stack: Stack, h: jax.Array, forward: Forward) -> tuple[jax.Array, jax.Array]:
    """Run the stack in order, and compare one sweep over each suffix with the states of that run.

        sum over suffixes n and compared layers p of    mean over tokens |sweep_p - state_p| / max(|state_p|, 1e-6)

    A sum, as in the released code: more suffixes or a smaller stride weigh more. The sweep is of single layers and starts from
    the state before the suffix, through which gradients flow. The first layer of a suffix is exact after one sweep. Its term is
    0 and is left out, which changes no value: computed, it is rounding, whose direction has a gradient of full size where the
    states are held.

    Args:
      strategy: a `LayerParallel`; its options name suffixes, stride, form and whether the states are held.
      stack, h, forward: as there.

    Returns:
      The state after the stack, and the error (float32 scalar).
    """
    option = strategy.option
    plain = type(strategy)(dataclasses.replace(option, fused=1, start="prefix"))
    suffixes = sorted(set(option.suffixes or (option.layers,)), reverse=True)
    first = len(stack) - suffixes[0]
    before, _ = run(stack, h, forward, stop=first, unroll=option.unroll)
    after, states = run(stack, before, forward, first=first, unroll=option.unroll, every=True)
    error = jnp.zeros((), jnp.float32)
    for count in suffixes:
        compares = positions(count, option.stride)
        if not compares:
            continue
        own = states[suffixes[0] - count :]
        entered = before if count == suffixes[0] else states[suffixes[0] - count - 1]
        suffix = Suffix(stack, len(stack) - count, forward)
        if option.compares_last_block:
            block, context = suffix.one(count - 1)
            compared = [(block(entered, context), own[-1])]
        else:
            swept = plain.sweeps(suffix, entered, sweeps=1)
            compared = [(swept[p], own[p]) for p in compares]
        for estimate, state in compared:
            error += _relative(estimate, jax.lax.stop_gradient(state) if option.detach else state)
    return after, error


def positions(count: int, stride: int) -> list[int]:
    """Indices in a suffix of `count` layers that are compared: every `stride`-th and the last; 0: the last alone.

    Never the first, which is exact: a suffix of one layer compares none.
    """
    wanted = {p for p in range(count) if stride and (p + 1) % stride == 0} | {count - 1}
    return sorted(wanted - {0})


def _relative(estimate: jax.Array, state: jax.Array) -> jax.Array:
    estimate, state = estimate.astype(jnp.float32), state.astype(jnp.float32)
    # A root has no gradient at 0, where a sweep is exact or a state is of zeros: both sums of squares stay above it.
    moved = jnp.sqrt(jnp.sum(jnp.square(estimate - state), axis=-1) + 1e-20)
    size = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(state), axis=-1), 1e-12))
    return jnp.mean(moved / size)
