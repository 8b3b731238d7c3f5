"""Making a model, always under jit, so that its bits do not depend on how or where it is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from models import options
from models.sharding import partition
from models.transformer import Transformer
from strata import ConfigError, resolve, to_tree
from strata.values import Mismatch, plain

PRNG = "threefry2x32"
"""Whatever JAX_DEFAULT_PRNG_IMPL says: a seed stands for the same parameters everywhere."""


def build(
    model_config: Any,
    *,
    vocab_size: int,
    seed: int,
    precision: str = "float32",
    remat: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Transformer:
    """A freshly initialised model.

    Args:
      model_config: a `models.options.Model`, or a dict or `ConfigDict` with its fields.
      vocab_size: number of token ids.
      seed: of the initial parameters.
      precision: `"float32"` or `"bfloat16"`, the compute type of the blocks; parameters are float32.
      remat: None or `"none"`, `"dots"`, `"full"`; what the backward pass recomputes.
      mesh: parameters are born sharded over it; None puts them on the default device. The bits are the same.

    Raises:
      ConfigError: the config is wrong, with every mistake listed; or another argument is.
    """
    make = _maker(model_config, vocab_size, precision, remat)
    model = _abstract(make)

    # The key is made inside: an argument placed on one device would clash with a mesh that lacks it.
    def initial() -> Any:
        return nnx.to_pure_dict(nnx.state(make(jax.random.key(seed, impl=PRNG))))

    out = parameter_shardings(model, mesh) if mesh is not None else None
    return nnx.merge(nnx.graphdef(model), nnx.State(jax.jit(initial, out_shardings=out)()))


def abstract(model_config: Any, *, vocab_size: int, precision: str = "float32", remat: str | None = None) -> Transformer:
    """A model of `jax.ShapeDtypeStruct`s: its roles, axes and shapes, at no cost. Raises as `build`."""
    return _abstract(_maker(model_config, vocab_size, precision, remat))


def parameter_shardings(model: nnx.Module, mesh: jax.sharding.Mesh) -> Any:
    """A `NamedSharding` for every parameter by its axes, as a nested dict."""
    flat = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        axes, shape = variable.get_metadata()["axes"], variable.shape
        flat[path] = jax.sharding.NamedSharding(mesh, partition(axes, shape, mesh))
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def resolve_model(model_config: Any) -> options.Model:
    """A checked `models.options.Model`. Raises `ConfigError` with every mistake."""
    try:
        # An options object made by hand has not been checked: it is read back like any other config.
        tree = to_tree(model_config) if isinstance(model_config, options.Model) else plain(model_config)
    except Mismatch as mismatch:
        raise ConfigError(f"a model config holds plain values: {mismatch}") from None
    if not isinstance(tree, Mapping):
        raise ConfigError(f"a model config is a dict with fields, not {type(model_config).__name__}")
    model, found = resolve(options.Model, tree, "model")
    if found.problems:
        raise ConfigError(found.problems)
    return model


def _maker(model_config: Any, vocab_size: int, precision: str, remat: str | None):
    model = resolve_model(model_config)
    if precision not in ("float32", "bfloat16") or (remat or "none") not in ("none", "dots", "full"):
        known = "precision is 'float32' or 'bfloat16'; remat is None, 'none', 'dots' or 'full'"
        raise ConfigError(f"precision = {precision!r} or remat = {remat!r} is unknown: {known}")

    whole = isinstance(vocab_size, (int, np.integer)) and not isinstance(vocab_size, bool)
    if not whole or vocab_size < 1:
        raise ConfigError(f"vocab_size = {vocab_size!r}: expected the whole number of token ids, at least 1")

    def make(key: jax.Array) -> Transformer:
        rngs = nnx.Rngs(params=key)
        return Transformer(model, vocab_size=vocab_size, precision=precision, remat=remat or "none", rngs=rngs)

    return make


def _abstract(make: Any) -> Transformer:
    return nnx.eval_shape(lambda: make(jax.random.key(0, impl=PRNG)))
