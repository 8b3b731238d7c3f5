"""Blocks one after another: a scan over the stacked layers, or every layer written out."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from models import options
from models.stack import Segment

UNROLLED_ON_CPU = 16
"""Most layers that are written out on CPU when the config leaves it open.

A step that scans takes about 15 % longer on CPU than one written out (`benchmarks/step_speed.py`), and compiling grows with
the number of layers."""


class Sequential:
    """Run every layer once, in order."""

    def __init__(self, option: options.SequentialDepth):
        self.unroll = option.unroll

    def __call__(self, segments: list[Segment], h: jax.Array, shared: list[dict[str, Any]], remat: str) -> jax.Array:
        """[B, T, width] -> [B, T, width] through all segments."""
        layers = sum(segment.repeats * len(segment.blocks) for segment in segments)
        for segment, prepared in zip(segments, shared, strict=True):
            h = _run(segment, h, prepared, remat, self._written_out(layers))
        return h

    def step(
        self, segments: list[Segment], h: jax.Array, shared: list[dict[str, Any]], caches: list[Any]
    ) -> tuple[jax.Array, list[Any]]:
        """One decoding step [B, n, width] through all segments, with their caches."""
        updated = []
        for segment, prepared, cache in zip(segments, shared, caches, strict=True):
            graphs, states = _split(segment)

            def body(h, layer, graphs=graphs, prepared=prepared):
                states, caches = layer
                new = {}
                for name, graph in graphs.items():
                    h, new[name] = nnx.merge(graph, states[name]).step(h, prepared[name], caches[name])
                return h, new

            h, cache = jax.lax.scan(body, h, (states, cache))
            updated.append(cache)
        return h, updated

    def _written_out(self, layers: int) -> bool:
        if self.unroll is not None:
            return self.unroll
        return jax.default_backend() == "cpu" and layers <= UNROLLED_ON_CPU


def _split(segment: Segment) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = {name: nnx.split(block) for name, block in segment.blocks.items()}
    return {name: graph for name, (graph, _) in parts.items()}, {name: state for name, (_, state) in parts.items()}


def _run(segment: Segment, h: jax.Array, shared: dict[str, Any], remat: str, written_out: bool) -> jax.Array:
    graphs, states = _split(segment)

    def body(h: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, None]:
        for name, graph in graphs.items():
            with jax.named_scope(name):
                h = nnx.merge(graph, layer[name])(h, shared[name])
        return h, None

    if remat == "full":
        body = jax.checkpoint(body, prevent_cse=written_out)
    elif remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(body, prevent_cse=written_out, policy=policy)
    if not written_out:
        return jax.lax.scan(body, h, states)[0]
    for i in range(segment.repeats):
        h, _ = body(h, jax.tree.map(lambda leaf, i=i: leaf[i], states))
    return h
