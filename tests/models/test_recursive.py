"""Looped depth: shared blocks, an own low-rank matrix for every executed layer, exits between loops."""

from __future__ import annotations

import functools
import math
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

LOOPS, UNIQUE = 3, 2


def small(config: Any, **fields: Any) -> dict:
    ffn = {"name": "gelu", "hidden": 8}
    return config(**{"width": 8, "heads": 1, "layers": LOOPS * UNIQUE, "ffn": ffn} | fields)


def looped(config: Any, **fields: Any) -> dict:
    return small(config, depth={"name": "recursive", "loops": LOOPS, "unroll": False, **fields})


def flat(model: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(model))}


def filled(config: dict, values: dict[str, np.ndarray]) -> nnx.Module:
    """A model of `config` with these parameters, all of them and no others."""
    model = models.abstract(config, vocab_size=11)
    found = {p: values.pop(".".join(map(str, p))) for p, _ in nnx.to_flat_state(nnx.state(model))}
    assert not values
    pure = nnx.to_pure_dict(nnx.from_flat_state({p: jnp.asarray(v) for p, v in found.items()}))
    return nnx.merge(nnx.graphdef(model), nnx.State(pure))


def untied(config: dict, model: nnx.Module, scale: float) -> nnx.Module:
    """Every executed layer with weights of its own, W + scale * down @ up where there are adapters, in CYCLE order."""
    values, loops = {}, model.options.depth.loops
    given = flat(model)
    for path, value in given.items():
        if "adapter" in path:
            continue
        value = np.concatenate([value] * loops) if "blocks" in path else value
        if ".main." in path:
            adapter = path.replace("main.kernel", "adapter")
            value = value + scale * given[f"{adapter}.down"] @ given[f"{adapter}.up"]
        values[path.replace(".main.", ".")] = value
    return filled(config, values)


@pytest.mark.parametrize(("rank", "alpha"), [pytest.param(0, None, marks=pytest.mark.slow), (3, 1.5)])
def test_a_looped_model_is_an_untied_one_whose_gradients_add_up(config, awake, run, gradients, tokens, rank, alpha):
    model, rows = awake(looped(config, rank=rank, alpha=alpha)), tokens(2, 5)
    scale = alpha / rank if rank else 1.0
    copy = untied(small(config, depth={"name": "sequential", "unroll": False}), model, scale)
    expected = run(copy, rows)
    np.testing.assert_allclose(run(model, rows), expected, atol=2e-5 * np.abs(expected).max())
    found, apart, values = gradients(model, rows), gradients(copy, rows), flat(model)
    for path, gradient in found.items():
        site = path.replace(".main.", ".")
        if "adapter" in path:
            whole = np.asarray(apart[path.rsplit(".adapter", 1)[0] + ".kernel"])  # d loss / d (W + scale * down @ up)
            down, up = (values[path.rsplit(".", 1)[0] + f".{side}"] for side in ("down", "up"))
            wanted = scale * (whole @ np.swapaxes(up, 1, 2) if path.endswith("down") else np.swapaxes(down, 1, 2) @ whole)
        elif "blocks" in path:
            wanted = np.sum(np.reshape(apart[site], (LOOPS, UNIQUE, *gradient.shape[1:])), axis=0)
        else:
            wanted = apart[site]
        np.testing.assert_allclose(gradient, wanted, atol=5e-5 * max(1, np.abs(wanted).max()), err_msg=path)


def test_one_loop_is_the_sequential_model(config, awake, run, tokens):
    fields = small(config, layers=2)
    model = awake(fields | {"depth": {"name": "recursive", "loops": 1}})
    plain = filled(fields, flat(model))
    np.testing.assert_array_equal(run(model, tokens(2, 5)), run(plain, tokens(2, 5)))


def test_adapters_of_zero_leave_the_plain_looped_model(config, awake, run, tokens):
    model, rows = awake(looped(config, rank=2)), tokens(2, 5)
    silent = filled(looped(config, rank=2), {p: 0 * v if p.endswith("adapter.up") else v for p, v in flat(model).items()})
    kept = {p.replace(".main.", "."): v for p, v in flat(silent).items() if "adapter" not in p}
    expected = run(filled(looped(config), kept), rows)
    np.testing.assert_allclose(run(silent, rows), expected, atol=1e-6 * np.abs(expected).max())
    assert np.abs(run(model, rows) - expected).max() > 1e-2


def test_every_projection_of_every_executed_layer_has_an_adapter_of_its_own_and_nothing_else_has(config):
    model = models.abstract(looped(config, rank=3), vocab_size=11)
    found = {".".join(map(str, p)).split("block0.")[-1]: v.shape for p, v in nnx.to_flat_state(nnx.state(model))}
    kernels = {p.removesuffix(".main.kernel"): s for p, s in found.items() if p.endswith(".main.kernel")}
    assert set(kernels) == {"mixer.query", "mixer.key", "mixer.value", "mixer.out", "ffn.up", "ffn.down"}
    for site, (layers, rows, columns) in kernels.items():
        assert layers == UNIQUE
        assert found[f"{site}.adapter.down"] == (LOOPS * UNIQUE, rows, 3)
        assert found[f"{site}.adapter.up"] == (LOOPS * UNIQUE, 3, columns)
    assert {s[0] for p, s in found.items() if p.endswith("norm.scale") and p != "final_norm.scale"} == {UNIQUE}


# Millions of parameters outside the embedding (and the norms, which the table's last digit does not show).
GEMMA = {"width": 2048, "layers": 18, "heads": 8, "kv_heads": 1, "head_size": 256, "ffn": {"name": "swiglu", "hidden": 16384}}
TINY_LLAMA = {"width": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "ffn": {"name": "swiglu", "hidden": 5632}}
PYTHIA = {"width": 2048, "layers": 16, "heads": 8, "kv_heads": 8, "ffn": {"name": "gelu", "hidden": 8192}}
TABLE = [
    (GEMMA, 2, {0: 0.99, 64: 1.07, 128: 1.15, 256: 1.30, 512: 1.60}),
    (GEMMA, 3, {0: 0.66, 64: 0.74, 128: 0.82, 256: 0.97, 512: 1.27}),
    (TINY_LLAMA, 2, {0: 0.48, 64: 0.53, 128: 0.58, 256: 0.68, 512: 0.86}),
    (PYTHIA, 2, {64: 0.44, 128: 0.48, 256: 0.55, 512: 0.70}),
]


@pytest.mark.parametrize(("sizes", "loops", "expected"), TABLE, ids=["gemma_2", "gemma_3", "tiny_llama", "pythia"])
def test_parameters_are_as_many_as_the_papers_table_says(sizes, loops, expected):
    for rank, billions in expected.items():
        depth = {"name": "recursive", "loops": loops, "rank": rank}
        model = models.abstract(sizes | {"depth": depth}, vocab_size=256)
        blocks = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)["blocks"]))
        # The table cuts or rounds its last digit.
        assert blocks / 1e9 == pytest.approx(billions, abs=0.0085), rank
        generic = 0
        for rows, columns in options.Model(**plain(sizes)).projections().values():
            generic += sizes["layers"] * min(rank, rows, columns) * (rows + columns)
        without = models.abstract(sizes | {"depth": depth | {"rank": 0}}, vocab_size=256)
        assert blocks - sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(without)["blocks"])) == generic


def plain(sizes: dict) -> dict:
    ffn = options.SwiGLU if sizes["ffn"]["name"] == "swiglu" else options.GELU
    return sizes | {"ffn": ffn(hidden=sizes["ffn"]["hidden"])}


# Exits.


@functools.cache
def of_layer(graph: Any, jit: Callable) -> Callable:
    def call(state: Any, h: jax.Array, e: jax.Array, number: jax.Array) -> jax.Array:
        block = nnx.merge(graph, state)
        return block(h, Context(block.mixer.prepare(h.shape[1], None), number, e))

    return jit(call)


def after_loops(model: nnx.Module, tokens: jax.Array, jit: Callable, threshold: float | None = None) -> Any:
    """States after every loop, one layer at a time; with a threshold a sure token keeps its state; and the loop it left."""
    stack, e = model.stack(), model.embedding(tokens, jnp.float32)
    h, hold, ends, left = e, np.zeros(tokens.shape, bool), [], np.full(tokens.shape, LOOPS)
    for number, place in enumerate(stack.places):
        block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
        graph, state = nnx.split(block)
        h = jnp.where(hold[..., None], h, of_layer(graph, jit)(state, h, e, jnp.int32(number)))
        if number % UNIQUE == UNIQUE - 1:
            ends.append(model.final_norm(h))
            if threshold is not None:
                sure = np.asarray(jax.nn.softmax(model.head(ends[-1]), axis=-1)).max(axis=-1) >= threshold
                left = np.where(~hold & sure, len(ends), left)
                hold = hold | sure
    return ends, left


def test_exits_are_the_states_after_each_loop_and_what_leaving_there_gives(config, awake, hidden, jit, tokens):
    model, rows = awake(looped(config, rank=2, exits="weighted")), tokens(2, 5)
    h, extra = hidden(model, rows)
    ends, _ = after_loops(model, rows, jit)
    assert len(extra["exits"]) == LOOPS - 1
    for found, expected in zip((*extra["exits"], h), ends, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    for loop in (1, LOOPS):
        left, extra = hidden(model, rows, depth={"name": "recursive", "exit": loop, "unroll": False})
        assert extra == {}
        np.testing.assert_allclose(left, ends[loop - 1], atol=1e-5 * np.abs(ends[loop - 1]).max())


def test_losses_of_exits_weigh_as_their_names_say():
    weighted = options.RecursiveDepth(loops=4, exits="weighted").exit_weights()
    assert weighted == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert options.RecursiveDepth(loops=3, exits="aggressive").exit_weights() == pytest.approx([0.1, 0.1, 1.0])
    assert options.RecursiveDepth(loops=3).exit_weights() == pytest.approx([0.0, 0.0, 1.0])
    assert sorted(options.RecursiveDepth(loops=3, exits="weighted").views()) == ["loop1", "loop2"]


def stepped(model: nnx.Module, rows: jax.Array, depth: Any, jit: Callable) -> np.ndarray:
    graph, state = nnx.split(model)
    step = jit(lambda state, tokens, cache: nnx.merge(graph, state).step(tokens, cache, depth=depth))
    cache, found = model.init_cache(*rows.shape), []
    for t in range(rows.shape[1]):
        logits, cache = step(state, rows[:, t : t + 1], cache)
        found.append(logits)
    return np.concatenate(found, axis=1)


def test_decoding_with_a_cache_for_every_executed_layer_is_the_forward_pass(config, awake, run, jit, tokens):
    model, rows = awake(looped(config, rank=2)), tokens(2, 6)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.init_cache(2, 6)["layers"])} == {LOOPS * UNIQUE}
    expected = np.asarray(run(model, rows))
    np.testing.assert_allclose(stepped(model, rows, None, jit), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_confident_tokens_leave_early_in_a_forward_pass_and_step_by_step_alike(config, awake, run, jit, tokens, batch):
    model, rows = awake(looped(config, rank=2)), tokens(batch, 12)
    ends, _ = after_loops(model, rows, jit)
    sure = np.stack([np.asarray(jax.nn.softmax(model.head(end), axis=-1)).max(axis=-1) for end in ends])
    threshold = float(np.quantile(sure[:2], 0.6))
    ends, left = after_loops(model, rows, jit, threshold)
    assert set(left.ravel()) == {1, 2, 3}  # tokens do leave at different loops
    expected, depth = model.head(ends[-1]), {"name": "recursive", "confidence": threshold, "unroll": False}
    np.testing.assert_allclose(run(model, rows, depth=depth), expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(stepped(model, rows, depth, jit), expected, atol=2e-5 * np.abs(expected).max())


def test_a_token_that_is_never_sure_runs_through_all_loops_and_one_that_always_is_leaves_at_the_first(
    config, awake, run, jit, tokens
):
    model, rows = awake(looped(config)), tokens(2, 5)
    ends, _ = after_loops(model, rows, jit)
    for confidence, end in ((1.0, ends[-1]), (1e-6, ends[0])):
        expected = model.head(end)
        found = run(model, rows, depth={"name": "recursive", "confidence": confidence, "unroll": False})
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_leaving_early_is_causal(config, awake, run, tokens):
    model, base = awake(looped(config)), tokens(1, 6)
    changed = jnp.where(jnp.eye(6, dtype=bool), (base + 1) % 11, base)
    depth = {"name": "recursive", "confidence": 0.5, "unroll": False}
    logits = np.asarray(run(model, jnp.concatenate([base, changed]), depth=depth))
    for t in range(1, 6):
        np.testing.assert_allclose(logits[1 + t, :t], logits[0, :t], atol=1e-5)
