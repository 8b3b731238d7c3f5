"""Self-speculative decoding: one way to run the weights drafts tokens and another checks them, whose distribution it is.

Leviathan et al. 2023 (arXiv:2211.17192), with the model's own layer-parallel sweeps as the draft (SNLP, arXiv:2605.17842).
"""

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
from models.transformer import depth_options
from strata import ConfigError
from trainer.sampling import Sampling, draw, never, probabilities


@dataclasses.dataclass
class Drafts:
    """How drafting went, without tokens beyond those that were asked for."""

    rounds: int = 0
    drafted: int = 0  # tokens
    accepted: int = 0  # of them


def accept(key: jax.Array, drafted: jax.Array, draft: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keep a draft as far as it goes and draw the token after it, such that every token has the target's distribution.

    Token i is kept with probability min(1, target_i / draft_i); at the first that is not, one is drawn from
    max(0, target_i - draft_i) instead, and after a whole draft from the target's next distribution.

    Args:
      key: PRNG key.
      drafted: int32 [b], drawn one after another from the rows of `draft`.
      draft: float32 [b, V], distributions that were drawn from.
      target: float32 [b + 1, V], those wanted after the same tokens.

    Returns:
      int32 [], tokens of the draft that are kept, and int32 [], the token after them.
    """
    keep, fresh = jax.random.split(key)
    count = drafted.shape[0]
    rows = jnp.arange(count)
    # u * draft <= target, not u <= target / draft: a drawn token has a draft probability above 0, but it may be tiny.
    kept = jax.random.uniform(keep, (count,)) * draft[rows, drafted] < target[rows, drafted]
    length = jnp.sum(jnp.cumprod(kept.astype(jnp.int32)))
    unused = jnp.concatenate([draft, jnp.zeros_like(draft[:1])])[length]
    left = jnp.maximum(target[length] - unused, 0.0)
    return length, jax.random.categorical(fresh, jnp.log(left)).astype(jnp.int32)


def speculate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    draft: Any,
    drafts: int = 4,
    depth: Any = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    banned: Sequence[int] = (),
) -> tuple[np.ndarray, Drafts]:
    """Continue prompts, one after another; as `trainer.sampling.generate`, and distributed as with that.

    Args:
      model, prompts, count, sampling, seed, banned: as there.
      draft: the depth strategy that drafts.
      drafts: tokens of a draft.
      depth: the one that checks, None: the model's own. Drafts start from its cache, so they read exact keys and values.

    Returns:
      int32 [len(prompts), count], and how drafting went.

    Raises:
      ConfigError: an empty prompt, a draft of no token, or a checker that does not give n tokens at once the distributions
        that it gives them one after another (layer-parallel sweeps that are too few to be exact).
    """
    if drafts < 1:
        raise ConfigError(f"a draft has at least one token, not {drafts}")
    if not all(len(prompt) for prompt in prompts):
        raise ConfigError("a prompt is empty: give at least one token, such as the separator that starts a document")
    checker = model.options.depth if depth is None else depth_options(depth, model.options)
    if not checker.one_by_one:
        raise ConfigError(
            f"drafts cannot be checked by {checker.name} with sweeps too few to be exact: it gives several tokens at once "
            'other probabilities than one after another. Check them in order, with --depth \'{"name": "sequential"}\''
        )
    graph, state = nnx.split(model)
    rewinds = all(getattr(block.mixer, "rewinds", False) for block in model.blocks.values())
    static = (graph, tuple(banned), sampling, draft, depth)
    begin = jax.jit(functools.partial(_begin, *static, count + drafts + 1))
    go_on = jax.jit(functools.partial(_round, *static, drafts, rewinds), donate_argnums=1)
    seen, found = Drafts(), []
    for number, prompt in enumerate(prompts):
        key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), number)
        cache, last = begin(state, jnp.asarray(prompt, jnp.int32)[None], jax.random.fold_in(key, 0))
        out = [int(last)]
        while len(out) < count:
            cache, drafted, length, last = go_on(state, cache, last, jax.random.fold_in(key, seen.rounds + 1))
            asked = min(drafts, count - len(out))
            out += [*np.asarray(drafted)[: int(length)].tolist(), int(last)]
            seen.rounds += 1
            seen.drafted += asked
            seen.accepted += min(int(length), asked)
        found.append(out[:count])
    return np.array(found, np.int32).reshape(len(prompts), count), seen


def _begin(graph, banned, sampling, draft, depth, room, state, prompt, key):
    """A cache that holds the prompt, and the first token after it, which the cache does not hold yet."""
    del draft
    model = nnx.merge(graph, state)
    logits, cache = model.step(prompt, model.init_cache(1, prompt.shape[1] + room), depth=depth)
    return cache, draw(key, jnp.where(never(model.vocab_size, banned), -jnp.inf, logits[:, -1]), sampling)[0]


def _round(graph, banned, sampling, draft, depth, drafts, rewinds, state, cache, last, key):
    """One draft and its check: the cache with all kept tokens but the newest, the draft, how many are kept, the newest."""
    model = nnx.merge(graph, state)
    blocked = never(model.vocab_size, banned)
    keys = jax.random.split(key, drafts + 1)

    def one(carry, key):
        token, cache = carry
        logits, cache = model.step(token[None, None], cache, depth=draft)
        logits = jnp.where(blocked, -jnp.inf, logits[:, -1])
        token = draw(key, logits, sampling)[0]
        return (token, cache), (token, probabilities(logits, sampling)[0])

    _, (drafted, given) = jax.lax.scan(one, (last, cache), keys[:drafts])
    tokens = jnp.concatenate([last[None], drafted])
    logits, after = model.step(tokens[None], cache, depth=depth)
    length, newest = accept(keys[-1], drafted, given, probabilities(jnp.where(blocked, -jnp.inf, logits[0]), sampling))
    if rewinds:
        after = after | {"index": cache["index"] + 1 + length}
    else:
        # A recurrent state cannot be taken back: it is made again from the one before, token by token, so that one program
        # serves however many were kept.
        def again(i: jax.Array, cache: Any) -> Any:
            return model.step(tokens[i][None, None], cache, depth=depth)[1]

        after = jax.lax.fori_loop(0, length + 1, again, cache)
    return after, drafted, length, newest
