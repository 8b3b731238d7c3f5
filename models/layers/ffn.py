"""Position-wise feed-forward layers."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from models import options
from models.layers.linear import projection
from strata import implementation


class GLU(nnx.Module):
    """`down(act(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, option: options.GLU | options.SwiGLU, model: options.Model, *, rngs: nnx.Rngs):
        self.gate, self.up, self.down = _projections(option, model, rngs)
        self.activation = _activation(option, model, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class MLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(self, option: options.MLP | options.SquaredReLU | options.GELU, model: options.Model, *, rngs: nnx.Rngs):
        self.up, self.down = _projections(option, model, rngs)
        self.activation = _activation(option, model, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        return self.down(self.activation(self.up(x)))


def _projections(option: Any, model: options.Model, rngs: nnx.Rngs) -> list[nnx.Module]:
    """The linear layers that the options name, in their order."""
    return [
        projection(model, site, ("mlp", "embed") if site == "down" else ("embed", "mlp"), shape, rngs=rngs)
        for site, shape in option.projections(model).items()
    ]


def _activation(option: Any, model: options.Model, rngs: nnx.Rngs) -> Any:
    """The activation that the options name, called on hidden units."""
    return implementation(option.activation)(option.activation, option.units(model), axis="mlp", rngs=rngs)
