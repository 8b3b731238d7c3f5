"""Named axes on a mesh. What needs several devices runs in a process of its own with eight virtual ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

import models
from models import sharding
from models.layers.parameter import AXES

NAMES = ("data", "fsdp", "tensor")
CONFIG = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 4}


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        (("embed", "mlp"), (16, 32), (2, 2, 2), ("fsdp", "tensor")),
        (("layer", "embed", "heads"), (4, 16, 16), (2, 2, 2), (None, "fsdp", "tensor")),
        (("batch", None, None), (8, 5, 16), (2, 2, 2), (("data", "fsdp"), None, None)),
        (("batch", None, None), (8, 5, 16), (8, 1, 1), ("data", None, None)),
        (("vocab", "embed"), (11, 16), (2, 2, 2), (None, "fsdp")),  # 11 is not even: replicated over tensor
        (("batch",), (6,), (2, 2, 2), (None,)),
        (("embed", "mlp"), (16, 32), (1, 1, 1), (None, None)),
    ],
)
def test_an_axis_is_split_where_the_mesh_divides_it_and_replicated_where_not(axes, shape, sizes, expected):
    assert sharding.partition(axes, shape, AbstractMesh(sizes, NAMES)) == PartitionSpec(*expected)


def test_a_mesh_may_lack_an_axis():
    assert sharding.partition(("embed", "mlp"), (16, 32), AbstractMesh((4,), ("fsdp",))) == PartitionSpec("fsdp", None)


def test_every_axis_that_a_parameter_may_have_has_a_rule():
    assert set(AXES) <= set(sharding.RULES)


def test_without_a_mesh_nothing_is_constrained():
    x = jax.numpy.ones((4, 4))
    assert sharding.constrain(x, ("batch", "embed")) is x


def flat(model) -> dict:
    return {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def on_every_mesh() -> None:
    """Initial bits are the same on every mesh, parameters are split as their axes say, logits are the same."""
    assert jax.device_count() == 8
    expected = flat(models.build(CONFIG, vocab_size=16, seed=1))
    for sizes in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), NAMES)
        model = models.build(CONFIG, vocab_size=16, seed=1, mesh=mesh)
        for path, value in flat(model).items():
            np.testing.assert_array_equal(value, expected[path], err_msg=f"{sizes} {path}")
        table = flat(model)[("embedding", "table")]
        assert table.sharding.shard_shape(table.shape) == (16 // sizes[2], 16 // sizes[1]), sizes
    # On the mesh of all three axes the forward pass is the same too, its parameters away from their initial zeros.
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: jax.device_put(0.1 + np.asarray(x), x.sharding), state)
    tokens = np.arange(8 * 6, dtype=np.int32).reshape(8, 6) % 16

    def forward(state, tokens):
        return nnx.merge(graph, state)(tokens)

    single = jax.jit(forward)(jax.tree.map(np.asarray, state), tokens)
    with jax.set_mesh(mesh):
        batch = jax.device_put(tokens, jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None)))
        split = jax.jit(forward)(state, batch)
    assert np.ptp(single) > 1e-3
    np.testing.assert_allclose(split, single, atol=1e-5 * np.abs(single).max())


DEEP = CONFIG | {"layers": 4, "linear": {"name": "noble", "rank": 2}}
DEPTHS = (
    (DEEP | {"depth": {"name": "recursive", "loops": 2, "rank": 2, "unroll": False}}, None),
    (DEEP, {"name": "layer_parallel", "layers": 3, "sweeps": 2, "unroll": False}),
)


def in_every_depth() -> None:
    """Looped and layer-parallel stacks give on a mesh of all three axes what they give on one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), NAMES)
    tokens = np.arange(8 * 6, dtype=np.int32).reshape(8, 6) % 16
    batch = jax.device_put(tokens, jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None)))
    for config, depth in DEPTHS:
        model = models.abstract(config, vocab_size=16)
        rng = np.random.default_rng(0)
        graph, state = nnx.split(model)
        values = jax.tree.map(lambda x, rng=rng: np.float32(0.3) * rng.standard_normal(x.shape, np.float32), state)
        shardings = nnx.State(models.parameter_shardings(model, mesh))
        placed = nnx.State(jax.device_put(nnx.to_pure_dict(values), nnx.to_pure_dict(shardings)))
        forward = jax.jit(lambda state, tokens, graph=graph, depth=depth: nnx.merge(graph, state)(tokens, depth=depth))
        single = forward(nnx.State(nnx.to_pure_dict(values)), tokens)
        with jax.set_mesh(mesh):
            split = forward(placed, batch)
        assert np.ptp(single) > 1e-3
        np.testing.assert_allclose(split, single, atol=2e-5 * np.abs(single).max())


def test_initial_parameters_and_every_depth_are_the_same_on_every_mesh():
    here = Path(__file__).resolve()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(here.parents[2]),
    }
    done = subprocess.run([sys.executable, str(here)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    on_every_mesh()
    in_every_depth()
