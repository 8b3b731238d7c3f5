"""What the papers say of placements: identities between them, what norms cost, how the residual stream grows."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import options
from models.placements.placement import Context


def on(config: Any, model: nnx.Module) -> nnx.Module:
    """Another config on the weights of a model of the same shapes."""
    other = models.abstract(config, vocab_size=model.vocab_size)
    assert set(nnx.to_flat_state(nnx.state(other)).paths) == set(nnx.to_flat_state(nnx.state(model)).paths)
    return nnx.merge(nnx.graphdef(other), nnx.state(model))


def changed(model: nnx.Module, change: Any) -> nnx.Module:
    """A model with `change(dotted path, value)` for every parameter, a NumPy array."""
    graph, state = nnx.split(model)
    flat = {p: jnp.asarray(change(".".join(map(str, p)), np.asarray(v[...]))) for p, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.State(nnx.to_pure_dict(nnx.from_flat_state(flat))))


@pytest.mark.parametrize(("alpha", "name"), [(0.0, "pre"), (1.0, "post")])
def test_mix_ln_with_alpha_zero_is_pre_ln_and_with_alpha_one_post_ln(config, awake, run, tokens, alpha, name):
    fields = config(width=8, heads=1, layers=3)
    plain = awake(fields | {"placement": {"name": name}})
    mixed = on(fields | {"placement": {"name": "mix", "alpha": alpha}}, plain)
    np.testing.assert_array_equal(run(mixed, tokens(2, 5)), run(plain, tokens(2, 5)))


@pytest.mark.parametrize(("layers", "alpha", "expected"), [(12, 0.25, 3), (24, 0.25, 6), (32, 0.0625, 2), (6, 0.34, 2)])
def test_the_first_alpha_l_layers_of_mix_ln_are_post_ln(layers, alpha, expected):
    plan = options.Model(layers=layers, placement=options.MixLN(alpha=alpha)).plan()
    assert [layer.placement.name for layer in plan] == ["post"] * expected + ["pre"] * (layers - expected)


def count(config: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(models.abstract(config, vocab_size=11))))


def test_norms_cost_what_the_papers_say(config):
    def cost(placement, norm=None):
        return count(config(layers=4, placement=placement, norm=norm or {"name": "rms_norm"}))

    assert {cost({"name": "mix", "alpha": alpha}) for alpha in (0.0, 0.25, 0.6, 1.0)} == {cost({"name": "pre"})}
    assert cost({"name": "sandwich"}) - cost({"name": "pre"}) == 4 * 2 * 16  # Peri-LN: 2 d a block, and 4 d with LayerNorm
    assert cost({"name": "peri"}) - cost({"name": "sandwich"}) == 16  # the norm of the embedding
    both = {"name": "layer_norm", "bias": True}
    assert cost({"name": "sandwich"}, both) - cost({"name": "pre"}, both) == 4 * 4 * 16
    assert cost({"name": "lns"}) == cost({"name": "pre"})
    assert cost({"name": "pre"}) - cost({"name": "deepnorm"}) == 16  # no final norm
    assert cost({"name": "pre"}) - cost({"name": "none"}) == 4 * 2 * 16 + 16


def states(model: nnx.Module, tokens: jax.Array) -> np.ndarray:
    """The stream before the stack and after every layer."""
    stack, found = model.stack(), [model._embed(tokens)]
    for layer, place in enumerate(stack.places):
        block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
        graph, state = nnx.split(block)
        found.append(blocks(graph)(state, found[-1], found[0], jnp.int32(layer)))
    return np.asarray(jnp.stack(found))


@functools.cache
def blocks(graph: Any) -> Any:
    """A block, compiled once for all layers of its kind."""

    def call(state: Any, h: jax.Array, e: jax.Array, layer: jax.Array) -> jax.Array:
        block = nnx.merge(graph, state)
        return block(h, Context(block.mixer.prepare(h.shape[1], None), layer, e))

    return jax.jit(call)


def size(x: Any) -> np.ndarray:
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axis=-1))


def unit_gains(path: str, value: np.ndarray) -> np.ndarray:
    return np.ones_like(value) if path.endswith(".scale") else value


def test_after_a_post_ln_layer_with_unit_gains_the_stream_has_unit_size_and_growth_restarts_there(config, awake, tokens):
    fields = config(layers=4, placement={"name": "mix", "alpha": 0.5})
    found = size(states(changed(awake(fields), unit_gains), tokens(2, 5)))
    np.testing.assert_allclose(found[1:3], 1.0, atol=1e-5)
    assert (np.abs(found[3:] - 1) > 0.05).all()


def test_the_final_norm_of_post_ln_with_unit_gains_changes_nothing(config, awake, tokens):
    model = changed(awake(config(placement={"name": "post"})), unit_gains)
    last = states(model, tokens(2, 5))[-1]
    np.testing.assert_allclose(model.final_norm(jnp.asarray(last)), last, atol=2e-6)


def test_layer_norm_scaling_is_pre_ln_with_gains_over_the_root_of_the_layer(config, awake, run, tokens):
    fields, rows = config(width=8, heads=1, layers=4), tokens(2, 5)
    scaled = awake(fields | {"placement": {"name": "lns"}})

    def fold(path: str, value: np.ndarray) -> np.ndarray:
        root = 1 / np.sqrt(np.arange(1, 5, dtype=np.float32))[:, None]
        return value * root if path.endswith(("mixer_norm.scale", "ffn_norm.scale")) else value

    folded = on(fields | {"placement": {"name": "pre"}}, changed(scaled, fold))
    expected = run(folded, rows)
    np.testing.assert_allclose(run(scaled, rows), expected, atol=1e-5 * np.abs(expected).max())
    one = config(width=8, heads=1, layers=1)
    single = awake(one | {"placement": {"name": "lns"}})
    np.testing.assert_array_equal(run(single, rows), run(on(one | {"placement": {"name": "pre"}}, single), rows))


def test_layer_norm_scaling_slows_the_growth_of_the_stream(config, awake, tokens):
    """Layer l adds a branch of 1 / l of the variance; in pre-LN all add about as much."""
    grown = {}
    for name in ("pre", "lns"):
        model = awake(config(layers=8, placement={"name": name}, ffn={"name": "gelu"}))
        found = size(states(changed(model, unit_gains), tokens(4, 9))) ** 2
        grown[name] = np.diff(found.mean(axis=(1, 2)))
    assert grown["pre"][-4:].mean() > 0.7 * grown["pre"][:2].mean()
    assert grown["lns"][-4:].mean() < 0.35 * grown["lns"][:2].mean()


def test_a_sub_layer_of_peri_ln_adds_its_output_gain_and_nothing_else(config, awake, run, tokens):
    fields, rows = config(layers=3, placement={"name": "peri"}), tokens(2, 5)
    model = awake(fields)
    closed = changed(model, lambda path, v: 0 * v if "out_norm" in path else v)
    found = states(closed, rows)
    np.testing.assert_array_equal(found[-1], found[0])
    # Larger last matrices change nothing but for the epsilon of the norm.
    louder = changed(model, lambda path, v: 5.0 * v if path.endswith(("out.kernel", "down.kernel")) else v)
    expected = run(model, rows)
    np.testing.assert_allclose(run(louder, rows), expected, atol=1e-4 * np.abs(expected).max())
    # With gains of 1 the mixer alone adds exactly a vector of size 1.
    gains = changed(model, unit_gains)
    only = changed(gains, lambda path, v: 0 * v if "ffn_out_norm" in path else v)
    np.testing.assert_allclose(size(np.diff(states(only, rows), axis=0)), 1.0, atol=1e-4)


def test_sandwich_is_peri_ln_without_the_norm_of_the_embedding(config, awake, run, tokens):
    fields = config(placement={"name": "sandwich"})
    model = awake(fields)
    other = on(config(placement={"name": "peri", "embedding_norm": False}), model)
    np.testing.assert_array_equal(run(other, tokens(2, 5)), run(model, tokens(2, 5)))


def test_deepnorm_starts_values_outputs_and_feed_forward_smaller_and_queries_and_keys_not(config):
    plain = options.Model(layers=6, placement=options.PostNorm(), output_init="normal")
    deep = options.Model(layers=6, placement=options.DeepNorm(), output_init="normal")
    gain = (8 * 6) ** -0.25
    for site in ("query", "key", "value", "out", "output_gate", "gate", "up", "down"):
        ratio = deep.initial_std(site, 128) / plain.initial_std(site, 128)
        assert ratio == pytest.approx(1.0 if site in ("query", "key", "output_gate") else gain), site
    assert models.abstract(config(placement={"name": "deepnorm"}), vocab_size=11).final_norm is None


def test_pre_ln_over_a_centred_stream_is_pre_rms_norm(config, awake, run, tokens):
    fields, rows = config(layers=3, norm={"name": "rms_norm", "epsilon": 1e-5}), tokens(2, 5)

    def centre(path: str, value: np.ndarray) -> np.ndarray:
        writes = path.endswith(("out.kernel", "down.kernel", "embedding.table"))
        return value - value.mean(axis=-1, keepdims=True) if writes else value

    model = changed(awake(fields), centre)
    other = on(fields | {"norm": {"name": "layer_norm", "epsilon": 1e-5}}, model)
    expected = run(model, rows)
    np.testing.assert_allclose(run(other, rows), expected, atol=1e-5 * np.abs(expected).max())
    plain = on(fields | {"norm": {"name": "layer_norm", "epsilon": 1e-5}}, awake(fields))
    assert np.abs(run(plain, rows) - run(awake(fields), rows)).max() > 1e-2  # the centring is what does it


def test_mhc_of_one_stream_is_pre_ln(config, awake, run, tokens):
    fields, rows = config(width=8, heads=1, layers=3), tokens(2, 5)
    hyper = awake(fields | {"placement": {"name": "mhc", "streams": 1}})
    plain = models.abstract(fields, vocab_size=11)
    kept = {p: v for p, v in nnx.to_flat_state(nnx.state(hyper)) if "_weights" not in ".".join(map(str, p))}
    plain = nnx.merge(nnx.graphdef(plain), nnx.from_flat_state(kept))
    expected = run(plain, rows)
    np.testing.assert_allclose(run(hyper, rows), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_silent_layers_keep_the_sum_of_the_streams(config, awake, hidden, tokens, form):
    """Mixing is doubly stochastic and all streams start with the embedding: without branches the stack changes no token."""

    def silent(path: str, value: np.ndarray) -> np.ndarray:
        return 0 * value if path.endswith(("out.kernel", "down.kernel")) else value

    model, rows = changed(awake(config(placement={"name": "mhc", "form": form})), silent), tokens(2, 5)
    expected = model.final_norm(4 * model.embedding(rows, jnp.float32))
    np.testing.assert_allclose(hidden(model, rows)[0], expected, atol=1e-5)
