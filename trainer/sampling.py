"""Drawing tokens from a model: prefill a cache with the prompts, then one token at a time, in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.construct import PRNG
from strata import ConfigError

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures between which logits stay finite in float32; 0 means what lies below."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None  # keep this many most likely tokens
    top_p: float | None = None  # keep the fewest most likely tokens whose probabilities reach this

    def __post_init__(self) -> None:
        if self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST:
            raise ConfigError(f"temperature = {self.temperature}: expected 0, or a number from {COLDEST:g} to {HOTTEST:g}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k}: expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: expected above 0, at most 1")


def draw(key: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw int32 [B] tokens from float32 logits [B, V]; among equal logits at a cut-off, all are kept."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, shaped(logits, sampling), axis=-1).astype(jnp.int32)


def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The distribution that `draw` draws from: float32 logits [B, V] -> [B, V]."""
    if sampling.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jax.nn.softmax(shaped(logits, sampling), axis=-1)


def shaped(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] over the temperature, and -inf for what `top_k` or `top_p` leave out."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        kept = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True)  # at least one: nothing comes before the first
        least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def generate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    banned: Sequence[int] = (),
    depth: Any = None,
) -> np.ndarray:
    """Continue prompts of any lengths together.

    Args:
      model: a `models.Transformer`.
      prompts: token ids, at least one each; shorter ones are padded on the left and do not see the padding.
      count: tokens to draw for each.
      sampling: how.
      seed: the same seed, prompts and settings give the same tokens.
      banned: ids that are never drawn.
      depth: another way to run the same weights.

    Returns:
      int32 [len(prompts), count].

    Raises:
      ConfigError: an empty prompt.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ConfigError("a prompt is empty: give at least one token, such as the separator that starts a document")
    longest = max(len(prompt) for prompt in prompts)
    padded = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    start = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    graph, state = nnx.split(model)
    run = jax.jit(functools.partial(_generate, graph, count, sampling, tuple(banned), depth))
    return np.asarray(run(state, jnp.asarray(padded), jnp.asarray(start), jax.random.key(seed, impl=PRNG)))


def never(vocab_size: int, banned: Sequence[int]) -> np.ndarray:
    """bool [1, V], True for ids that are never drawn."""
    blocked = np.zeros((1, vocab_size), bool)
    blocked[0, list(banned)] = True
    return blocked


def _generate(graph, count, sampling, banned, depth, state, prompts, start, key):
    model = nnx.merge(graph, state)
    batch, length = prompts.shape
    cache = model.init_cache(batch, length + count) | {"start": start}
    logits, cache = model.step(prompts, cache, depth=depth)
    blocked = never(model.vocab_size, banned)

    def one(carry, key):
        logits, cache = carry
        token = draw(key, jnp.where(blocked, -jnp.inf, logits), sampling)
        following, cache = model.step(token[:, None], cache, depth=depth)
        return (following[:, -1], cache), token

    _, tokens = jax.lax.scan(one, (logits[:, -1], cache), jax.random.split(key, count))
    return tokens.T
