"""Initial parameters: declared, counted, and the same bits however the model is built."""

from __future__ import annotations

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import options
from models.block import Block
from models.layers.parameter import parameter
from models.stack import stacked
from strata import resolve


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_importing_models_and_its_options_loads_no_jax():
    code = "import sys, models, models.options; assert not {'jax', 'flax'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_model_declares_these_roles_and_axes():
    model = models.abstract({}, vocab_size=256)
    table = {
        ".".join(map(str, path)): (variable.shape, variable.get_metadata()["role"], variable.get_metadata()["axes"])
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    block = "blocks.block0"
    assert table == {
        "embedding.table": ((256, 128), "embedding", ("vocab", "embed")),
        f"{block}.placement.mixer_norm.scale": ((4, 128), "vector", ("layer", "embed")),
        f"{block}.placement.ffn_norm.scale": ((4, 128), "vector", ("layer", "embed")),
        f"{block}.mixer.query.kernel": ((4, 128, 128), "matrix", ("layer", "embed", "heads")),
        f"{block}.mixer.key.kernel": ((4, 128, 128), "matrix", ("layer", "embed", "kv_heads")),
        f"{block}.mixer.value.kernel": ((4, 128, 128), "matrix", ("layer", "embed", "kv_heads")),
        f"{block}.mixer.out.kernel": ((4, 128, 128), "matrix", ("layer", "heads", "embed")),
        f"{block}.mixer.query_norm.scale": ((4, 64), "vector", ("layer", "head_size")),
        f"{block}.mixer.key_norm.scale": ((4, 64), "vector", ("layer", "head_size")),
        f"{block}.ffn.gate.kernel": ((4, 128, 352), "matrix", ("layer", "embed", "mlp")),
        f"{block}.ffn.up.kernel": ((4, 128, 352), "matrix", ("layer", "embed", "mlp")),
        f"{block}.ffn.down.kernel": ((4, 352, 128), "matrix", ("layer", "mlp", "embed")),
        "final_norm.scale": ((128,), "vector", ("embed",)),
        "head_kernel": ((128, 256), "head", ("embed", "vocab")),
    }


@pytest.mark.parametrize(("kv_heads", "qk_norm", "tied"), [(4, True, False), (2, True, True), (1, False, False)])
def test_the_number_of_parameters_follows_the_formula(kv_heads, qk_norm, tied):
    width, layers, heads, size, hidden, vocab = 32, 3, 4, 6, 20, 17
    model = models.abstract(
        {
            "width": width,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_size": size,
            "mixer": {"name": "attention", "qk_norm": qk_norm},
            "ffn": {"name": "swiglu", "hidden": hidden},
            "tie_embeddings": tied,
        },
        vocab_size=vocab,
    )
    attention = 2 * width * heads * size + 2 * width * kv_heads * size + 2 * size * qk_norm
    block = attention + 3 * width * hidden + 2 * width
    expected = layers * block + width + vocab * width * (1 if tied else 2)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model))) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_parameter_is_float32_whatever_the_compute_type(config, params, precision):
    model = models.build(config(), vocab_size=11, seed=0, precision=precision)
    assert {value.dtype for value in params(model).values()} == {jnp.dtype("float32")}


def test_an_abstract_model_is_a_built_one_without_values(config):
    shape = {"vocab_size": 11, "remat": "dots"}
    abstract = models.abstract(config(), vocab_size=11)
    built = models.build(config(), seed=0, vocab_size=11)
    assert nnx.graphdef(abstract) == nnx.graphdef(built)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(abstract)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), nnx.state(built)
    )
    assert nnx.graphdef(models.build(config(), seed=0, **shape)) != nnx.graphdef(built)


def test_the_same_seed_gives_the_same_bits_eagerly_inside_a_jit_and_on_a_mesh(config, params):
    model = models.build(config(), vocab_size=11, seed=3)
    expected = params(model)
    assert same_bits(expected, params(models.build(config(), vocab_size=11, seed=3)))

    inside = jax.jit(lambda: nnx.to_pure_dict(nnx.state(models.build(config(), vocab_size=11, seed=3))))()
    assert same_bits(expected, params(nnx.merge(nnx.graphdef(model), nnx.State(inside))))

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    assert same_bits(expected, params(models.build(config(), vocab_size=11, seed=3, mesh=mesh)))


def test_precision_and_remat_do_not_change_the_initial_bits(config, params):
    expected = params(models.build(config(), vocab_size=11, seed=3))
    assert same_bits(expected, params(models.build(config(), vocab_size=11, seed=3, precision="bfloat16", remat="full")))


def test_another_seed_gives_another_draw_for_everything_that_is_drawn(config, params):
    one, two = (params(models.build(config(), vocab_size=11, seed=seed)) for seed in (0, 1))
    drawn = [path for path in one if np.std(one[path]) > 0]
    assert len(drawn) == 6  # embedding, query, key, value, gate, up
    assert not any(np.array_equal(one[path], two[path]) for path in drawn)


def test_no_two_drawn_matrices_of_a_model_share_their_numbers(config, params):
    found = params(models.build(config(kv_heads=2, ffn={"name": "swiglu", "hidden": 16}), vocab_size=16, seed=0))
    assert found["embedding.table"].shape == (16, 16)
    layers = [layer for value in found.values() if np.std(value) > 0 for layer in value.reshape(-1, 16, 16)]
    normal = [layer / np.std(layer) for layer in layers]
    assert len(normal) == 1 + 2 * 5
    overlap = np.array([[np.mean(a * b) for a in normal] for b in normal]) - np.eye(len(normal))
    assert np.abs(overlap).max() < 0.3  # 256 independent products: standard deviation 1/16


def test_layer_i_of_a_stack_is_the_block_built_alone_from_key_i(config, params):
    option = models.construct.resolve_model(config(layers=3))
    keys = jax.random.split(jax.random.key(5), 3)

    def make(rngs: nnx.Rngs) -> Block:
        return Block(option, rngs=rngs)

    def state(module: nnx.Module) -> dict:
        return nnx.to_pure_dict(nnx.state(module))

    together = jax.jit(lambda: state(stacked(make, keys)))()
    alone = jax.jit(lambda: [state(make(nnx.Rngs(params=key))) for key in (keys[0], keys[1], keys[2])])()
    for i in range(3):
        jax.tree.map(lambda stack, layer, i=i: np.testing.assert_array_equal(stack[i], layer), together, alone[i])
    assert not np.array_equal(alone[0]["mixer"]["query"]["kernel"], alone[1]["mixer"]["query"]["kernel"])


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_initial_loss_is_exactly_ln_vocab(config, tokens, cap):
    model = models.build(config(logit_softcap=cap), vocab_size=11, seed=0)
    h, auxiliary = model.hidden(tokens(2, 8))
    nats, _ = models.cross_entropy(h, model.output_kernel(), tokens(2, 8, seed=1), jnp.ones((2, 8)), cap=cap)
    assert auxiliary == {}
    assert float(nats) == pytest.approx(16 * math.log(11), rel=3e-7)  # float32 rounding


def test_every_layer_starts_as_the_identity(config, tokens):
    model = models.build(config(), vocab_size=11, seed=0)
    h, _ = model.hidden(tokens(2, 8))
    np.testing.assert_array_equal(h, model.final_norm(model.embedding(tokens(2, 8), jnp.float32)))


def test_matrices_start_at_init_scale_over_the_root_of_the_width(params):
    sizes = {"width": 64, "layers": 2, "heads": 2}
    found = params(models.build(sizes | {"init_scale": 0.5}, vocab_size=64, seed=0))
    for name in ("mixer.query", "mixer.key", "mixer.value", "ffn.gate", "ffn.up"):
        assert np.std(found[f"blocks.block0.{name}.kernel"]) == pytest.approx(0.5 * 64**-0.5, rel=0.05)
    assert np.std(found["embedding.table"]) == pytest.approx(1.0, rel=0.05)


def test_a_tied_model_has_no_head_and_reads_its_logits_from_the_table(config, awake, params):
    model = awake(config(tie_embeddings=True))
    assert not [path for path in params(model) if "head_kernel" in path]
    np.testing.assert_allclose(model.output_kernel(), params(model)["embedding.table"].T / 4.0, rtol=1e-6)  # 16**-0.5
    h = jax.random.normal(jax.random.key(0), (1, 3, 16))
    np.testing.assert_allclose(model.head(h), h @ model.output_kernel(), atol=1e-6)


@pytest.mark.parametrize(
    ("role", "axes"), [("matirx", ("embed", "mlp")), ("matrix", ("embed", "width")), ("matrix", ("embed",))]
)
def test_a_parameter_with_an_unknown_role_or_axis_is_refused(role, axes):
    with pytest.raises(ValueError, match="cannot have role"):
        parameter(nnx.Rngs(0), (2, 2), nnx.initializers.zeros, role=role, axes=axes)


def test_derived_sizes_keep_any_even_width_valid():
    for width in range(2, 700, 2):
        option, found = resolve(options.Model, {"width": width})
        assert not found.problems, width
        assert option.query_heads * option.head_units == width
        assert option.head_units % 2 == 0
    assert [options.Model(width=width).query_heads for width in (32, 64, 128, 768, 2048)] == [1, 1, 2, 12, 32]


@pytest.mark.parametrize("width", [32, 256])
def test_a_tied_model_also_starts_near_the_uniform_loss(width):
    model = models.build({"width": width, "layers": 2, "heads": 2, "tie_embeddings": True}, vocab_size=101, seed=0)
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 0, 101)
    nats, _ = models.cross_entropy(model.hidden(tokens)[0], model.output_kernel(), tokens[:, ::-1], jnp.ones((4, 32)))
    assert abs(float(nats) / 128 - np.log(101)) < 0.2
