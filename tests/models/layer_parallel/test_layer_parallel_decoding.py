"""Layer-parallel depth in decoding: steps, prompts, and what stands in the cache, against the forward pass and plain loops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.placements.placement import Context
from tests.models.layer_parallel.conftest import LAYERS, LENGTH, SUFFIX, close, logits_of, parallel, small


def stepper(model: nnx.Module, depth: Any, jit: Callable) -> Callable:
    graph, state = nnx.split(model)
    call = jit(lambda state, tokens, cache: nnx.merge(graph, state).step(tokens, cache, depth=depth))
    return functools.partial(call, state)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param("hybrid", {"sweeps": SUFFIX}, id="hybrid"),
        pytest.param(
            "recursive",
            {"layers": 6, "sweeps": 5, "correction": "none", "start": "batched"},
            id="recursive",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_decoding_with_as_many_sweeps_as_layers_is_sequential_decoding(case, jit, name, fields):
    one = case(name)
    expected = logits_of(one.model, one.exact[-1])
    step = stepper(one.model, parallel(**fields), jit)
    cache = one.model.init_cache(len(one.tokens), LENGTH)
    for t in range(LENGTH):
        logits, cache = step(one.tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=5e-5 * np.abs(expected).max())


@pytest.mark.parametrize("correction", ["identity", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_a_prompt_in_an_empty_cache_is_the_forward_pass_and_what_is_cached_comes_from_the_corrected_inputs(
    case, run, jit, correction
):
    one = case("hybrid")
    states = np.asarray(one.swept(one.prefix)[correction])
    depth = parallel(sweeps=1, correction=correction)
    cache = one.model.init_cache(len(one.tokens), LENGTH + 2)
    logits, cache = stepper(one.model, depth, jit)(one.tokens, cache)
    expected = logits_of(one.model, states[-1])
    np.testing.assert_allclose(logits, expected, atol=5e-5 * np.abs(expected).max())
    stack, inputs = one.model.stack(), [one.h, *states[:-1]]
    for j, h in enumerate(inputs):
        number = LAYERS - SUFFIX + j
        place = stack.places[number]
        block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
        x, own = block.placement.mixer_norm(jnp.asarray(h)), cache["layers"][place.kind]
        value = block.mixer.value(x).reshape(*x.shape[:2], 1, 8)
        close(own["value"][place.index][:, :LENGTH], value)
        assert not np.any(own["value"][place.index][:, LENGTH:])
        key = np.asarray(block.mixer.key_norm(block.mixer.key(x).reshape(*x.shape[:2], 1, 8)))
        turned = key[..., :4] + 1j * key[..., 4:]  # rotary positions: pairs of units as complex numbers
        angle = np.arange(LENGTH)[None, :, None, None] * 10_000.0 ** (-np.arange(4) / 4)
        turned = turned * np.exp(1j * angle)
        close(own["key"][place.index][:, :LENGTH], np.concatenate([turned.real, turned.imag], axis=-1))


@pytest.mark.parametrize("correction", ["diagonal", pytest.param("identity", marks=pytest.mark.slow)])
def test_a_prompt_padded_on_the_left_is_swept_as_one_that_is_not(case, jit, correction):
    one, padding = case("uniform"), 2
    rows = jnp.concatenate([jnp.roll(one.tokens[:1], padding, axis=1), one.tokens[:1]])
    cache = one.model.init_cache(2, LENGTH) | {"start": jnp.asarray([padding, 0])}
    found = np.asarray(stepper(one.model, parallel(sweeps=1, correction=correction), jit)(rows, cache)[0])
    np.testing.assert_allclose(found[0, padding:], found[1, :-padding], atol=5e-5 * np.abs(found).max())


def test_an_exact_correction_within_a_decoding_step_is_of_the_layer_with_its_cache(config, awake, tokens, jit):
    """Two layers, three tokens read before: c_2 = f_2(h) + J_2 (f_1(h) - h), f over the cache."""
    model, rows = awake(small(config, layers=2)), tokens(2, LENGTH)
    graph, state = nnx.split(model)

    def both(state: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        _, cache = model.step(rows[:, :-1], model.init_cache(2, LENGTH))
        logits, _ = model.step(rows[:, -1:], cache, depth=parallel(layers=2, correction="exact"))
        stack, e = model.stack(), model.embedding(rows[:, -1:], jnp.float32)
        layers = []
        for number, place in enumerate(stack.places):
            block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
            shared = block.mixer.prepare_step(1, cache["layers"][place.kind], cache["index"], cache["start"])
            own = jax.tree.map(lambda x, i=place.index: x[i], cache["layers"][place.kind])
            context = Context(shared, jnp.int32(number), e)
            layers.append(lambda h, block=block, context=context, own=own: block.step(h, context, own)[0])
        moved = layers[0](e) - e
        out, tangent = jax.jvp(layers[1], (e,), (moved,))
        return logits, model._read_out(out + tangent)

    found, expected = jit(both)(state)
    np.testing.assert_allclose(found, expected, atol=5e-5 * np.abs(expected).max())


def test_fused_chunks_decode_to_their_own_forward_pass(case, run, jit):
    """One chunk is exact from the first sweep, so that its decoding and its forward pass are the same network."""
    one = case("hybrid")
    depth = parallel(fused=SUFFIX)
    expected = np.asarray(run(one.model, one.tokens, depth=depth))
    step, cache = stepper(one.model, depth, jit), one.model.init_cache(len(one.tokens), LENGTH)
    for t in range(LENGTH):
        logits, cache = step(one.tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=5e-5 * np.abs(expected).max())
