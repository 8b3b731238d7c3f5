"""Where norms sit: each placement against its equation, written here from its paper, and where its own weights start."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import options
from models.placements.blend import Blend
from models.placements.hyper_connections import Dynamic, Static, sinkhorn
from models.placements.placement import Context

LAYERS = 4
BLOCK = "blocks.block0"


def rms(x: Any, weight: Any = 1.0) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6) * weight


def softmax(x: Any) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def sigmoid(x: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def doubly_stochastic(logits: Any, iterations: int) -> np.ndarray:
    """Sinkhorn and Knopp on the numbers themselves: rows first, then columns."""
    m = np.exp(logits)
    for _ in range(iterations):
        m = m / m.sum(axis=-1, keepdims=True)
        m = m / m.sum(axis=-2, keepdims=True)
    return m


# One layer i = 0, 1, ... of n: x the stream, A and F the sub-layers, w what the placement learned, e the embedding.


def pre(x, A, F, w, i, n, e):
    x = x + A(rms(x, w["mixer_norm.scale"]))
    return x + F(rms(x, w["ffn_norm.scale"]))


def post(x, A, F, w, i, n, e, a=1.0):
    x = rms(a * x + A(x), w["mixer_norm.scale"])
    return rms(a * x + F(x), w["ffn_norm.scale"])


def mix(x, A, F, w, i, n, e):
    return (post if i < 0.5 * n else pre)(x, A, F, w, i, n, e)


def peri(x, A, F, w, i, n, e):
    x = x + rms(A(rms(x, w["mixer_norm.scale"])), w["mixer_out_norm.scale"])
    return x + rms(F(rms(x, w["ffn_norm.scale"])), w["ffn_out_norm.scale"])


def deepnorm(x, A, F, w, i, n, e):
    return post(x, A, F, w, i, n, e, a=(2 * n) ** 0.25)


def lns(x, A, F, w, i, n, e):
    x = x + A(rms(x, w["mixer_norm.scale"]) / np.sqrt(i + 1))
    return x + F(rms(x, w["ffn_norm.scale"]) / np.sqrt(i + 1))


def parallel(x, A, F, w, i, n, e):
    read = rms(x, w["norm.scale"])
    return x + A(read) + F(read)


def none(x, A, F, w, i, n, e):
    x = x + A(x)
    return x + F(x)


def blend(x, A, F, w, i, n, e):
    a = np.linspace(1.15, 1.05, n)[i] + w["stream_offset"]
    b = np.linspace(0.20, 0.05, n)[i] + w["embedding_offset"]
    return pre(a * x + b * e, A, F, w, i, n, e)


def mhc(x, A, F, w, i, n, e, form="static"):
    """X <- H_res X + H_post F(norm(H_pre X)), every weight of every token; X is [B, T, streams, width]."""
    streams = x.shape[2]
    for sub, (f, site) in enumerate(((A, "mixer"), (F, "ffn"))):
        own = (2 * i + sub) % streams
        v = {name.removeprefix(f"{site}_weights."): value for name, value in w.items()}
        if form == "static":
            residual = doubly_stochastic(v["mixing"] / 0.05, 10)
            read, write = softmax(v["reading"] - 1.0 + np.eye(streams)[own]), softmax(v["writing"])
        else:
            flat = rms(x.reshape(*x.shape[:2], -1))
            moved = {
                name: v[f"{name}_gain"] * (flat @ v[name]) + v[f"{name}_bias"] for name in ("mixing", "reading", "writing")
            }
            logits = moved["mixing"].reshape(*x.shape[:2], streams, streams) + 8.0 * np.eye(streams)
            residual = doubly_stochastic(logits, 20)
            read, write = sigmoid(moved["reading"] - 4.0 + 8.0 * np.eye(streams)[own]), 2 * sigmoid(moved["writing"])
        out = f(rms((read[..., None] * x).sum(axis=2), w[f"{site}_norm.scale"]))
        x = residual @ x + write[..., None] * out[:, :, None]
    return x


def mhc_dynamic(x, A, F, w, i, n, e):
    return mhc(x, A, F, w, i, n, e, form="dynamic")


EQUATIONS = {
    "pre": (pre, {"name": "pre"}),
    "post": (post, {"name": "post"}),
    "mix": (mix, {"name": "mix", "alpha": 0.5}),
    "sandwich": (peri, {"name": "sandwich"}),
    "peri": (peri, {"name": "peri"}),
    "deepnorm": (deepnorm, {"name": "deepnorm"}),
    "lns": (lns, {"name": "lns"}),
    "parallel": (parallel, {"name": "parallel"}),
    "none": (none, {"name": "none"}),
    "blend": (blend, {"name": "blend"}),
    "mhc": (mhc, {"name": "mhc", "streams": 3}),
    "mhc_dynamic": (mhc_dynamic, {"name": "mhc", "form": "dynamic", "streams": 3}),
}


@functools.cache
def applied(graph: Any, attends: bool) -> Any:
    """One sub-layer, compiled once for all placements."""

    def sublayer(state: Any, x: jax.Array) -> jax.Array:
        module = nnx.merge(graph, state)
        return module(x, module.prepare(x.shape[1], None)) if attends else module(x)

    return jax.jit(sublayer)


def layers_of(model: nnx.Module) -> list[tuple[Any, Any, dict[str, np.ndarray]]]:
    """For each executed layer: mixer and feed-forward layer as functions, and the parameters of its placement in float64."""
    found = []
    stack = model.stack()
    for place in stack.places:
        block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
        sublayers = []
        for module in (block.mixer, block.ffn):
            graph, state = nnx.split(module)
            call = functools.partial(applied(graph, module is block.mixer), state)
            sublayers.append(lambda x, call=call: np.asarray(call(jnp.asarray(x, jnp.float32)), np.float64))
        own = {".".join(p): np.asarray(v[...], np.float64) for p, v in nnx.to_flat_state(nnx.state(block.placement))}
        found.append((*sublayers, own))
    return found


def by_equation(model: nnx.Module, layer: Any, tokens: jax.Array) -> np.ndarray:
    """Logits by one equation a layer; the sub-layers are the model's own, norms and residual paths those above."""
    name, layers = model.options.placement.name, layers_of(model)
    x = e = np.asarray(model.embedding.table[...], np.float64)[np.asarray(tokens)]
    if name == "peri":
        x = e = rms(e, np.asarray(model.embedding_norm.scale[...], np.float64))
    if name == "mhc":
        x = np.stack([e] * model.options.placement.streams, axis=2)
    for i, (mixer, ffn, own) in enumerate(layers):
        x = layer(x, mixer, ffn, own, i, len(layers), e)
    x = x.sum(axis=2) if name == "mhc" else x
    if name not in ("deepnorm", "none"):
        x = rms(x, np.asarray(model.final_norm.scale[...], np.float64))
    return x @ np.asarray(model.head_kernel[...], np.float64)


def small(config: Any, placement: dict, **fields: Any) -> dict:
    return config(width=8, heads=1, layers=4, placement=placement, ffn={"name": "gelu", "hidden": 8}, **fields)


@pytest.mark.parametrize(("layer", "placement"), EQUATIONS.values(), ids=EQUATIONS)
def test_a_placement_is_its_equation(config, awake, tokens, run, layer, placement):
    model, rows = awake(small(config, placement)), tokens(2, 5)
    expected = by_equation(model, layer, rows)
    found = run(model, rows, depth={"name": "sequential", "unroll": False})
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "placement",
    [p if name == "mhc_dynamic" else pytest.param(p, marks=pytest.mark.slow, id=name) for name, (_, p) in EQUATIONS.items()],
    ids=str,
)
def test_every_placement_decodes_step_by_step_and_learns_in_every_layer(config, awake, gradients, run, jit, tokens, placement):
    model, rows, depth = awake(small(config, placement)), tokens(2, 5), {"name": "sequential", "unroll": False}
    graph, state = nnx.split(model)
    expected = np.asarray(run(model, rows, depth=depth))
    step = jit(lambda state, tokens, cache: nnx.merge(graph, state).step(tokens, cache))
    cache = model.init_cache(2, 5)
    for t in range(5):
        one, cache = step(state, rows[:, t : t + 1], cache)
        np.testing.assert_allclose(one[:, 0], expected[:, t], atol=1e-5 * np.abs(expected).max())
    # The streams are summed after the last layer: how it mixes them keeps that sum, and so do weights of writing that sum to 1.
    idle = {"mhc": ("ffn_weights.mixing", "ffn_weights.writing")}.get(placement["name"], ())
    for path, found in gradients(model, rows, depth=depth).items():
        for i, own in enumerate(found if path.startswith("blocks") else found[None]):
            assert np.isfinite(own).all(), (path, i)
            last = i == 3 and idle and path.endswith(idle[: 1 if placement.get("form") == "dynamic" else 2])
            # Streams start equal: how the first mixer weighs them is a factor that its norm takes out.
            first = i == 0 and placement.get("form") != "dynamic" and path.endswith("mixer_weights.reading")
            if last or first:
                assert np.abs(own).max() < 1e-5, path
            else:
                assert np.abs(own).max() > 0, (path, i)


@pytest.mark.parametrize("name", sorted({p["name"] for _, p in EQUATIONS.values()}))
def test_what_a_norm_follows_starts_away_from_zero(name):
    """A norm of zeros has no direction: where a norm follows what a sub-layer writes, the writing matrix is drawn."""
    model = options.Model(placement=models.construct.resolve_model({"placement": {"name": name}}).placement)
    drawn = model.at(0).initial_std("out", 128) > 0
    assert drawn == (name in ("sandwich", "peri", "deepnorm"))


def test_the_streams_of_mhc_start_as_in_the_released_code():
    option, model = options.HyperConnections(), options.Model(width=8, layers=4)
    weights = [Static(option, model, sub, rngs=nnx.Rngs(0)) for sub in (0, 1)]
    matrix = np.asarray(weights[0].residual(None))
    np.testing.assert_allclose(np.diag(matrix), 0.99986, atol=1e-5)
    np.testing.assert_allclose(matrix[~np.eye(4, dtype=bool)], 4.5e-5, atol=5e-6)
    for layer in range(5):
        for sub in (0, 1):
            read = np.asarray(weights[sub].read(None, Context(None, jnp.int32(layer), None)))
            assert read.argmax() == (2 * layer + sub) % 4
            np.testing.assert_allclose(np.sort(read)[::-1], [0.475, 0.175, 0.175, 0.175], atol=5e-4)
    np.testing.assert_allclose(weights[0].write(None), [0.25] * 4)


@pytest.mark.parametrize(("spread", "iterations", "tolerance"), [(1.0, 10, 1e-3), (3.0, 20, 3e-2)])
def test_rows_and_columns_of_a_mixing_matrix_sum_to_one(spread, iterations, tolerance):
    logits = jnp.asarray(spread * np.random.default_rng(0).standard_normal((64, 4, 4)), jnp.float32)
    found = np.asarray(sinkhorn(logits, iterations))
    assert (found > 0).all()
    np.testing.assert_allclose(found.sum(axis=-2), 1.0, atol=1e-5)  # columns are scaled last
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, atol=tolerance)
    np.testing.assert_allclose(found, doubly_stochastic(logits, iterations), atol=1e-5)


def test_dynamic_mhc_depends_on_the_token_from_a_gain_of_a_hundredth():
    option, model = options.HyperConnections(form="dynamic"), options.Model(width=8, layers=4)
    weights = Dynamic(option, model, 0, rngs=nnx.Rngs(0))
    h = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 8)), jnp.float32)
    assert {float(getattr(weights, f"{name}_gain")[...]) for name in ("mixing", "reading", "writing")} == {
        float(np.float32(0.01))
    }
    context = Context(None, jnp.int32(0), None)
    for found in (weights.residual(h), weights.read(h, context), weights.write(h)):
        assert found.shape[:2] == (2, 3) and np.ptp(found, axis=(0, 1)).max() > 0
    np.testing.assert_allclose(weights.write(h), 1.0, atol=0.1)
    np.testing.assert_allclose(weights.residual(h).sum(axis=-1), 1.0, atol=1e-4)
    # Sizes of the stream do not matter: the weights read its direction.
    np.testing.assert_allclose(weights.residual(10 * h), weights.residual(h), atol=1e-6)


def test_the_scales_of_blend_start_on_a_line_over_the_layers():
    placement = Blend(options.Blend(), options.Model(layers=5), rngs=nnx.Rngs(0))
    assert placement.stream_offset[...] == placement.embedding_offset[...] == 0
    for layer in range(5):
        a, b = placement.scales(jnp.int32(layer))
        assert float(a) == pytest.approx(1.15 - 0.10 * layer / 4, abs=1e-6)
        assert float(b) == pytest.approx(0.20 - 0.15 * layer / 4, abs=1e-6)


@pytest.mark.parametrize("name", ["blend", "mhc", "lns"])
def test_what_depends_on_the_layer_follows_the_executed_one_when_blocks_are_looped(config, awake, run, tokens, name):
    layer, placement = EQUATIONS[name]
    model = awake(small(config, placement, depth={"name": "recursive", "loops": 2}))
    expected = by_equation(model, layer, tokens(2, 5))
    np.testing.assert_allclose(run(model, tokens(2, 5)), expected, atol=2e-5 * np.abs(expected).max())
