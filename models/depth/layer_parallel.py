"""Layer-parallel execution: the last blocks all at once, corrected along depth (Han et al. 2026, SNLP, arXiv:2605.17842)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import options
from models.depth import corrections
from models.depth.regularizer import sweep_error
from models.depth.sequential import run, step
from models.depth.suffix import Suffix
from models.stack import Forward, Stack

Parts = tuple[jax.Array, tuple[jax.Array, jax.Array]]
"""Results [N, ...] and what carries a state past each sub-layer (`Placement.transports`)."""


class Layers(NamedTuple):
    """The layers (or chunks) of a suffix as functions, in a whole forward pass or in a decoding step."""

    every: Callable[[jax.Array], Parts]  # inputs [N, ...] -> all of them at once
    one: Callable[[int, jax.Array], jax.Array]  # (j, input) -> the result of single layer j, twice differentiable


class LayerParallel:
    """A sequential prefix, then sweeps over the suffix.

    Masks and positions are those of the sequential stack in every layer, so that as many sweeps as layers give exactly its
    result. (The released evaluator drops the sliding windows in its parallel paths, and does not converge to its model.)
    """

    def __init__(self, option: options.LayerParallelDepth):
        self.option = option

    def __call__(self, stack: Stack, h: jax.Array, forward: Forward, progress: Any = None) -> tuple[jax.Array, dict[str, Any]]:
        """The state before the stack -> the state after it; while training with a regulariser, also `losses`.

        Args:
          stack, h, forward: as in `Sequential`.
          progress: float32 [], the fraction of the run that is done; None outside training, where nothing is regularised.
        """
        option = self.option
        if option.forward == "sequential":
            if not option.regularizer or progress is None:
                return run(stack, h, forward, unroll=option.unroll)[0], {}
            h, error = sweep_error(self, stack, h, forward)
            ramp = jnp.minimum(1.0, progress / option.ramp) if option.ramp else 1.0
            return h, {"losses": {"layer_parallel": option.regularizer * ramp * error}}
        first = len(stack) - option.layers
        h, _ = run(stack, h, forward, stop=first, unroll=option.unroll)
        suffix = Suffix(stack, first, forward)
        return self.sweeps(suffix, h)[-1], {}

    def sweeps(self, suffix: Suffix, h: jax.Array, sweeps: int | None = None) -> jax.Array:
        """States after every layer (or chunk of layers) of the suffix, [N, ...], from the state before it.

        Args:
          suffix: the layers.
          h: the exact state before them.
          sweeps: how many; None: those of the options.
        """
        return self._sweeps(self.layers(suffix), h, len(suffix), sweeps)

    def _sweeps(self, layers: Layers, h: jax.Array, count: int, sweeps: int | None = None) -> jax.Array:
        option = self.option
        start = jnp.broadcast_to(h[None], (count // option.fused, *h.shape))
        states = layers.every(start)[0] if option.start == "batched" else start
        for _ in range(option.sweeps if sweeps is None else sweeps):
            states = self.sweep(layers, h, states)
        return states

    def sweep(self, layers: Layers, h: jax.Array, states: jax.Array) -> jax.Array:
        """One sweep: estimates of the states after every layer, [N, ...] -> better ones; `h` is the state before them."""
        option = self.option
        inputs = jnp.concatenate([h[None], states[:-1]])
        results, transports = layers.every(inputs)
        if option.correction == "none":
            return results
        if option.correction == "identity":
            return corrections.identity(results, inputs)
        if option.correction == "damped":
            return corrections.damped(results, inputs, option.damping)
        if option.correction == "scaled":
            return corrections.scaled(results, inputs, transports[1] * transports[0])
        if option.correction == "hcn":
            return corrections.hyper_connected(results, inputs, jnp.matmul(transports[1], transports[0], precision="highest"))
        if option.correction == "diagonal":
            # One sign vector for all layers, as in the released code, and for all tokens: where a token stands in an array,
            # packed, padded or alone in a decoding step, must not change what becomes of it. The probe moves all tokens of a
            # call, so that the slope has what earlier ones do in it.
            key = jax.random.key(0, impl="threefry2x32")
            signs = jax.random.rademacher(key, inputs.shape[3:], jnp.float32)[None, None, None]
            probed = corrections.probed(inputs, signs, option.probe_length(inputs.dtype))
            return corrections.diagonal(results, inputs, layers.every(probed)[0], probed, option.probe_limit)
        return corrections.exact(layers.one, results, inputs)

    def layers(self, suffix: Suffix) -> Layers:
        """The layers of a suffix in a whole forward pass."""

        def one(position: int, h: jax.Array) -> jax.Array:
            block, context = suffix.one(position)
            if hasattr(block.mixer, "differentiate_twice"):
                block.mixer.differentiate_twice()
            return block(h, context)

        return Layers(lambda inputs: self._parts(suffix, inputs), one)

    def _parts(self, suffix: Suffix, inputs: jax.Array) -> Parts:
        if self.option.fused > 1:
            return fused(suffix, inputs, self.option.fused)[0]

        def layer(block: Any, context: Any, h: jax.Array) -> Parts:
            middle, out = block.halves(h, context)
            return out, block.placement.transports(h, middle, context) if self._needs_transports else ()

        return suffix.map(layer, inputs)

    @property
    def _needs_transports(self) -> bool:
        return self.option.correction in ("scaled", "hcn")

    def step(self, stack: Stack, h: jax.Array, forward: Forward, caches: dict[Any, Any]) -> tuple[jax.Array, dict[Any, Any]]:
        """One decoding step. What the suffix caches of new tokens comes from the corrected inputs, after the sweeps."""
        option = self.option
        if option.forward == "sequential":
            return step(stack, h, forward, caches)
        first = len(stack) - option.layers
        h, caches = step(stack, h, forward, caches, stop=first)
        suffix = Suffix(stack, first, forward)

        def layer(block: Any, context: Any, h: jax.Array, cache: Any) -> Any:
            middle, out, new = block.step_halves(h, context, cache)
            return (out, block.placement.transports(h, middle, context) if self._needs_transports else ()), new

        def evaluated(inputs: jax.Array) -> tuple[Parts, dict[Any, Any]]:
            if option.fused > 1:
                return fused(suffix, inputs, option.fused, caches)
            return suffix.map_cached(layer, caches, inputs)

        def one(position: int, h: jax.Array) -> jax.Array:
            block, context = suffix.one(position)
            return block.step(h, context, suffix.cache(position, caches))[0]

        states = self._sweeps(Layers(lambda inputs: evaluated(inputs)[0], one), h, len(suffix))
        _, new = evaluated(jnp.concatenate([h[None], states[:-1]]))
        return states[-1], suffix.write(caches, new)


def fused(
    suffix: Suffix, inputs: jax.Array, size: int, caches: dict[Any, Any] | None = None
) -> tuple[Parts, dict[Any, Any] | None]:
    """Chunks of `size` layers as one wide block each: all mixers read the chunk's input, all feed-forward layers what the
    mixers together made of it.

        m = mean residual of the mixers + sum of their updates        out = mean residual of the others + sum of theirs

    A network of its own: many sweeps converge to the chain of wide blocks, not to the stack.

    Args:
      suffix: the layers, `size` a divisor of their number.
      inputs: one state a chunk, [chunks, ...].
      size: layers in a chunk.
      caches: of every kind, for a decoding step.

    Returns:
      Results of the chunks with the means over each chunk of what carries a state past its sub-layers; and the caches of the
      suffix by kind after the step.
    """

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, size, axis=0)

    def chunked(x: jax.Array) -> jax.Array:
        return x.reshape(-1, size, *x.shape[1:])

    def mean(x: jax.Array) -> jax.Array:
        return jnp.mean(chunked(x).astype(jnp.float32), axis=1)

    def total(residual: jax.Array, update: jax.Array) -> jax.Array:
        return (mean(residual) + jnp.sum(chunked(update).astype(jnp.float32), axis=1)).astype(inputs.dtype)

    def mixer(block: Any, context: Any, h: jax.Array, *cache: Any) -> Any:
        new = []

        def mix(x: jax.Array) -> jax.Array:
            if not cache:
                return block.mixer(x, context.shared)
            out, updated = block.mixer.step(x, context.shared, *cache)
            new.append(updated)
            return out

        found = block.placement.mixer_residual(h), block.placement.mixer_update(h, mix, context)
        return (found, new[0]) if cache else found

    def ffn(block: Any, context: Any, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        return block.placement.ffn_residual(h), block.placement.ffn_update(h, block.ffn, context)

    def carried(block: Any, context: Any, h: jax.Array, middle: jax.Array) -> tuple[jax.Array, jax.Array]:
        return block.placement.transports(h, middle, context)

    entered = mean(suffix.map(lambda block, context, h: block.placement.enter(h, context), spread(inputs)))
    entered = entered.astype(inputs.dtype)
    new = None
    if caches is None:
        middle = total(*suffix.map(mixer, spread(entered)))
    else:
        mixed, new = suffix.map_cached(mixer, caches, spread(entered))
        middle = total(*mixed)
    out = total(*suffix.map(ffn, spread(middle)))
    return (out, jax.tree.map(mean, suffix.map(carried, spread(inputs), spread(middle)))), new
