"""Small models of every structure, the stack as a plain loop over layers, and sweeps by that loop beside the package's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import options
from models.depth.layer_parallel import LayerParallel
from models.depth.suffix import Suffix
from models.placements.placement import Context
from models.stack import Forward

LAYERS, SUFFIX, LENGTH = 5, 4, 4
WINDOW = {"name": "attention", "implementation": "reference", "window": 2}  # `reference` can be differentiated forwards
FULL = {"name": "attention", "implementation": "reference"}

STRUCTURES = {
    "uniform": {},
    "hybrid": {"mixer": {"name": "hybrid", "pattern": [WINDOW, FULL]}},
    "mix": {"placement": {"name": "mix", "alpha": 0.6}},
    "recursive": {"layers": 6, "depth": {"name": "recursive", "loops": 3, "rank": 2}},
    "blend": {"placement": {"name": "blend"}},
    "mhc": {"placement": {"name": "mhc", "streams": 2}},
    "mhc_dynamic": {"placement": {"name": "mhc", "form": "dynamic", "streams": 2}},
}
CORRECTIONS = {
    "uniform": ("identity", "damped", "none", "diagonal", "exact"),
    "hybrid": ("identity", "none", "diagonal"),
    "mix": ("identity", "none", "damped"),
    "recursive": ("identity", "none"),
    "blend": ("identity", "scaled", "none"),
    "mhc": ("identity", "hcn", "none"),
    "mhc_dynamic": ("hcn", "none"),
}
"""Compiled in every run; all others of a structure with `-m slow`."""


def small(config: Any, **fields: Any) -> dict:
    """Norms with an offset, so that a gain of zero leaves branches that are constant and not zero."""
    norm, ffn = {"name": "layer_norm", "bias": True}, {"name": "gelu", "hidden": 8}
    return config(**{"width": 8, "heads": 1, "layers": LAYERS, "norm": norm, "ffn": ffn, "mixer": FULL} | fields)


def changed(model: nnx.Module, change: Any) -> nnx.Module:
    """A model with `change(dotted path, value)` for every parameter, a NumPy array."""
    graph, state = nnx.split(model)
    flat = {p: jnp.asarray(change(".".join(map(str, p)), np.asarray(v[...]))) for p, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.State(nnx.to_pure_dict(nnx.from_flat_state(flat))))


@functools.cache
def of_layer(graph: Any, jit: Callable) -> Callable:
    """(state, h, e, number) -> the state after one layer, and what carries a state past its two halves."""

    def call(state: Any, h: jax.Array, e: jax.Array, number: jax.Array) -> Any:
        block = nnx.merge(graph, state)
        context = Context(block.mixer.prepare(h.shape[1], None), number, e)
        middle, out = block.halves(h, context)
        return out, block.placement.transports(h, middle, context)

    return jit(call)


@functools.cache
def tangent_of_layer(graph: Any, jit: Callable) -> Callable:
    """(state, h, e, number, d) -> the product of the layer's Jacobian at h with d, by forward mode."""

    def call(state: Any, h: jax.Array, e: jax.Array, number: jax.Array, d: jax.Array) -> jax.Array:
        block = nnx.merge(graph, state)
        context = Context(block.mixer.prepare(h.shape[1], None), number, e)
        return jax.jvp(lambda h: block(h, context), (h,), (d,))[1]

    return jit(call)


class Loop:
    """The stack as a list of functions, and the method as loops over it: what the package must agree with."""

    def __init__(self, model: nnx.Module, tokens: jax.Array, jit: Callable):
        stack = model.stack()
        self.e = np.asarray(model.embedding.table[...])[np.asarray(tokens)]
        streams = model.options.placement.streams
        self.entered = self.e if streams is None else np.stack([self.e] * streams, axis=2)
        self.jit, self.parts = jit, []
        for number, place in enumerate(stack.places):
            state = jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place]))
            self.parts.append((*nnx.split(stack.block(place.kind, state)), jnp.int32(number)))

    def layer(self, number: int, h: Any) -> tuple[np.ndarray, Any]:
        graph, state, own = self.parts[number]
        out, carried = of_layer(graph, self.jit)(state, jnp.asarray(h, jnp.float32), self.e, own)
        return np.asarray(out), tuple(np.asarray(x) for x in carried)

    def tangent(self, number: int, h: Any, d: Any) -> np.ndarray:
        graph, state, own = self.parts[number]
        h, d = jnp.asarray(h, jnp.float32), jnp.asarray(d, jnp.float32)
        return np.asarray(tangent_of_layer(graph, self.jit)(state, h, self.e, own, d))

    def sequential(self) -> list[np.ndarray]:
        """The state before the stack and after every layer."""
        found = [self.entered]
        for number in range(len(self.parts)):
            found.append(self.layer(number, found[-1])[0])
        return found

    def sweep(self, h: Any, states: Any, correction: str, damping: float = 0.1) -> np.ndarray:
        """c_j = f_j(h_{j-1}) + A_j (c_{j-1} - h_{j-1}), one layer after another."""
        inputs, before, found = [h, *states[:-1]], h, []
        first = len(self.parts) - len(states)
        for j, entered in enumerate(inputs):
            out, carried = self.layer(first + j, entered)
            moved = before - entered
            if correction == "identity":
                moved = 1.0 * moved
            elif correction == "damped":
                moved = (1 - damping) * moved
            elif correction == "none":
                moved = 0.0 * moved
            elif correction == "scaled":
                moved = carried[1] * carried[0] * moved
            elif correction == "hcn":
                matrix = carried[1] @ carried[0]
                moved = np.einsum("ij,btjd->btid" if matrix.ndim == 2 else "btij,btjd->btid", matrix, moved)
            elif correction == "diagonal":
                z = np.asarray(jax.random.rademacher(jax.random.key(0), entered.shape[2:], jnp.float32))
                step = 1e-2 * np.sqrt(np.mean(entered**2, axis=-1, keepdims=True)) * z
                moved = np.clip((self.layer(first + j, entered + step)[0] - out) / step, -2, 2) * moved
            elif correction == "exact":
                moved = self.tangent(first + j, entered, moved)
            before = out + moved
            found.append(before)
        return np.stack(found)


@functools.cache
def one_sweep(graph: Any, corrections: tuple[str, ...], jit: Callable) -> Callable:
    """(state, tokens, h, states) -> a sweep of the package with every correction."""

    def call(state: Any, tokens: jax.Array, h: jax.Array, states: jax.Array) -> dict[str, jax.Array]:
        model, found = nnx.merge(graph, state), {}
        stack = model.stack()
        shared = {kind: mixer.prepare(tokens.shape[1], None) for kind, mixer in stack.mixers.items()}
        suffix = Suffix(stack, len(stack) - SUFFIX, Forward(shared, model.embedding(tokens, jnp.float32), None))
        for correction in corrections:
            strategy = LayerParallel(options.LayerParallelDepth(layers=SUFFIX, correction=correction))
            found[correction] = strategy.sweep(strategy.layers(suffix), h, states)
        return found

    return jit(call)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()))


class Case:
    """A model of one structure, rows of tokens of which row t + 1 differs from row 0 at position t, and both sweeps."""

    def __init__(self, model: nnx.Module, corrections: tuple[str, ...], tokens: Any, jit: Callable):
        base = tokens(1, LENGTH)
        self.tokens = jnp.concatenate([base, jnp.where(jnp.eye(LENGTH, dtype=bool), (base + 1) % 11, base)])
        self.model, self.corrections, self.loop = model, corrections, Loop(model, self.tokens, jit)
        self.exact = self.loop.sequential()
        self.h = self.exact[-1 - SUFFIX]
        self.trace = np.stack(self.exact[-SUFFIX:])
        self.prefix = np.stack([self.h] * SUFFIX)
        graph, state = nnx.split(model)
        self.swept = functools.partial(one_sweep(graph, corrections, jit), state, self.tokens, self.h)


@pytest.fixture(scope="module")
def case(config, awake, tokens, jit):
    """`case(structure, change)`: compiled once a structure, whatever its parameters are changed to."""

    def make(name: str, change: Any = None, corrections: tuple[str, ...] = ()) -> Case:
        model = awake(small(config, **STRUCTURES[name]))
        return Case(changed(model, change) if change else model, corrections or CORRECTIONS[name], tokens, jit)

    return make


def parallel(**fields: Any) -> dict[str, Any]:
    return {"name": "layer_parallel", "layers": SUFFIX, "unroll": False, **fields}


def logits_of(model: nnx.Module, h: np.ndarray) -> np.ndarray:
    return np.asarray(model._read_out(jnp.asarray(h, jnp.float32)))
