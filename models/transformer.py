"""A decoder-only transformer: embedding, a stack run by a depth strategy, a head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import options, sharding
from models.block import Block
from models.layers.embedding import Embedding
from models.layers.parameter import parameter
from models.loss import softcap
from models.stack import Segment
from strata import ConfigError, implementation, registry, resolve


class Transformer(nnx.Module):
    """tokens -> logits, with the hidden state in between.

    The projections that write to the residual stream and the untied head start at zero, so that the initial loss is
    exactly ln(vocab) and every layer starts as the identity.
    """

    def __init__(self, model: options.Model, *, vocab_size: int, precision: str, remat: str, rngs: nnx.Rngs):
        self.options, self.vocab_size, self.remat = model, vocab_size, remat
        self.dtype = jnp.dtype(precision)
        # A tied table is also the head: with this and the factor in `output_kernel`, every logit starts at about 1 or below.
        std = model.width**-0.5 if model.tie_embeddings else 1.0
        self.embedding = Embedding(vocab_size, model.width, std=std, rngs=rngs)
        keys = jax.random.split(rngs.params(), model.layers).reshape(model.layers, 1)
        self.segments = nnx.Dict({"segment0": Segment([lambda rngs: Block(model, rngs=rngs)], keys)})
        self.final_norm = implementation(model.norm)(model.norm, model.width, rngs=rngs)
        if model.tie_embeddings:
            self.head_kernel = None
        else:
            shape, zeros = (model.width, vocab_size), nnx.initializers.zeros
            self.head_kernel = parameter(rngs, shape, zeros, role="head", axes=("embed", "vocab"))

    def __call__(self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, depth: Any = None) -> jax.Array:
        """int32 [B, T] -> float32 logits [B, T, vocab]; see `hidden` for the arguments."""
        return self.head(self.hidden(tokens, segment_ids=segment_ids, depth=depth)[0])

    def hidden(
        self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, depth: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The final normalised hidden state, and auxiliary losses by name (none for a sequential stack).

        Args:
          tokens: int32 [B, T].
          segment_ids: int32 [B, T]; positions attend only within their segment. None: one document a row.
          depth: another way to run the same weights, as a dict with a `name` or an options object of kind `model.depth`.

        Returns:
          [B, T, width] in the compute type, and a dict of float32 scalars.
        """
        h = sharding.constrain(self.embedding(tokens, self.dtype), ("batch", None, None))
        segments = list(self.segments.values())
        shared = [segment.prepare(tokens.shape[1], segment_ids) for segment in segments]
        h = self._depth(depth)(segments, h, shared, self.remat)
        return sharding.constrain(self.final_norm(h), ("batch", None, None)), {}

    def head(self, h: jax.Array) -> jax.Array:
        """[B, T, width] -> float32 logits [B, T, vocab]. Training uses `models.cross_entropy`, which never holds them all."""
        kernel = self.output_kernel().astype(h.dtype)
        return softcap(jnp.dot(h, kernel, preferred_element_type=jnp.float32), self.options.logit_softcap)

    def output_kernel(self) -> jax.Array:
        """The float32 matrix [width, vocab] of the head.

        A tied model's is its table, transposed and times width**-0.5 (as in T5, arXiv:1910.10683): while all layers are the
        identity, the final hidden state is parallel to the token's own row, whose logit would otherwise be sqrt(width).
        """
        if self.head_kernel is not None:
            return self.head_kernel[...]
        return self.embedding.table[...].T * self.options.width**-0.5

    def init_cache(self, batch: int, length: int) -> dict[str, Any]:
        """An empty cache for `batch` sequences of at most `length` tokens.

        `start` may be set to int32 [batch]: the first position of each sequence, for prompts padded on the left.
        """
        segments = {name: segment.init_cache(batch, length, self.dtype) for name, segment in self.segments.items()}
        return {"segments": segments, "index": jnp.zeros((), jnp.int32), "start": jnp.zeros((batch,), jnp.int32)}

    def step(self, tokens: jax.Array, cache: dict[str, Any], *, depth: Any = None) -> tuple[jax.Array, dict[str, Any]]:
        """Append int32 [B, n] tokens: float32 logits [B, n, vocab] and the cache with n more positions.

        The caller keeps within the cache's length: a traced index cannot be checked here.
        """
        segments = list(self.segments.values())
        capacity = jax.tree.leaves(cache["segments"])[0].shape[2]
        shared = [segment.prepare_step(tokens.shape[1], capacity, cache["index"], cache["start"]) for segment in segments]
        caches = list(cache["segments"].values())
        h, caches = self._depth(depth).step(segments, self.embedding(tokens, self.dtype), shared, caches)
        updated = dict(zip(cache["segments"], caches, strict=True))
        logits = self.head(self.final_norm(h))
        return logits, cache | {"segments": updated, "index": cache["index"] + tokens.shape[1]}

    def _depth(self, depth: Any) -> Any:
        option = self.options.depth if depth is None else depth_options(depth)
        return implementation(option)(option)


def depth_options(depth: Any) -> Any:
    """A depth strategy's options from a dict or `ConfigDict` with a `name`, or as they are. Raises `ConfigError`."""
    if getattr(type(depth), "kind", None) == "model.depth":
        return depth
    depth = depth.to_dict() if hasattr(depth, "to_dict") else depth
    if not isinstance(depth, dict):
        raise ConfigError(f"depth is a dict with a name, or options of kind model.depth, not {depth!r}")
    name = depth.get("name")
    if name not in registry.names("model.depth"):
        raise ConfigError(f"depth.name = {name!r}: registered are {', '.join(registry.names('model.depth'))}")
    fields = {key: value for key, value in depth.items() if key != "name"}
    option, found = resolve(registry.lookup("model.depth", name), fields, "depth")
    if found.problems:
        raise ConfigError(found.problems)
    return option
