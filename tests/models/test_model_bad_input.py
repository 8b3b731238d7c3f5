"""Depths, placements and linear layers that cannot work are refused before anything is built, each with its reason."""

from __future__ import annotations

import functools

import jax
import pytest
from flax import nnx

import models
from models import options
from models.transformer import depth_options
from strata import ConfigError, resolve


def problems(tree: dict) -> dict[str, str]:
    _, found = resolve(options.Model, tree, "model")
    return {path: " ".join(p.message for p in found.problems if p.path == path) for path in {p.path for p in found.problems}}


def parallel(**fields: object) -> dict:
    return {"depth": {"name": "layer_parallel", **fields}}


def recursive(**fields: object) -> dict:
    return {"depth": {"name": "recursive", **fields}}


def hybrid(*names: str) -> dict:
    return {"name": "hybrid", "pattern": [{"name": name} for name in names]}


SIZES = {"width": 16, "layers": 6, "heads": 2, "kv_heads": 1, "ffn": {"name": "gelu", "hidden": 24}}

REFUSED = {
    "a suffix longer than the stack": (
        parallel(layers=7),
        "depth.layers",
        "a suffix of 7 layers is longer than the stack of 6",
    ),
    "a regularised suffix longer than the stack": (
        parallel(layers=2, suffixes=[2, 9], forward="sequential", regularizer=0.1),
        "depth.suffixes",
        "a suffix of 9 layers is longer than the stack of 6",
    ),
    "a suffix of no layers": (parallel(layers=2, suffixes=[0]), "depth.suffixes", "at least 1"),
    "no sweep": (parallel(layers=2, sweeps=0), "depth.sweeps", "at least 1"),
    "an unknown correction": (parallel(layers=2, correction="newton"), "depth.correction", "identity"),
    "chunks that do not divide the suffix": (parallel(layers=4, fused=3), "depth.fused", "do not divide the 4 layers"),
    "a Jacobian of fused chunks": (
        parallel(layers=4, fused=2, correction="exact"),
        "depth.correction",
        "defined for single blocks",
    ),
    "fused post-norm blocks": (
        parallel(layers=4, fused=2) | {"placement": {"name": "post"}},
        "depth.fused",
        "which post-norm and parallel blocks lack",
    ),
    "fused blocks, some of them post-norm": (
        parallel(layers=6, fused=2) | {"placement": {"name": "mix"}},
        "depth.fused",
        "which post-norm and parallel blocks lack",
    ),
    "a form of the regulariser that is not used": (
        parallel(layers=2, stride=1, form="paper", forward="sequential", regularizer=0.1),
        "depth.form",
        "this is neither",
    ),
    "a regulariser of the parallel forward pass": (
        parallel(layers=2, regularizer=0.1),
        "depth.regularizer",
        "needs forward = 'sequential'",
    ),
    "HCN without streams": (parallel(layers=2, correction="hcn"), "depth.correction", "'mhc' has them"),
    "HCN over blend": (
        parallel(layers=2, correction="hcn") | {"placement": {"name": "blend"}},
        "depth.correction",
        "'mhc' has them",
    ),
    "residual scales that do not exist": (parallel(layers=2, correction="scaled"), "depth.correction", "'blend' has them"),
    "loops that do not divide the depth": (recursive(loops=4), "depth.loops", "4 loops do not divide 6 layers"),
    "more loops than layers": (recursive(loops=12), "depth.loops", "12 loops do not divide 6 layers"),
    "adapters of a rank that no matrix has": (
        recursive(loops=2, rank=17),
        "depth.rank",
        "no matrix of the blocks has rank 17",
    ),
    "leaving early while training": (recursive(loops=2, exit=1), "depth.exit", "belongs to evaluation"),
    "leaving when confident while training": (
        recursive(loops=2, confidence=0.9),
        "depth.confidence",
        "belongs to evaluation",
    ),
    "leaving at a loop that does not exist": (recursive(loops=2, exit=3), "depth.exit", "there are 2 loops to leave"),
    "a confidence above one": (recursive(loops=2, confidence=1.5), "depth.confidence", "at most 1"),
    "a scale of no adapters": (recursive(loops=2, alpha=2.0), "depth.alpha", "rank = 0"),
    "distillation into no exit": (recursive(loops=2, exit_distillation=1.0), "depth.exit_distillation", "exits = 'none'"),
    "LoRA of a rank that no matrix has": (
        {"linear": {"name": "lora", "rank": 17}},
        "linear.rank",
        "no matrix of the blocks has rank 17; the largest",
    ),
    "NOBLE as wide as a matrix": (
        {"linear": {"name": "noble", "rank": 8}},
        "linear.rank",
        "must be narrower than every matrix, and attention.key is 16 x 8",
    ),
    "gates of gates": ({"linear": {"name": "noble", "rank": 4, "activation": "swiglu"}}, "linear.depth", "give depth = 1"),
    "Mix-LN over a parallel block": (
        {"placement": {"name": "mix", "rest": "parallel"}},
        "placement.rest",
        "a parallel block has one norm for both",
    ),
    "Mix-LN of a parallel block first": (
        {"placement": {"name": "mix", "first": "parallel"}},
        "placement.first",
        "a parallel block has one norm for both",
    ),
    "Mix-LN of a norm that no layer has": (
        {"placement": {"name": "mix", "rest": "peri"}},
        "placement.rest",
        "take sandwich",
    ),
    "Mix-LN of streams": ({"placement": {"name": "mix", "rest": "mhc"}}, "placement.rest", "several residual streams"),
    "Mix-LN of Mix-LN": ({"placement": {"name": "mix", "first": "mix"}}, "placement.first", "expected a placement"),
    "Mix-LN of what does not exist": (
        {"placement": {"name": "mix", "first": "posd"}},
        "placement.first",
        "expected a placement",
    ),
    "more than all layers": ({"placement": {"name": "mix", "alpha": 1.1}}, "placement.alpha", "at most 1"),
    "Mix-LN without post-LN": (
        {"placement": {"name": "mix", "alpha": 0.05}},
        "placement.alpha",
        "6 unique layers it rounds to none",
    ),
    "Mix-LN without pre-LN": (
        {"placement": {"name": "mix", "alpha": 0.95}},
        "placement.alpha",
        "6 unique layers it rounds to all",
    ),
    "Mix-LN of shared layers, without post-LN": (
        recursive(loops=6) | {"placement": {"name": "mix"}},
        "placement.alpha",
        "of 1 unique layers it rounds to none",
    ),
    "a hybrid without its last mixers": (
        {"mixer": hybrid(*["retention"] * 6, "gla", "attention")},
        "mixer.pattern",
        "8 mixers are more than the 6 layers: the last would be in none (gla, attention)",
    ),
    "a looped hybrid without its last mixer": (
        recursive(loops=2) | {"mixer": hybrid("gla", "gla", "gla", "attention")},
        "mixer.pattern",
        "the 3 layers that 2 loops share: the last would be in none (attention)",
    ),
    "LayerNorm Scaling with scaled outputs": (
        {"placement": {"name": "lns"}, "output_init": "scaled"},
        "placement.name",
        "cancel each other",
    ),
    "so in the later layers of a mixture": (
        {"placement": {"name": "mix", "rest": "lns"}, "output_init": "scaled"},
        "placement",
        "cancel each other",
    ),
    "a slope of zero": ({"norm": {"name": "dyt", "alpha": 0.0}}, "norm.alpha", "above 0"),
}


@pytest.mark.parametrize(("fields", "path", "reason"), REFUSED.values(), ids=[name.replace(" ", "_") for name in REFUSED])
def test_a_config_that_cannot_work_is_refused_with_the_reason(fields, path, reason):
    found = problems(SIZES | fields)
    assert set(found) == {f"model.{path}"}
    assert reason in found[f"model.{path}"]
    with pytest.raises(ConfigError):
        models.abstract(SIZES | fields, vocab_size=11)


ACCEPTED = {
    "a suffix of the whole stack and more sweeps than layers": parallel(layers=6, sweeps=9),
    "as many loops as layers": recursive(loops=6),
    "one loop": recursive(loops=1),
    "adapters wider than some matrices": recursive(loops=2, rank=16),
    "LoRA wider than some matrices": {"linear": {"name": "lora", "rank": 16}},
    "NOBLE one narrower than the smallest matrix": {"linear": {"name": "noble", "rank": 7}},
    "a control without branch": {"linear": {"name": "noble", "rank": 0}},
    "sandwich after post": {"placement": {"name": "mix", "rest": "sandwich"}},
    "HCN over streams": parallel(layers=2, correction="hcn") | {"placement": {"name": "mhc"}},
    "fused pre-norm blocks after post-norm ones": parallel(layers=4, fused=2) | {"placement": {"name": "mix"}},
    "Mix-LN of one kind, asked for": {"placement": {"name": "mix", "alpha": 1.0}},
    "Mix-LN with one layer of the other kind": {"placement": {"name": "mix", "alpha": 0.9}},
    "a pattern as long as the loop": recursive(loops=2) | {"mixer": hybrid("gla", "gla", "attention")},
    "fused streams": parallel(layers=4, fused=2, correction="hcn") | {"placement": {"name": "mhc"}},
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=[name.replace(" ", "_") for name in ACCEPTED])
def test_what_is_at_the_edge_is_accepted(fields):
    assert problems(SIZES | fields) == {}


# Requests on the weights of a model.

PLAIN = SIZES
LOOPED = SIZES | recursive(loops=3, rank=2)
RESCALED = SIZES | recursive(loops=3, rank=2, alpha=4.0)
HYPER = SIZES | {"placement": {"name": "mhc"}}

REQUESTS = {
    "a long suffix": (PLAIN, {"name": "layer_parallel", "layers": 7}, "depth.layers", "longer than the stack of 6"),
    "HCN without streams": (
        PLAIN,
        {"name": "layer_parallel", "layers": 2, "correction": "hcn"},
        "depth.correction",
        "'mhc' has them",
    ),
    "scales of streams": (
        HYPER,
        {"name": "layer_parallel", "layers": 2, "correction": "scaled"},
        "depth.correction",
        "'blend' has them",
    ),
    "loops of a plain model": (PLAIN, {"name": "recursive", "loops": 2}, "depth.loops", "runs its blocks in 1 loops"),
    "other loops": (LOOPED, {"name": "recursive", "loops": 2}, "depth.loops", "runs its blocks in 3 loops"),
    "another rank": (LOOPED, {"name": "recursive", "rank": 4}, "depth.rank", "have rank 2"),
    "another scale": (RESCALED, {"name": "recursive", "rank": 2, "alpha": 2.0}, "depth.alpha", "scaled by 2"),
    "an exit that does not exist": (LOOPED, {"name": "recursive", "exit": 4}, "depth.exit", "there are 3 loops to leave"),
    "two ways to leave": (
        LOOPED,
        {"name": "recursive", "exit": 1, "confidence": 0.5},
        "depth.confidence",
        "not both",
    ),
    "an unknown field": (PLAIN, {"name": "layer_parallel", "layer": 2}, "depth.layer", "did you mean depth.layers"),
}


@pytest.mark.parametrize(("built", "asked", "path", "reason"), REQUESTS.values(), ids=[n.replace(" ", "_") for n in REQUESTS])
def test_a_request_that_the_weights_cannot_serve_is_refused_with_the_reason(built, asked, path, reason):
    model = models.construct.resolve_model(built)
    with pytest.raises(ConfigError) as error:
        depth_options(asked, model)
    assert {problem.path for problem in error.value.problems} == {path}
    assert reason in str(error.value)


def test_a_request_is_checked_where_it_is_made():
    graph, state = nnx.split(models.abstract(PLAIN, vocab_size=11))
    tokens = jax.ShapeDtypeStruct((1, 4), "int32")

    def decode(state, tokens, depth):
        model = nnx.merge(graph, state)
        return model.step(tokens, model.init_cache(1, 4), depth=depth)

    with pytest.raises(ConfigError, match="longer than the stack of 6"):
        depth = {"name": "layer_parallel", "layers": 7}
        jax.eval_shape(lambda state, tokens: nnx.merge(graph, state)(tokens, depth=depth), state, tokens)
    with pytest.raises(ConfigError, match="runs its blocks in 1 loops"):
        jax.eval_shape(functools.partial(decode, depth={"name": "recursive", "loops": 2}), state, tokens)


def ids(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


TOKENS = {
    "no position": (ids(2, 0), r"tokens have the shape \[B, T\], each at least 1, not \[2, 0\]"),
    "no sequence": (ids(0, 4), r"not \[0, 4\]"),
    "one axis": (ids(4), r"not \[4\]"),
    "real numbers": (ids(2, 4, dtype="float32"), "tokens are an array of whole numbers, not of float32"),
}


@pytest.mark.parametrize(("tokens", "message"), TOKENS.values(), ids=[name.replace(" ", "_") for name in TOKENS])
def test_tokens_are_whole_numbers_of_sequences(tokens, message):
    model = models.abstract(PLAIN, vocab_size=11)
    for call in (lambda model, x: model(x), lambda model, x: model.step(x, model.init_cache(2, 4))):
        with pytest.raises(ConfigError, match=message):
            nnx.eval_shape(call, model, tokens)
    with pytest.raises(ConfigError, match="tokens are an array of whole numbers, not of list"):
        model([[1, 2]])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (ids(2, 3), r"segment_ids have the shape \[2, 4\] of the tokens, not \[2, 3\]"),
        (ids(1, 4), r"not \[1, 4\]"),
        (ids(4), r"not \[4\]"),
        (ids(2, 4, dtype="float32"), "segment_ids are an array of whole numbers, not of float32"),
    ],
)
def test_segments_are_those_of_the_tokens(segments, message):
    model = models.abstract(PLAIN, vocab_size=11)
    with pytest.raises(ConfigError, match=message):
        nnx.eval_shape(lambda model, x, s: model(x, segment_ids=s), model, ids(2, 4), segments)


def test_a_step_fits_its_cache():
    def decode(model, tokens):
        return model.step(tokens, model.init_cache(2, 4))[0]

    linear, mixed = SIZES | {"mixer": {"name": "gla"}}, SIZES | {"mixer": hybrid("gla", "attention")}
    for built, room in ((PLAIN, "2 sequences of at most 4 tokens"), (linear, "2 sequences"), (mixed, "of at most 4 tokens")):
        model = models.abstract(built, vocab_size=11)
        assert nnx.eval_shape(decode, model, ids(2, 4)).shape == (2, 4, 11)
        for tokens in (ids(3, 1), ids(1, 1), *([ids(2, 5)] if "tokens" in room else [])):
            with pytest.raises(ConfigError, match=f"do not fit a cache for .*{room}"):
                nnx.eval_shape(decode, model, tokens)
    assert nnx.eval_shape(decode, models.abstract(linear, vocab_size=11), ids(2, 9)).shape == (2, 9, 11)


@pytest.mark.parametrize(
    ("built", "asked"),
    [
        (LOOPED, {"name": "sequential"}),
        (LOOPED, {"name": "recursive"}),
        (LOOPED, {"name": "recursive", "exit": 2}),
        (LOOPED, {"name": "recursive", "rank": 2, "confidence": 0.5}),
        (RESCALED, {"name": "recursive", "rank": 2, "alpha": 4.0, "exit": 1}),
        (LOOPED, {"name": "layer_parallel", "layers": 6, "sweeps": 6}),
        (HYPER, {"name": "layer_parallel", "layers": 3, "correction": "hcn"}),
        (PLAIN, {"name": "recursive", "loops": 1, "exit": 1}),
    ],
)
def test_the_same_weights_run_in_other_ways(built, asked):
    model = models.construct.resolve_model(built)
    option = depth_options(asked, model)
    assert option.name == asked["name"]
    assert depth_options(option, model) == option
