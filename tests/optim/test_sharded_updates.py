"""Updates of sharded parameters equal those on one device. Runs in a process of its own with eight virtual devices."""

from __future__ import annotations

import math
import os
import re
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
    for direction, more in (
        ("adamw", {}),
        ("muon", {}),
        ("normuon", {"layerwise": {"name": "llr", "smallest": 4}, "sampling": {"name": "drop_muon", "buckets": 2}}),
        ("lmo", {"layerwise": {"name": "lanton", "interval": 1}}),
        ("measured", {}),
        ("optax", {"sampling": {"name": "drop_muon", "buckets": 2}}),
    ):
        chosen = {"name": direction}
        if direction == "optax":
            chosen["transformation"] = "optax.scale_by_novograd"
        if direction == "measured":
            steps = {"name": "measured", "every": 1, "choose_at": 1, "candidates": ["jordan3", "jordan5"]}
            chosen = {"name": "muon", "newton_schulz": steps}
        config = {"direction": chosen, "schedule": {"name": "constant"}, **more}
        # Every layer first, then where layers are sampled the last alone. Noise is known from the second gradient on.
        draws = [{"cut": 0}, {"cut": 1}] if "sampling" in more else [{}] * (2 if direction == "lmo" else 1)
        tx = optim.build(config, model, steps=10)
        single, spread = [], []
        update, alone = jax.jit(tx.update, static_argnames="cut"), tx.init(params)
        places = roles.mirror(jax.eval_shape(tx.init, params), declared, shardings, whole)
        split = jax.jit(tx.update, static_argnames="cut", out_shardings=(roles.like(params, shardings), places))
        placed, state = jax.device_put(params, roles.like(params, shardings)), jax.device_put(tx.init(params), places)
        for k, how in enumerate(draws):
            own = jax.tree.map(lambda x, k=k: (-1) ** k * x, gradients)
            moved, alone = update(own, alone, params, **how)
            single.append(moved)
            moved, state = split(jax.device_put(own, roles.like(params, shardings)), state, placed, **how)
            spread.append(moved)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), spread, single)
        if "sampling" in more:
            assert not np.any(single[1]["blocks"]["up"][0]) and np.any(single[1]["blocks"]["up"][1])
        moments = state.directions.get("matrix", state.directions.get("all"))
        if direction == "optax":
            leaf = moments["blocks.up"].mu
        else:
            moment = next(getattr(moments, name) for name in ("momentum", "mu", "__getitem__") if hasattr(moments, name))
            leaf = (moments[0].trace if direction == "lmo" else moment)["blocks.up"]
        assert leaf.sharding.shard_shape(leaf.shape) == (2, 4, 10)


def share_out() -> None:
    """Whole matrices are shared out: no device is sent the whole stack, nor anything where they divide over all devices."""
    tx = optim.muon(0.1)
    for shape, layers, rows, columns, parts in (
        ((1, 2, 4), 8, "fsdp", "tensor", 8),
        ((1, 2, 4), 8, "tensor", "fsdp", 8),
        ((1, 2, 4), 4, "fsdp", "tensor", 4),
        ((1, 2, 4), 2, "fsdp", "tensor", 2),
        ((2, 2, 2), 4, "fsdp", "tensor", 4),
        ((1, 8, 1), 8, "fsdp", None, 8),
        ((1, 8, 1), 12, "fsdp", None, 6),
        ((1, 2, 4), 6, "fsdp", "tensor", 6),
        ((1, 2, 4), 3, "tensor", "fsdp", 3),
        ((1, 8, 1), 3, None, "fsdp", 3),
    ):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        place = NamedSharding(mesh, PartitionSpec(None, rows, columns))
        x = jax.random.normal(jax.random.key(layers), (layers, 16, 32))
        alone, _ = jax.jit(tx.update)(x, tx.init(x), x)
        with jax.set_mesh(mesh):
            state = jax.device_put(tx.init(x), place)
            update = jax.jit(tx.update, out_shardings=(place, place))
            placed = jax.device_put(x, place)
            program = update.lower(placed, state, placed).compile().as_text()
            moved, _ = update(placed, state, placed)
        np.testing.assert_allclose(moved, alone, atol=2e-6)
        sent = r"= \(?f32\[([\d,]+)\]\S* (?:all-gather|all-reduce|collective-permute|collective-broadcast)(?:-start)?\("
        gathered = re.findall(sent, program)
        largest = max((math.prod(int(size) for size in found.split(",")) for found in gathered), default=0)
        assert largest <= (0 if parts == mesh.size // shape[0] else x.size // 2), (shape, layers, rows, gathered)


def test_sharded_updates_equal_those_of_one_device():
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": path,
    }
    done = subprocess.run([sys.executable, str(here)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    compare()
    share_out()
