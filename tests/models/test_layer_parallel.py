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
from models.depth.layer_parallel import LayerParallel
from models.depth.suffix import Suffix
from models.placements.placement import Context
from models.stack import Forward, Stack
from models.transformer import depth_options

LAYERS, SUFFIX, LENGTH = 5, 4, 4
WINDOW = {"name": "attention", "implementation": "reference", "window": 2}  # `reference` can be differentiated forwards
FULL = {"name": "attention", "implementation": "reference"}
PLAIN = ("identity", "damped", "none", "diagonal", "exact")

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


def constant_branches(path: str, value: np.ndarray) -> np.ndarray:
    return 0 * value if path.endswith(("mixer_norm.scale", "ffn_norm.scale")) else value


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


def parallel(**fields: Any) -> dict[str, Any]:
    return {"name": "layer_parallel", "layers": SUFFIX, "unroll": False, **fields}


def logits_of(model: nnx.Module, h: np.ndarray) -> np.ndarray:
    return np.asarray(model._read_out(jnp.asarray(h, jnp.float32)))


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


# Decoding.


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


def products(jaxpr: Any) -> int:
    """Matrix products in a program, those in its loops counted once."""
    inner = [v for eqn in jaxpr.eqns for x in eqn.params.values() for v in (x if isinstance(x, (tuple, list)) else (x,))]
    inner = [getattr(v, "jaxpr", v) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")]
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(map(products, inner))


def test_a_sweep_is_one_batched_call_for_every_kind_of_block(config, tokens):
    def count(layers: int, **fields: Any) -> int:
        model = models.abstract(small(config, layers=layers, **fields), vocab_size=11)
        graph, state = nnx.split(model)
        depth = parallel(layers=layers)
        return products(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(tokens(1, 4), depth=depth))(state).jaxpr)

    assert count(2) == count(8) > 1
    pattern = {"name": "hybrid", "pattern": [WINDOW, WINDOW, FULL]}
    assert count(6, mixer=pattern) - 1 == 2 * (count(2) - 1)  # beside the head
    apart = {"name": "hybrid", "pattern": [WINDOW, WINDOW, FULL, WINDOW, WINDOW, WINDOW]}
    assert count(6, mixer=apart) == count(6, mixer=pattern)


def test_gradients_flow_through_the_sweeps(config, awake, gradients, tokens):
    """SNLP-forward fine-tuning: as many sweeps as layers have the gradient of the stack in order."""
    model, rows = awake(small(config, layers=2)), tokens(2, LENGTH)
    expected = gradients(model, rows, depth={"name": "sequential", "unroll": False})
    found = gradients(model, rows, depth=parallel(layers=2, sweeps=2))
    for path, gradient in found.items():
        close(gradient, expected[path], 5e-5)


@pytest.mark.parametrize(
    ("placement", "correction"), [({"name": "mhc", "streams": 2}, "hcn"), ({"name": "blend"}, "scaled")], ids=["mhc", "blend"]
)
def test_gradients_of_fewer_sweeps_than_layers_are_those_of_a_plain_loop(config, awake, tokens, jit, placement, correction):
    """c_2 = f_2(h) + A_2 (f_1(h) - h), whose gradient is also that of what A_2 is made of."""
    model, rows = awake(small(config, layers=2, placement=placement)), tokens(2, LENGTH)
    graph, state = nnx.split(model)
    strategy = LayerParallel(options.LayerParallelDepth(layers=2, correction=correction))

    def parts(state: Any) -> tuple[Stack, jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        e = model.embedding(rows, jnp.float32)
        return model.stack(), e, jnp.stack([e, e], axis=2) if correction == "hcn" else e

    def weighted(h: jax.Array) -> jax.Array:
        """Streams by themselves: mixing leaves their sum as it is."""
        return jnp.sum(h * jnp.asarray(np.random.default_rng(0).standard_normal(h.shape), jnp.float32))

    def swept(state: Any) -> jax.Array:
        stack, e, h = parts(state)
        shared = {kind: mixer.prepare(LENGTH, None) for kind, mixer in stack.mixers.items()}
        return weighted(strategy.sweeps(Suffix(stack, 0, Forward(shared, e, None)), h)[-1])

    def by_hand(state: Any) -> jax.Array:
        stack, e, h = parts(state)
        halves = []
        for number, place in enumerate(stack.places):
            block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
            context = Context(block.mixer.prepare(LENGTH, None), jnp.int32(number), e)
            halves.append(block.halves(h, context))
        first, second = block.placement.transports(h, halves[1][0], context)
        moved = halves[0][1] - h
        moved = jnp.einsum("ij,jk,btkd->btid", second, first, moved) if correction == "hcn" else second * first * moved
        return weighted(halves[1][1] + moved)

    found, expected = jit(lambda state: (jax.grad(swept)(state), jax.grad(by_hand)(state)))(state)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(one, other, 1e-4)


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
