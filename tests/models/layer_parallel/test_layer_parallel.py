"""Layer-parallel depth: every sweep against a plain loop over layers, and what the method promises of its sweeps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import options
from models.placements.placement import Context
from models.transformer import depth_options
from tests.models.layer_parallel.conftest import (
    CORRECTIONS,
    FULL,
    LAYERS,
    LENGTH,
    STRUCTURES,
    SUFFIX,
    WINDOW,
    Case,
    close,
    logits_of,
    parallel,
    small,
)
from tests.traced import equations


def constant_branches(path: str, value: np.ndarray) -> np.ndarray:
    return 0 * value if path.endswith(("mixer_norm.scale", "ffn_norm.scale")) else value


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_sweep_is_the_plain_loop_and_makes_one_more_layer_exact_each_time(case, name):
    check_sweeps(case(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_so_it_does_with_every_correction(case, name):
    known = {"blend": ("scaled",), "mhc": ("hcn",), "mhc_dynamic": ("hcn",)}.get(name, ())
    check_sweeps(case(name, corrections=(*CORRECTIONS["uniform"], *known)))


def check_sweeps(one: Case) -> None:
    first = one.swept(one.prefix)
    batched = np.asarray(first["none"])  # every block at the state before the suffix: the start of that name
    for j in range(SUFFIX):
        close(batched[j], one.loop.layer(len(one.exact) - 1 - SUFFIX + j, one.h)[0])
    for correction in one.corrections:
        for start, gained in ((one.prefix, 0), (batched, 1)):
            states = start
            for k in range(1, SUFFIX + 1 - gained):
                expected = one.loop.sweep(one.h, states, correction) if k <= 2 else None
                states = np.asarray(one.swept(states)[correction])
                if expected is not None:
                    close(states, expected, 5e-5)
                done = k + gained
                close(states[:done], one.trace[:done], 2e-5)
                # Rows differ from row 0 at one position each: nothing before it may notice, at any number of sweeps.
                for t in range(1, LENGTH):
                    close(states[:, 1 + t, :t], states[:, 0, :t], 2e-5)
            close(states[-1], one.exact[-1], 2e-5)  # as many sweeps as layers, or with a batched start one less
        close(one.swept(one.trace)[correction], one.trace, 2e-5)  # the sequential states stay where they are
    # Before that the corrections do differ from the stack, or all of this would say nothing.
    assert np.abs(np.asarray(first["none"])[-1] - one.exact[-1]).max() > 1e-2


def test_the_first_identity_sweep_adds_what_every_layer_adds_to_the_state_before_them(case):
    for name in ("uniform", "blend"):
        one = case(name)
        added = sum(one.loop.layer(1 + j, one.h)[0] - one.h for j in range(SUFFIX))
        close(np.asarray(one.swept(one.prefix)["identity"])[-1], one.h + added)


@pytest.mark.parametrize(
    ("name", "exact", "not_exact"),
    [
        ("uniform", ("identity", "exact"), ("none", "damped")),
        ("hybrid", ("identity",), ("none",)),
        ("blend", ("scaled",), ("identity", "none")),
        ("mhc", ("hcn",), ("identity", "none")),
    ],
)
def test_one_sweep_is_exact_for_branches_that_do_not_depend_on_their_input(case, name, exact, not_exact):
    """Then only the residual path is left, and the correction that knows it is the Jacobian."""
    one = case(name, constant_branches)
    found = one.swept(one.prefix)
    for correction in exact:
        close(found[correction], one.trace, 2e-5)
    for correction in not_exact:
        assert np.abs(np.asarray(found[correction])[-1] - one.exact[-1]).max() > 1e-2, correction


def test_hcn_with_identity_mixing_is_idn(case):
    def unmixed(path: str, value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(5.0 * np.eye(2, dtype=np.float32), value.shape) if path.endswith("mixing") else value

    one = case("mhc", unmixed)
    found = one.swept(one.prefix)
    close(found["hcn"], found["identity"], 1e-6)
    mixed = case("mhc")
    found = mixed.swept(mixed.prefix)
    assert np.abs(found["hcn"] - found["identity"]).max() > 1e-2
    # One sweep: columns of a mixing matrix sum to one, so that the sum over streams, which is read out, is that of IDN.
    close(np.sum(found["hcn"], axis=-2), np.sum(found["identity"], axis=-2))


def test_a_scale_of_one_is_idn(case):
    line = np.linspace(1.15, 1.05, LAYERS, dtype=np.float32)
    one = case("blend", lambda path, v: 1 - line if path.endswith("stream_offset") else v)
    found = one.swept(one.prefix)
    close(found["scaled"], found["identity"], 1e-5)


AT_CALL_TIME = {
    "hybrid": {"sweeps": SUFFIX, "start": "prefix"},
    "mix": {"sweeps": SUFFIX + 2, "correction": "damped", "damping": 0.5},  # more sweeps than layers change nothing
    "recursive": {"layers": 6, "sweeps": 5, "correction": "none", "start": "batched"},  # no prefix at all
    "mhc": {"sweeps": SUFFIX - 1, "correction": "hcn", "start": "batched"},
    "blend": {"layers": 1, "sweeps": 1, "correction": "scaled"},
}


@pytest.mark.parametrize(
    "name", [n if n in ("hybrid", "mhc") else pytest.param(n, marks=pytest.mark.slow) for n in AT_CALL_TIME]
)
def test_as_many_sweeps_as_layers_give_the_logits_of_the_stack_in_order(case, run, name):
    one = case(name)
    found = run(one.model, one.tokens, depth=parallel(**AT_CALL_TIME[name]))
    expected = logits_of(one.model, one.exact[-1])
    np.testing.assert_allclose(found, expected, atol=5e-5 * np.abs(expected).max())


def test_two_sweeps_are_a_sweep_of_a_sweep(case, run):
    one = case("uniform")
    states = np.asarray(one.swept(one.prefix)["none"])
    for _ in range(2):
        states = np.asarray(one.swept(states)["identity"])
    found = run(one.model, one.tokens, depth=parallel(sweeps=2, start="batched"))
    expected = logits_of(one.model, states[-1])
    np.testing.assert_allclose(found, expected, atol=5e-5 * np.abs(expected).max())


@pytest.mark.parametrize("correction", ["identity", "diagonal"])
def test_a_packed_document_is_swept_alike_wherever_it_stands(case, run, correction):
    one = case("uniform")
    both = one.tokens[:2].reshape(1, -1)
    rows = jnp.concatenate([both, jnp.roll(both, LENGTH, axis=1)])
    segments = jnp.asarray([[1] * LENGTH + [2] * LENGTH] * 2)
    found = np.asarray(run(one.model, rows, segment_ids=segments, depth=parallel(sweeps=1, correction=correction)))
    np.testing.assert_allclose(found[0], np.roll(found[1], LENGTH, axis=0), atol=5e-5 * np.abs(found).max())


def test_a_sweep_is_one_batched_call_for_every_kind_of_block(config, tokens):
    def count(layers: int, **fields: Any) -> int:
        model = models.abstract(small(config, layers=layers, **fields), vocab_size=11)
        graph, state = nnx.split(model)
        depth = parallel(layers=layers)
        traced = jax.make_jaxpr(lambda state: nnx.merge(graph, state)(tokens(1, 4), depth=depth))(state)
        return sum(equation.primitive.name == "dot_general" for equation in equations(traced))  # those in loops once

    assert count(2) == count(8) > 1
    pattern = {"name": "hybrid", "pattern": [WINDOW, WINDOW, FULL]}
    assert count(6, mixer=pattern) - 1 == 2 * (count(2) - 1)  # beside the head
    apart = {"name": "hybrid", "pattern": [WINDOW, WINDOW, FULL, WINDOW, WINDOW, WINDOW]}
    assert count(6, mixer=apart) == count(6, mixer=pattern)


def test_a_request_takes_from_the_model_what_it_does_not_say():
    trained = {"name": "layer_parallel", "layers": 3, "sweeps": 2, "correction": "damped", "forward": "sequential"}
    model = options.Model(
        width=16, layers=4, heads=2, depth=options.LayerParallelDepth(**{k: trained[k] for k in list(trained)[1:]})
    )
    asked = depth_options({"name": "layer_parallel", "sweeps": 1}, model)
    assert (asked.layers, asked.sweeps, asked.correction, asked.forward) == (3, 1, "damped", "parallel")
    plain = options.Model(width=16, layers=4, heads=2)
    streams = options.Model(width=16, layers=4, heads=2, placement=options.HyperConnections(streams=2))
    assert [depth_options({"name": "layer_parallel"}, m).correction for m in (plain, streams)] == ["identity", "hcn"]
    assert depth_options({"name": "layer_parallel"}, plain).layers == 4


# Fused chunks.


def chunk(one: Case, first: int, size: int, h: np.ndarray, jit: Callable) -> tuple[np.ndarray, Any]:
    """One wide block: all mixers read h, all feed-forward layers read what they made of it together; and M of the chunk."""
    blocks = [nnx.merge(graph, state) for graph, state, _ in one.loop.parts[first : first + size]]
    contexts = [Context(None, number, one.loop.e) for _, _, number in one.loop.parts[first : first + size]]
    placement, matrix = one.model.options.placement.name, 1.0
    total = {}
    if placement == "blend":
        a, b = (
            np.mean([float(p) for p in scale])
            for scale in zip(
                *(block.placement.scales(context.layer) for block, context in zip(blocks, contexts, strict=True)), strict=True
            )
        )
        h, matrix = a * h + b * one.loop.e, a
    residual = {"mixer": np.ones(()), "ffn": np.ones(())}
    for site in ("mixer", "ffn"):
        if placement == "mhc":
            residual[site] = np.mean([getattr(b.placement, f"{site}_weights").residual(None) for b in blocks], axis=0)
        update = 0.0
        for block, context in zip(blocks, contexts, strict=True):
            call = of_sublayer(nnx.graphdef(block), site, jit)
            update = update + np.asarray(call(nnx.state(block), jnp.asarray(h, jnp.float32), context.layer, one.loop.e))
        kept = np.einsum("ij,btjd->btid", residual[site], h) if placement == "mhc" else h
        total[site] = h = kept + update
    return h, residual["ffn"] @ residual["mixer"] if placement == "mhc" else matrix


@functools.cache
def of_sublayer(graph: Any, site: str, jit: Callable) -> Callable:
    """What one sub-layer of one block adds to the stream."""

    def call(state: Any, h: jax.Array, number: jax.Array, e: jax.Array) -> jax.Array:
        block = nnx.merge(graph, state)
        context = Context(block.mixer.prepare(h.shape[1], None), number, e)
        if site == "mixer":
            return block.placement.mixer_update(h, lambda x: block.mixer(x, context.shared), context)
        return block.placement.ffn_update(h, block.ffn, context)

    return jit(call)


def chunked_sweeps(one: Case, size: int, sweeps: int, jit: Callable) -> np.ndarray:
    """The method over chunks, with the identity or the chunk's own mean of what carries a state."""
    count, first = SUFFIX // size, len(one.loop.parts) - SUFFIX
    states = [one.h] * count
    for _ in range(sweeps):
        inputs, before, found = [one.h, *states[:-1]], one.h, []
        for c, entered in enumerate(inputs):
            out, matrix = chunk(one, first + c * size, size, entered, jit)
            moved = before - entered
            before = out + (np.einsum("ij,btjd->btid", matrix, moved) if np.ndim(matrix) else matrix * moved)
            found.append(before)
        states = found
    return states[-1]


@pytest.mark.parametrize(
    ("name", "size", "sweeps", "correction"),
    [
        pytest.param("uniform", 2, 1, "identity", marks=pytest.mark.slow),
        ("uniform", 2, 2, "identity"),
        pytest.param("hybrid", 4, 1, "identity", marks=pytest.mark.slow),
        ("mhc", 2, 1, "hcn"),
        ("blend", 2, 1, "scaled"),
    ],
)
def test_fused_chunks_are_wide_blocks_corrected_between_them(case, run, jit, name, size, sweeps, correction):
    one = case(name)
    expected = logits_of(one.model, chunked_sweeps(one, size, sweeps, jit))
    found = run(one.model, one.tokens, depth=parallel(fused=size, sweeps=sweeps, correction=correction))
    np.testing.assert_allclose(found, expected, atol=5e-5 * np.abs(expected).max())
    if sweeps == SUFFIX // size:  # converged, to the chain of wide blocks and not to the stack
        h = one.h
        for c in range(SUFFIX // size):
            h, _ = chunk(one, 1 + c * size, size, h, jit)
        np.testing.assert_allclose(found, logits_of(one.model, h), atol=5e-5 * np.abs(expected).max())
        assert np.abs(found - logits_of(one.model, one.exact[-1])).max() > 1e-2


def test_a_fused_block_without_feed_forward_layers_adds_every_attention(case, run):
    one = case("hybrid", lambda path, v: 0 * v if path.endswith("ffn.down.kernel") else v)
    added = sum(one.loop.layer(1 + j, one.h)[0] - one.h for j in range(SUFFIX))
    found = run(one.model, one.tokens, depth=parallel(fused=SUFFIX))
    np.testing.assert_allclose(found, logits_of(one.model, one.h + added), atol=1e-4)
