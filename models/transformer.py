"""A decoder-only transformer: embedding, a stack run by a depth strategy, a head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import options, sharding
from models.layers.embedding import Embedding
from models.layers.linear import normal
from models.layers.norm import make_norm
from models.layers.parameter import parameter
from models.loss import softcap
from models.mixers.attention import Attention
from models.placements.placement import enter_stream, leave_stream
from models.stack import Forward, Kind, Stack, make_blocks, order
from strata import ConfigError, Problem, implementation, registry, resolve, to_tree


class Transformer(nnx.Module):
    """tokens -> logits, with the hidden state in between.

    By default the projections that write to the residual stream and the untied head start at zero, so that the initial loss
    is exactly ln(vocab) and every layer starts as the identity.
    """

    def __init__(self, model: options.Model, *, vocab_size: int, precision: str, remat: str, rngs: nnx.Rngs):
        self.options, self.vocab_size, self.remat = model, vocab_size, remat
        self.dtype = jnp.dtype(precision)
        # A tied table is also the head: with this and the factor in `output_kernel`, every logit starts at about 1 or below.
        std = model.embedding_std or (model.width**-0.5 if model.tie_embeddings else 1.0)
        self.embedding = Embedding(vocab_size, model.width, std=std, rngs=rngs)
        self.blocks = make_blocks(model, jax.random.split(rngs.params(), model.layers))
        self.final_norm = make_norm(model, "final", rngs=rngs) if model.placement.final_norm else None
        if model.tie_embeddings:
            self.head_kernel = None
        else:
            shape = (model.width, vocab_size)
            self.head_kernel = parameter(rngs, shape, normal(model.head_std), role="head", axes=("embed", "vocab"))
        self.embedding_norm = make_norm(model, "embedding", rngs=rngs) if model.placement.embedding_norm else None
        if self.embedding_norm is not None:
            # It acts before the first layer and is frozen with it, like the embedding.
            for _, variable in nnx.iter_graph(self.embedding_norm):
                if isinstance(variable, nnx.Param):
                    variable.set_metadata("positions", (0,))
        # A strategy that is a module has parameters of its own, such as a router's; others are made when they are asked for.
        strategy = implementation(model.depth)
        self.depth = strategy(model.depth, model, rngs=rngs) if _is_module(strategy) else None

    def __call__(self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, depth: Any = None) -> jax.Array:
        """int32 [B, T] -> float32 logits [B, T, vocab]; see `hidden` for the arguments."""
        return self.head(self.hidden(tokens, segment_ids=segment_ids, depth=depth)[0])

    def hidden(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        depth: Any = None,
        progress: Any = None,
        cut: int = 0,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The final normalised hidden state, and what else the depth strategy gives.

        Args:
          tokens: int32 [B, T].
          segment_ids: int32 [B, T]; positions attend only within their segment. None: one document a row.
          depth: another way to run the same weights, as a dict with a `name` or an options object of kind `model.depth`.
          progress: float32 [], the fraction of a training run that is done; None outside training, where nothing is
            regularised.
          cut: layers below this one are frozen: the backward pass stops there.

        Returns:
          [B, T, width] in the compute type, and a dict that may have `losses`, a dict of float32 scalars to add to the
          objective, and `exits`, a tuple of hidden states after earlier loops, each ready for the head.

        Raises:
          ConfigError: `tokens` or `segment_ids` have another shape or type, or `depth` is one that the weights cannot run.
        """
        _check_ids(tokens)
        if segment_ids is not None:
            _check_ids(segment_ids, "segment_ids", tokens.shape)
        e = self._embed(tokens) if not cut else jax.lax.stop_gradient(self._embed(tokens))
        stack = self.stack()
        shared = {kind: mixer.prepare(tokens.shape[1], segment_ids) for kind, mixer in stack.mixers.items()}
        forward = Forward(shared, e, self._read_out, self.remat, cut)
        h, extra = self._depth(depth)(stack, enter_stream(self.options, e), forward, progress)
        if "exits" in extra:
            extra = extra | {"exits": tuple(self._leave(exit) for exit in extra["exits"])}
        return sharding.constrain(self._leave(h), ("batch", None, None)), extra

    def stack(self) -> Stack:
        """The executed layers."""
        return Stack(self.blocks, order(self.options.plan()), self.options.depth.loops)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        e = sharding.constrain(self.embedding(tokens, self.dtype), ("batch", None, None))
        return e if self.embedding_norm is None else self.embedding_norm(e)

    def _leave(self, h: jax.Array) -> jax.Array:
        """The state after the last block, ready for the head."""
        h = leave_stream(self.options, h)
        return h if self.final_norm is None else self.final_norm(h)

    def _read_out(self, h: jax.Array) -> jax.Array:
        return self.head(self._leave(h))

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

        Raises:
          ConfigError: a mixer or the depth strategy, one of the user's own, only trains.
        """
        stack = self.stack()
        asked = [(type(mixer), ("init_cache", "prepare_step", "step")) for mixer in stack.mixers.values()]
        for part, methods in (*asked, (type(self._depth(None)), ("step",))):
            missing = [method for method in methods if not hasattr(part, method)]
            if missing:
                name = f"{part.__module__}.{part.__qualname__}"
                raise ConfigError(f"{name} has no {', '.join(missing)}, so that its model trains but does not generate")

        def empty(kind: Kind, mixer: Any) -> Any:
            layers = stack.count(kind) * stack.loops
            one = mixer.init_cache(batch, length, self.dtype)
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (layers, *leaf.shape)), one)

        layers = {kind: empty(kind, mixer) for kind, mixer in stack.mixers.items()}
        start = jnp.zeros((batch,), jnp.int32)
        return {"layers": layers, "index": jnp.zeros((), jnp.int32), "start": start}

    def step(self, tokens: jax.Array, cache: dict[str, Any], *, depth: Any = None) -> tuple[jax.Array, dict[str, Any]]:
        """Append int32 [B, n] tokens: float32 logits [B, n, vocab] and the cache with n more positions.

        The caller keeps within the cache's length: only a step that is longer than all of it is refused, since the number of
        tokens in the cache is traced under jit and cannot be checked here.

        Raises:
          ConfigError: `tokens` have another shape or type, or they are more sequences or positions than the cache has.
        """
        stack, index = self.stack(), cache["index"]
        _check_ids(tokens)
        # Of attention alone: a linear mixer's state has no length.
        keys = [cache["layers"][kind]["key"] for kind, mixer in stack.mixers.items() if isinstance(mixer, Attention)]
        batch, new, length = len(cache["start"]), tokens.shape[1], min((key.shape[2] for key in keys), default=None)
        if len(tokens) != batch or (length is not None and new > length):
            room = f"{batch} sequences" + ("" if length is None else f" of at most {length} tokens")
            raise ConfigError(f"tokens of shape {list(tokens.shape)} do not fit a cache for {room}")
        shared = {
            kind: mixer.prepare_step(tokens.shape[1], cache["layers"][kind], index, cache["start"])
            for kind, mixer in stack.mixers.items()
        }
        e = self._embed(tokens)
        forward = Forward(shared, e, self._read_out)
        h, layers = self._depth(depth).step(stack, enter_stream(self.options, e), forward, cache["layers"])
        return self._read_out(h), cache | {"layers": layers, "index": index + new}

    def _depth(self, depth: Any) -> Any:
        option = self.options.depth if depth is None else depth_options(depth, self.options)
        strategy = implementation(option)
        if not _is_module(strategy):
            return strategy(option)
        if self.depth is None or option != self.options.depth:
            raise ConfigError(f"depth.name = {option.name!r} has parameters of its own, so it runs only as it was trained")
        return self.depth


def _is_module(strategy: Any) -> bool:
    return isinstance(strategy, type) and issubclass(strategy, nnx.Module)


def _check_ids(ids: jax.Array, what: str = "tokens", shape: tuple[int, ...] | None = None) -> None:
    """Whether ids are whole numbers [B, T], and of this shape where one is given. Raises `ConfigError`."""
    if not hasattr(ids, "dtype") or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ConfigError(f"{what} are an array of whole numbers, not of {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.ndim != 2 or not ids.size or ids.shape != (shape or ids.shape):
        expected = f"the shape {list(shape)} of the tokens" if shape else "the shape [B, T], each at least 1"
        raise ConfigError(f"{what} have {expected}, not {list(ids.shape)}")


def depth_options(depth: Any, model: options.Model, where: str = "depth") -> Any:
    """A depth strategy's options for the weights of `model`, checked.

    Args:
      depth: a dict or `ConfigDict` with a `name`, or an options object of kind `model.depth`.
      model: how the weights were built.
      where: what messages call it, such as the flag it was given by.

    Raises:
      ConfigError: no such strategy, a field that is wrong, or weights that it cannot run.
    """
    depth = depth.to_dict() if hasattr(depth, "to_dict") else depth
    if getattr(type(depth), "kind", None) == "model.depth":
        depth = to_tree(depth)
    if not isinstance(depth, dict):
        raise ConfigError(f"{where} is a dict with a name, or options of kind model.depth, not {depth!r}")
    name = depth.get("name")
    if name not in registry.names("model.depth"):
        raise ConfigError(f"{where}.name = {name!r}: registered are {', '.join(registry.names('model.depth'))}")
    kind = registry.lookup("model.depth", name)
    fields = kind.request_defaults(model) | {key: value for key, value in depth.items() if key != "name"}
    option, found = resolve(kind, fields, where)
    problems = found.problems
    if not problems:
        asked = option.problems_as_request(model)
        problems = [Problem(f"{where}.{field}", message, getattr(option, field)) for field, message in asked]
    if problems:
        raise ConfigError(problems, where)
    return option
