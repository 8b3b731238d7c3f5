"""Depth diagnostics: each is what its formula says, for every way to build a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.placements.placement import leave_stream
from optim.options import Optimizer
from optim.recipe import RecipeState
from optim.roles import by_path, parameters
from strata import implementation, lookup, registry
from trainer import config as configuration
from trainer.diagnostics.attention_entropy import attention_weights
from trainer.diagnostics.measure import Diagnosis, plain
from trainer.diagnostics.options import KIND, Diagnostics
from trainer.diagnostics.trace import Trace
from trainer.metrics.jsonl import encode
from trainer.setup import assemble

VOCAB, LAYERS, WIDTH = 11, 4, 16
EVERY = tuple(Diagnostics().chosen)
PLACEMENTS = registry.names("model.placement")


def model_of(placement=None, **fields):
    """An abstract model of four layers; with streams, of few iterations, so that it is small when written out."""
    if placement is not None:
        small = {"mhc": {"streams": 2, "iterations": 1}, "mix": {"alpha": 0.5}}
        fields["placement"] = {"name": placement} | small.get(placement, {})
    return models.abstract({"width": WIDTH, "layers": LAYERS, "heads": 2, **fields}, vocab_size=VOCAB)


def drawn(model, seed=0):
    """Every parameter at work: gains around 1, nothing at zero."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        around, spread = (1.0, 0.3) if path[-1] == "scale" else (0.0, 0.3)
        flat[path] = jnp.asarray(around + spread * rng.standard_normal(variable.shape), jnp.float32)
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def batch_of(tokens, segments=None):
    tokens = np.asarray(tokens, np.int32)
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments, np.int32)
    targets = np.roll(tokens, -1, axis=1)
    weights = ((segments > 0) & (segments == np.roll(segments, -1, axis=1))).astype(np.float32)
    weights[:, -1] = 0
    return {key: jnp.asarray(x) for key, x in
            {"tokens": tokens, "targets": targets, "segment_ids": segments, "weights": weights}.items()}  # fmt: skip


BATCH = batch_of(np.random.default_rng(3).integers(0, VOCAB, (3, 8)), [[1] * 8, [1] * 5 + [2] * 3, [1] * 6 + [0] * 2])


@pytest.fixture
def traced():
    """`traced(model, params, batch)`: a trace, by default without a backward pass.

    Not under jit: operations of the same shapes are compiled once for all tests.
    """
    with jax.disable_jit():

        def make(model, params=None, batch=BATCH, momentum=None, names=("stream",), **option):
            params = drawn(model) if params is None else params
            variables = nnx.to_flat_state(nnx.state(model))
            own = frozenset(".".join(map(str, p)) for p, v in variables if v.get_metadata().get("executed"))
            option = Diagnostics(names=names, **option)
            state = RecipeState(jnp.int32(0), {"matrix": {"momentum": momentum or {}}})
            return Trace(nnx.graphdef(model), params, batch, state, Optimizer(), parameters(model), own, option)

        yield make


def measure(name, trace):
    return jax.tree.map(np.asarray, implementation(lookup(KIND, name))(trace))


def loss_of(trace):
    """The loss of a batch as training computes it."""
    model, batch, cap = trace.model, trace.batch, trace.model.options.logit_softcap
    hidden = model.final_norm(trace.states[-1])
    nats, _ = models.cross_entropy(hidden, model.output_kernel(), batch["targets"], batch["weights"], cap=cap)
    return float(nats / jnp.sum(batch["weights"]))


def changed(params, change):
    """A copy of parameters with `change(path, array)` of each leaf in the stack."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: change(".".join(k.key for k in keys), x) if keys[0].key == "blocks" else x, params
    )


def silent(path, array):
    """Projections that write to the stream at zero: every branch is 0."""
    return array * 0 if ".out." in path or ".down." in path else array


# ---- every placement, every kind of stack


@pytest.mark.parametrize(
    "placement", [name if name in ("pre", "mhc") else pytest.param(name, marks=pytest.mark.slow) for name in PLACEMENTS]
)
def test_every_diagnostic_runs_for_every_placement_and_the_taps_are_the_models_own_pass(traced, placement):
    model = model_of(placement)
    trace = traced(model, names=None)
    found = {name: measure(name, trace) for name in EVERY if name != "momentum_spectrum"}
    assert found.pop("loop_change") == {}
    expected = nnx.merge(nnx.graphdef(model), nnx.State(trace.params))(BATCH["tokens"], segment_ids=BATCH["segment_ids"])
    np.testing.assert_allclose(trace.logits(trace.states[-1]), expected, rtol=2e-4, atol=2e-5)
    for name, tree in found.items():
        for path, values in jax.tree_util.tree_leaves_with_path(tree):
            triangle = name in ("angular_distance", "skip_effect") and values.ndim == 2
            assert np.isnan(values).sum() == (LAYERS * (LAYERS + 1) // 2 if triangle else 0), (name, path)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_branch_of_zero_contributes_nothing_and_its_cosine_is_defined(traced, placement):
    model = model_of(placement)
    trace = traced(model, changed(drawn(model), silent))
    for part in ("mixer", "ffn", "layer"):
        np.testing.assert_allclose(measure("contribution", trace)[part], 0, atol=2e-6)
        cosine = measure("cosine", trace)[part]
        assert np.isfinite(cosine).all()
        if placement in ("pre", "lns", "none", "sandwich"):
            assert (measure("contribution", trace)[part] == 0).all() and (cosine == 0).all()


def test_leaving_out_a_layer_whose_branches_are_zero_changes_nothing_at_all(traced):
    model = model_of()
    quiet = changed(drawn(model), lambda path, x: silent(path, x) if x.shape[0] != LAYERS else
                    jnp.concatenate([x[:2], silent(path, x[2:3]), x[3:]]))  # fmt: skip
    found = measure("skip_effect", traced(model, quiet))
    assert found["output"][2] == 0 and found["loss"][2] == 0 and found["later"][2, 3] == 0
    assert (found["output"][[0, 1, 3]] > 0).all() and (found["loss"][[0, 1, 3]] != 0).all()
    assert np.isnan(found["later"][np.tril_indices(LAYERS)]).all()


def test_the_skip_effect_is_that_of_the_model_without_the_layer(traced):
    model = model_of()
    whole = traced(model)
    found = measure("skip_effect", whole)
    for s in range(LAYERS):
        without = traced(model, changed(whole.params, lambda path, x, s=s: x.at[s].set(silent(path, x[s]))))
        assert found["loss"][s] == pytest.approx(loss_of(without) - loss_of(whole), abs=2e-5)
        for later in range(s + 1, LAYERS):
            with_it, less = (t.states[later + 1] - t.states[later] for t in (whole, without))
            ratio = np.linalg.norm(with_it - less, axis=-1) / np.linalg.norm(with_it, axis=-1)
            assert found["later"][s, later] == pytest.approx(ratio[np.asarray(whole.mask) > 0].max(), rel=1e-3)


def test_contributions_of_a_pre_norm_layer_are_the_ratios_of_the_paper(traced):
    trace = traced(model_of())
    h = trace.states
    mixed, out = [], h[1:]
    for number, place in enumerate(trace.stack.places):
        block = trace.stack.block(place.kind, trace.stack.gather(place.kind, [place]))
        block = nnx.merge(nnx.graphdef(block), jax.tree.map(lambda x: x[0], nnx.state(block)))
        mixed.append(block.halves(h[number], trace.forward.context(place.kind, number))[0])
    middle, h = jnp.stack(mixed), h[:-1]
    for part, (update, base) in {
        "mixer": (middle - h, h),
        "ffn": (out - middle, middle),
        "layer": (out - h, h),
    }.items():
        lengths = np.linalg.norm(update, axis=-1), np.linalg.norm(base, axis=-1)
        np.testing.assert_allclose(measure("contribution", trace)[part], trace.mean(lengths[0] / lengths[1]), rtol=1e-4)
        cosine = np.sum(np.asarray(update * base), axis=-1) / (lengths[0] * lengths[1])
        np.testing.assert_allclose(measure("cosine", trace)[part], trace.mean(cosine), rtol=1e-3, atol=1e-5)


def test_post_norm_with_unit_gains_has_a_stream_of_root_mean_square_one(traced):
    model = model_of("post")
    unit = changed(drawn(model), lambda path, x: jnp.ones_like(x) if path.endswith("norm.scale") else x)
    np.testing.assert_allclose(measure("stream", traced(model, unit))["rms"][1:], 1, rtol=1e-4)


def test_streams_are_seen_through_their_sum(traced):
    model = model_of("mhc")
    trace = traced(model, changed(drawn(model), silent), names=None)
    # Doubly stochastic mixing keeps the sum: layers that write nothing leave it as it is.
    np.testing.assert_allclose(trace.states, np.broadcast_to(trace.states[0], trace.states.shape), rtol=1e-4, atol=1e-5)
    assert trace.gradients[1].shape == (LAYERS + 1, 3, 8, 2, WIDTH)
    start = jnp.repeat(trace.forward.embedding[:, :, None], 2, axis=2)
    np.testing.assert_allclose(trace.states[0], leave_stream(model.options, start), rtol=1e-6)


def test_what_padding_holds_changes_nothing(traced):
    model, rng = model_of(), np.random.default_rng(5)
    segments = np.ones((3, 8), np.int32)
    segments[1, 5:] = segments[2] = 0
    tokens = rng.integers(0, VOCAB, (3, 8))
    others = np.where(segments > 0, tokens, rng.integers(0, VOCAB, (3, 8)))
    one, two = (traced(model, batch=batch_of(filled, segments), names=None) for filled in (tokens, others))
    assert (tokens != others).any()
    for name in set(EVERY) - {"momentum_spectrum", "heavy_tail"}:
        for a, b in zip(*(jax.tree.leaves(measure(name, trace)) for trace in (one, two)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


PLUGIN = '''
import jax.numpy as jnp
from flax import nnx
from strata import option, options, register
from models.layers.linear import projection


@register("model.mixer", "running_mean", implementation="running_mean_plugin:Mean")
@options
class MeanOptions:
    """The mean of all earlier tokens, projected: no softmax, no heads."""

    def projections(self, model):
        return {"out": (model.width, model.width)}


class Mean(nnx.Module):
    def __init__(self, option, model, *, rngs):
        self.out = projection(model, "out", ("heads", "embed"), (model.width, model.width), rngs=rngs)

    def prepare(self, length, segment_ids):
        return 1 / jnp.arange(1.0, length + 1)[None, :, None]

    def __call__(self, x, shared):
        return self.out(jnp.cumsum(x, axis=1) * shared)
'''


def test_a_hybrid_stack_has_no_entropy_where_there_is_no_softmax(traced, tmp_path, monkeypatch):
    (tmp_path / "running_mean_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry._components, "model.mixer", dict(registry._components["model.mixer"]))
    __import__("running_mean_plugin")
    model = model_of(mixer={"name": "hybrid", "pattern": [{"name": "running_mean"}, {"name": "attention"}]})
    trace = traced(model, names=None)
    found = {name: measure(name, trace) for name in EVERY if name not in ("momentum_spectrum", "loop_change")}
    for values in found["attention_entropy"].values():
        assert values.shape == (LAYERS, 2) and np.isnan(values[::2]).all() and np.isfinite(values[1::2]).all()
    assert (np.isnan(found["heavy_tail"]["mixer.query"]) == [True, False] * 2).all()
    assert np.isfinite(found["heavy_tail"]["ffn.up"]).all() and (found["gradient_norm"]["parameters"] > 0).all()
    row = plain(found["attention_entropy"])
    assert row["mean"][0] == [None, None] and "NaN" not in encode({"step": 1, "split": "diagnostics", **row})


# ---- loops


RECURSIVE = {"depth": {"name": "recursive", "loops": 2}}


def test_gradients_of_shared_weights_are_sums_over_the_loops(traced):
    looped, flat = model_of(**RECURSIVE), model_of()
    params = drawn(looped)
    unrolled = changed(params, lambda path, x: jnp.concatenate([x, x]))
    one, two = (traced(model, params, names=None) for model, params in ((looped, params), (flat, unrolled)))
    each = by_path(two.gradients[0]["blocks"])
    squares = sum(np.sum(np.square(np.asarray(g[:2] + g[2:])), axis=tuple(range(1, g.ndim))) for g in each.values())
    np.testing.assert_allclose(measure("gradient_norm", one)["parameters"], np.sqrt(squares), rtol=1e-3)
    np.testing.assert_allclose(measure("gradient_norm", one)["states"], measure("gradient_norm", two)["states"], rtol=1e-3)


def test_adapters_of_executed_layers_count_in_the_layer_that_shares_the_rest(traced):
    model = model_of(depth={"name": "recursive", "loops": 2, "rank": 2})
    trace = traced(model, names=None)
    assert trace.executed
    tree = by_path(trace.gradients[0]["blocks"])
    total = sum(float(jnp.sum(jnp.square(g))) for g in tree.values())
    found = measure("gradient_norm", trace)["parameters"]
    assert found.shape == (2,) and np.sum(np.square(found)) == pytest.approx(total, rel=1e-4)
    kinds = {path: trace.declared[path].positions for path in trace.executed}
    for values in trace.per_layer({path: jnp.asarray(places, jnp.float32) for path, places in kinds.items()}).values():
        np.testing.assert_array_equal(values, np.arange(LAYERS))  # a row for every executed layer, in order
    everything = {name: measure(name, trace) for name in EVERY if name != "momentum_spectrum"}
    assert all(alpha.shape == (2,) and np.isfinite(alpha).all() for alpha in everything["heavy_tail"].values())
    assert len(everything["heavy_tail"]) == 7 and everything["stream"]["rms"].shape == (LAYERS + 1,)


def test_the_change_between_loops_is_that_of_their_results(traced):
    trace = traced(model_of(**RECURSIVE))
    first, second = np.asarray(trace.states[2]), np.asarray(trace.states[4])
    sizes = np.linalg.norm(first, axis=-1), np.linalg.norm(second, axis=-1)
    found = measure("loop_change", trace)
    np.testing.assert_allclose(found["relative"], [trace.mean(np.linalg.norm(second - first, axis=-1) / sizes[0])], rtol=1e-4)
    np.testing.assert_allclose(found["cosine"], [trace.mean((first * second).sum(-1) / (sizes[0] * sizes[1]))], rtol=1e-4)
    quiet = traced(model_of(**RECURSIVE), changed(trace.params, silent))
    assert measure("loop_change", quiet)["relative"] == 0


# ---- single diagnostics


def test_the_state_gradient_at_the_embedding_is_that_of_the_table(traced):
    trace = traced(model_of(), names=None)
    rows = np.zeros((VOCAB, WIDTH), np.float32)
    np.add.at(rows, np.asarray(BATCH["tokens"]), np.asarray(trace.gradients[1][0]))
    np.testing.assert_allclose(rows, trace.gradients[0]["embedding"]["table"], rtol=1e-3, atol=1e-6)


def test_angular_distances_are_between_the_states_named_by_row_and_column(traced):
    trace = traced(model_of())
    found = measure("angular_distance", trace)
    assert (found["all_tokens"][:, 0] == 0).all() and (found["last_token"][:, 0] == 0).all()
    units = np.asarray(trace.states, float)
    units /= np.linalg.norm(units, axis=-1, keepdims=True)
    angles = np.arccos(np.clip(np.sum(units[1] * units[3], axis=-1), -1, 1)) / np.pi
    assert found["all_tokens"][1, 2] == pytest.approx(float(trace.mean(angles)), rel=1e-4)
    assert found["last_token"][1, 2] == pytest.approx(np.mean([angles[0, 7], angles[1, 7], angles[2, 5]]), rel=1e-4)
    influence = trace.mean(1 - np.sum(units[:-1] * units[1:], axis=-1))
    np.testing.assert_allclose(found["influence"], influence, rtol=1e-3)


def test_the_lens_of_the_last_state_is_the_model(traced):
    trace = traced(model_of(tie_embeddings=True, logit_softcap=5.0))
    found = measure("logit_lens", trace)
    assert found["kl"][-1] == pytest.approx(0, abs=1e-6) and found["overlap"][-1] == 1
    assert found["loss"][-1] == pytest.approx(loss_of(trace), rel=1e-5)
    assert (found["kl"][:-1] > 1e-3).all() and (found["overlap"][:-1] < 1).any()
    final, first = (np.asarray(jax.nn.softmax(trace.logits(trace.states[i])), float) for i in (-1, 0))
    assert found["kl"][0] == pytest.approx(float(trace.mean(np.sum(first * np.log(first / final), axis=-1))), rel=1e-3)


def test_uniform_attention_has_the_entropy_of_as_many_choices_as_it_sees(traced):
    model = model_of(mixer={"name": "attention", "qk_norm": False})
    uniform = changed(drawn(model), lambda path, x: x * 0 if ".query." in path else x)
    found = measure("attention_entropy", traced(model, uniform))
    seen = [np.arange(1, 9), np.r_[1:6, 1:4], np.arange(1, 7)]  # keys in the own document, row by row
    expected = np.mean(np.concatenate([np.log(row[row > 1]) for row in seen]))
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["least"], 1, rtol=1e-5)


@pytest.mark.parametrize("mixer", [{"kv_heads": 1}, {"mixer": {"name": "attention", "window": 3, "qk_norm": False}}])
def test_the_attention_weights_are_those_that_the_mixer_uses(traced, mixer):
    model = nnx.merge(nnx.graphdef(built := model_of(layers=1, **mixer)), nnx.State(drawn(built)))
    state = nnx.state(model.blocks["block0"].mixer)
    graph = nnx.graphdef(model.blocks["block0"].mixer)
    layer = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 8, WIDTH)), jnp.float32)
    shared = layer.prepare(8, BATCH["segment_ids"])
    weights = attention_weights(layer, x, shared)
    v = jnp.repeat(layer.value(x).reshape(3, 8, layer.key_heads, -1), layer.heads // layer.key_heads, axis=2)
    mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(3, 8, -1)
    np.testing.assert_allclose(layer.out(mixed), layer(x, shared), rtol=1e-4, atol=1e-5)


def test_a_massive_activation_is_found_even_at_a_first_position(traced):
    model = model_of()
    params = drawn(model)
    token = int(BATCH["tokens"][0, 0])
    params["embedding"]["table"] = params["embedding"]["table"].at[token, 3].set(-500.0)
    trace = traced(model, params)
    found = measure("massive_activation", trace)
    real = np.asarray(BATCH["segment_ids"]) > 0
    sizes = np.abs(np.asarray(trace.states[0]))[real]
    assert found["max"][0] == 500 and found["ratio"][0] == pytest.approx(500 / np.median(sizes), rel=1e-5)


def test_momentum_of_orthogonal_matrices_has_equal_singular_values(traced):
    model = model_of()
    declared = parameters(model)
    square = np.linalg.qr(np.random.default_rng(0).standard_normal((LAYERS, WIDTH, WIDTH)))[0].astype(np.float32)
    square[1] = 0  # a layer that was never updated
    (path,) = [path for path in declared if path.endswith("mixer.out.kernel")]
    found = measure("momentum_spectrum", traced(model, momentum={path: jnp.asarray(square)}, quantiles=(0.0, 0.5, 1.0)))
    assert list(found) == ["mixer.out"] and found["mixer.out"].shape == (LAYERS, 3)
    np.testing.assert_allclose(found["mixer.out"][[0, 2, 3]], WIDTH**-0.5, rtol=1e-4)
    assert np.isnan(found["mixer.out"][1]).all()


def test_large_matrices_are_decomposed_in_a_few_layers_and_the_user_is_told(tiny, traced):
    whole, few = (measure("heavy_tail", traced(model_of(), largest_matrix=limit)) for limit in (WIDTH, WIDTH - 1))
    assert set(few) == set(whole)
    for site, values in few.items():  # of four layers: the first, the last, and one between
        assert np.isnan(values).tolist() == [False, False, True, False] or np.isnan(values).tolist() == [
            False,
            True,
            False,
            False,
        ]
        np.testing.assert_allclose(values[~np.isnan(values)], whole[site][~np.isnan(values)], rtol=1e-5)
    assert measure("heavy_tail", traced(model_of(), largest_matrix=WIDTH - 1, large_layers=0)) == {}
    config = configuration.resolve_config(tiny(diagnostics={"largest_matrix": 8, "large_layers": 1}))
    (note,) = Diagnosis(assemble(config)).notes
    assert "heavy_tail and momentum_spectrum look at 1 layer(s) of 7 kinds of matrix" in note and "= 8" in note
    assert Diagnosis(assemble(configuration.resolve_config(tiny()))).notes == []
