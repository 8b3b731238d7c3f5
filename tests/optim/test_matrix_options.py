"""Fields of Muon and NorMuon, from a config to the update, against one float64 implementation."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import optim

SHAPE = (6, 15)
PLAIN = {"momentum": 0.95, "nesterov": True}
DEFAULTS = {
    "muon": PLAIN | {"scaling": "jordan", "form": "lmo"},
    "normuon": PLAIN | {"scaling": "rms", "b2": 0.95, "epsilon": 1e-10},
}


class Stack(nnx.Module):
    """Two layers of a matrix that is wider than long, so that all scalings differ."""

    def __init__(self):
        shape = (2, *SHAPE)
        self.up = nnx.Param(jax.random.normal(jax.random.key(0), shape), role="matrix", axes=("layer", "embed", "mlp"))


def reference(name, gradients, *, momentum, nesterov, scaling, form="lmo", b2=0.0, epsilon=0.0):
    """The last update of one matrix [in, out] in float64, by its singular values."""
    (m, n), mean, second = gradients[0].shape, 0.0, 0.0
    factor = {"jordan": max(1, n / m) ** 0.5, "moonlight": 0.2 * max(m, n) ** 0.5}.get(scaling, 1.0)
    for g in gradients:
        mean = momentum * mean + (1 - momentum) * g
        ahead = momentum * mean + (1 - momentum) * g if nesterov else mean
        u, s, v = np.linalg.svd(ahead, full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        polar = (u * s) @ v
        second = b2 * second + (1 - b2) * np.mean(polar**2, axis=0)
    if name == "muon":
        return polar * factor * (np.sum(ahead * polar) if form == "sharp" else 1.0)
    even = polar / (np.sqrt(second) + epsilon)
    size = 0.2 * (m * n) ** 0.5 if scaling == "rms" else factor * np.linalg.norm(polar)
    return even * size / np.linalg.norm(even)


def last_update(name, fields, gradients):
    """Of a recipe with rate 1 and nothing else, turned back into the direction."""
    direction = {"name": name, "learning_rate": 1.0, **fields}
    model = Stack()
    tx = optim.build({"direction": direction, "schedule": {"name": "constant"}, "clip_norm": None}, model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        moved, state = update({"up": g.astype(np.float32)}, state, params)
    return -np.asarray(moved["up"], np.float64)


OTHER = {"momentum": 0.3, "nesterov": False, "scaling": "moonlight"}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, fields) for name in DEFAULTS for fields in ({}, {"scaling": None})),
        ("muon", OTHER | {"form": "sharp"}),
        ("normuon", OTHER | {"b2": 0.2, "epsilon": 0.3}),
        ("normuon", {"scaling": "jordan"}),
    ],
    ids=str,
)
def test_every_field_moves_the_update_as_the_float64_reference_says(name, fields):
    gradients = np.random.default_rng(1).normal(size=(3, 2, *SHAPE)) * [[[[1.0]]], [[[3.0]]], [[[0.5]]]]

    def expected(fields):
        return np.stack([reference(name, gradients[:, layer], **DEFAULTS[name] | fields) for layer in range(2)])

    right = expected(fields)
    for ignored in fields:  # would show
        without = expected({field: value for field, value in fields.items() if field != ignored})
        assert np.abs(without - right).max() > 0.02 * np.abs(right).max(), ignored
    np.testing.assert_allclose(last_update(name, fields, gradients), right, atol=1e-3 * np.abs(right).max())
