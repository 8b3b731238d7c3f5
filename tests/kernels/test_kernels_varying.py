"""Within `jax.shard_map` as JAX gives it, with its check of how arrays vary over the mesh, an op is what it is without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import kernels
from kernels.ops import GATES
from kernels.running import BLOCK

OPS = ("linear_attention", "retention", "kda", "lightnet")
"""No decay, one that is the same on all devices, the delta rule with a decay by channel, and a state that is a pair."""


def states_of(op: str, rows: int, heads: int, size: int) -> dict:
    """Initial states and their partition over the batch: none, one for all devices, one a row."""
    rng = np.random.default_rng(1)

    def pair(rows: int):
        state = rng.standard_normal((rows, heads, size, size)).astype(np.float32)
        return (state, rng.standard_normal((rows, heads, size)).astype(np.float32)) if op == "lightnet" else state

    none, same, own = None, pair(rows // 2), pair(rows)
    return {"none": (none, None, none), "same": (same, PartitionSpec(), twice(same)), "own": (own, PartitionSpec("data"), own)}


def twice(tree):
    """For all rows what one device has for its own."""
    return jax.tree.map(lambda x: np.concatenate([x, x]), tree)


def close(found, expected, message: str) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()), err_msg=message)


def check(mesh, backend: str, op: str, kind: str) -> None:
    """Output, final state and gradients of every input, over two devices and on one."""
    rng = np.random.default_rng(0)
    decay, delta = GATES[op]
    length = 2 * BLOCK + 8 if op == "lightnet" else 9  # blocks of its running sum
    q, k, v = (rng.standard_normal((4, length, 2, 4)).astype(np.float32) for _ in range(3))
    gates = [-np.abs(q)] * (op == "kda") + [np.full((4, length, 2), 0.7, np.float32)] * delta
    state, spec, whole = states_of(op, 4, 2, 4)[kind]
    segment_ids = np.sort(rng.integers(0, 3, (4, length)), axis=1).astype(np.int32)

    def objective(arrays, state, segment_ids):
        o, final = getattr(kernels, op)(
            *arrays, initial_state=state, segment_ids=segment_ids, output_final_state=True, backend=backend
        )
        return jnp.sum(jnp.sin(o)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(final)), (o, final)

    def run(arrays, state, segment_ids):
        slope, results = jax.grad(objective, argnums=(0, 1), has_aux=True)(arrays, state, segment_ids)
        return results, slope

    arrays, split = (q, k, v, *gates), PartitionSpec("data")
    over = jax.shard_map(run, mesh=mesh, in_specs=(split, spec, split), out_specs=((split, split), (split, spec)))
    results, (slopes, into_state) = jax.jit(over)(arrays, state, segment_ids)
    expected, (wanted, into_whole) = jax.jit(run)(arrays, whole, segment_ids)
    if kind == "same":  # two rows have each state, so its gradient is the sum of theirs
        into_whole = jax.tree.map(lambda x: x[: len(x) // 2] + x[len(x) // 2 :], into_whole)
    close((results, slopes, into_state), (expected, wanted, into_whole), f"{backend} {op} {kind}")


def check_packed(mesh, backend: str) -> None:
    """Sequences packed into one row, the heads over the devices, the offsets and the decay on all of them."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 9, 2, 4)).astype(np.float32) for _ in range(3))
    cu_seqlens = np.array([0, 4, 4, 9], np.int32)

    def run(q, k, v, cu_seqlens):
        def objective(q, k, v):
            o, final = kernels.linear_attention(q, k, v, cu_seqlens=cu_seqlens, output_final_state=True, backend=backend)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final)), (o, final)

        return jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    heads = PartitionSpec(None, None, "data")
    outputs = ((heads,) * 3, (heads, PartitionSpec(None, "data")))
    over = jax.shard_map(run, mesh=mesh, in_specs=(heads, heads, heads, PartitionSpec()), out_specs=outputs)
    close(jax.jit(over)(q, k, v, cu_seqlens), jax.jit(run)(q, k, v, cu_seqlens), f"{backend} packed")


def check_gradient_through(mesh, backend: str) -> None:
    """The gradient of LightNet taken outside, just over one block of its running sum: XLA:CPU has crashed in compiling it."""
    arrays = tuple(np.random.default_rng(0).standard_normal((3, 2, BLOCK + 1, 2, 4)).astype(np.float32))

    def run(*arrays):
        return kernels.lightnet(*arrays, backend=backend)[0]

    rows = PartitionSpec("data")
    over = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)
    slopes = [jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(*x)))))(arrays) for f in (over, run)]
    close(*slopes, f"{backend} through")


def on_two_devices(backend: str) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 2
    for op in OPS:
        for kind in ("none", "same", "own"):
            check(mesh, backend, op, kind)
    check_packed(mesh, backend)
    check_gradient_through(mesh, backend)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_it_is_the_same_over_devices_with_no_initial_state_one_for_all_and_one_a_row(backend):
    here = Path(__file__).resolve()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(here.parents[2]),
    }
    done = subprocess.run([sys.executable, str(here), backend], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    on_two_devices(sys.argv[1])
