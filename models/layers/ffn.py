"""Position-wise feed-forward layers. The projection that writes to the residual stream starts at zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models import options
from strata import implementation


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, option: options.SwiGLU, model: options.Model, *, rngs: nnx.Rngs):
        hidden = option.hidden or -(-8 * model.width // (3 * 16)) * 16
        self.gate, self.up, self.down = _projections(model, hidden, ("gate", "up"), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class SquaredReLU(nnx.Module):
    """`down(relu(up(x))**2)` (arXiv:2109.08668)."""

    def __init__(self, option: options.SquaredReLU, model: options.Model, *, rngs: nnx.Rngs):
        self.up, self.down = _projections(model, option.hidden or 4 * model.width, ("up",), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        hidden = jnp.maximum(self.up(x), 0)
        return self.down(hidden * hidden)


class GELU(nnx.Module):
    """`down(gelu(up(x)))`, tanh form (arXiv:1606.08415)."""

    def __init__(self, option: options.GELU, model: options.Model, *, rngs: nnx.Rngs):
        self.up, self.down = _projections(model, option.hidden or 4 * model.width, ("up",), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


def _projections(model: options.Model, hidden: int, inner: tuple[str, ...], rngs: nnx.Rngs) -> list[nnx.Module]:
    """The input projections named `inner`, then the output projection."""
    linear, std = implementation(model.linear), model.init_scale * model.width**-0.5
    make = [linear(model.linear, model.width, hidden, axes=("embed", "mlp"), std=std, rngs=rngs) for _ in inner]
    return [*make, linear(model.linear, hidden, model.width, axes=("mlp", "embed"), std=0.0, rngs=rngs)]
