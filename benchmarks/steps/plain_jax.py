"""The plainest JAX script: a scan over the layers, einsum attention, `optax.adamw`, the process as Python started it.

    python -m benchmarks.steps.plain_jax --size small

It is what one would write in an afternoon, and the anchor that Strata's step is measured against. Nothing from this
repository is imported but the sizes and the worker protocol.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.steps.sizes import B2, EPSILON, LEARNING_RATE, ROPE_THETA, WEIGHT_DECAY, Size
from benchmarks.workers import serve


def init(size: Size, key: jax.Array) -> dict[str, Any]:
    """Parameters, those of the layers stacked."""
    n, d, f, v = size.layers, size.width, size.hidden, size.vocabulary
    shapes = {"query": (n, d, d), "key": (n, d, d), "value": (n, d, d), "out": (n, d, d)}
    shapes |= {"gate": (n, d, f), "up": (n, d, f), "down": (n, f, d)}
    keys = jax.random.split(key, len(shapes) + 2)
    blocks = {
        name: jax.random.normal(k, shape) * shape[1] ** -0.5 for (name, shape), k in zip(shapes.items(), keys[2:], strict=True)
    }
    blocks |= {"mixer_norm": jnp.ones((n, d)), "ffn_norm": jnp.ones((n, d))}
    return {
        "embedding": jax.random.normal(keys[0], (v, d)),
        "head": jax.random.normal(keys[1], (d, v)) * d**-0.5,
        "norm": jnp.ones(d),
        "blocks": blocks,
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """[..., width]."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """[B, T, H, D] with tables [T, 1, D / 2]."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def loss(params: dict[str, Any], tokens: jax.Array, targets: jax.Array, heads: int) -> jax.Array:
    """Mean cross-entropy in nats of int32 [B, T] targets."""
    batch, length = tokens.shape
    width = params["embedding"].shape[1]
    frequency = ROPE_THETA ** (-jnp.arange(0, width // heads, 2) / (width // heads))
    angle = jnp.arange(length)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    mask = jnp.tril(jnp.ones((length, length), bool))

    def block(x, w):
        h = rms_norm(x, w["mixer_norm"])
        q, k, v = ((h @ w[name]).reshape(batch, length, heads, -1) for name in ("query", "key", "value"))
        scores = jnp.einsum("bthd,bshd->bhts", rotate(q, cos, sin), rotate(k, cos, sin)) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, width) @ w["out"]
        h = rms_norm(x, w["ffn_norm"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    x, _ = jax.lax.scan(block, params["embedding"][tokens], params["blocks"])
    logits = rms_norm(x, params["norm"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def main() -> None:
    """Serve steps."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size", type=Size.parse, required=True)
    size = arguments.parse_args().size
    tokens, targets = (jnp.asarray(rows) for rows in size.rows())
    optimizer = optax.adamw(LEARNING_RATE, b2=B2, weight_decay=WEIGHT_DECAY)

    def update(params, state):
        value, gradients = jax.value_and_grad(loss)(params, tokens, targets, size.heads)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    jitted = jax.jit(update, donate_argnums=(0, 1))
    params = init(size, jax.random.key(0))
    held = [params, optimizer.init(params)]

    def step() -> float:
        *held[:], value = jitted(*held)
        return float(value)

    serve("plain JAX", size.tokens, step)


if __name__ == "__main__":
    main()
