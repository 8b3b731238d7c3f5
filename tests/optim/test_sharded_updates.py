"""Updates of sharded parameters equal those on one device. Runs in a process of its own with eight virtual devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import optim
from optim import roles


def compare() -> None:
    from conftest import Toy
    from flax import nnx

    model = Toy(jax.random.key(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rule = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor"}
    declared = roles.parameters(model)

    def spec(parameter: roles.Parameter) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(rule.get(axis) for axis in parameter.axes)))

    whole = NamedSharding(mesh, PartitionSpec())
    shardings = {path: spec(parameter) for path, parameter in declared.items()}
    for direction in ("adamw", "muon"):
        tx = optim.build({"direction": {"name": direction}, "schedule": {"name": "constant"}}, model)
        single, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
        placed = jax.device_put(params, roles.like(params, shardings))
        places = roles.mirror(jax.eval_shape(tx.init, params), declared, shardings, whole)
        state = jax.jit(tx.init, out_shardings=places)(placed)
        split = jax.jit(tx.update, out_shardings=(roles.like(params, shardings), places))
        moved, state = split(jax.device_put(gradients, roles.like(params, shardings)), state, placed)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), moved, single)
        moment = state.directions["matrix"].momentum if direction == "muon" else state.directions["all"].mu
        leaf = moment["blocks.up"]
        assert leaf.sharding.shard_shape(leaf.shape) == (2, 4, 10)


def test_sharded_updates_equal_those_of_one_device():
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": path,
    }
    done = subprocess.run([sys.executable, str(here)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    compare()
