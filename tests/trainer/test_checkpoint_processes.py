"""Checkpoints across processes: killed at any moment, restored on other meshes, written by two processes together."""

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from trainer.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]


def start(code: str, *arguments: object, devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(code: str, *arguments: object, devices: int = 1) -> str:
    child = start(code, *arguments, devices=devices)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return out


SAVE_FOR_EVER = """
    import sys
    import jax.numpy as jnp
    from trainer.checkpoint import Checkpointer

    checkpointer = Checkpointer(sys.argv[1], keep_latest=2, keep_every=None, keep_best=1)
    step = checkpointer.latest() or 0
    while True:
        step += 1
        state = {"w": jnp.full((300, 100), float(step)), "v": jnp.full((7,), step)}
        checkpointer.save(step, state, {"step": step}, metric=-step)
        print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_newest_checkpoint_with_the_right_content(tmp_path):
    abstract = {"w": jax.ShapeDtypeStruct((300, 100), jnp.float32), "v": jax.ShapeDtypeStruct((7,), jnp.int32)}
    moments = random.Random(0)
    restored = 0
    for _ in range(6):
        child = start(SAVE_FOR_EVER, tmp_path)
        started = int(child.stdout.readline())
        time.sleep(moments.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        printed = [started, *map(int, child.communicate()[0].split())]
        said = []
        found = Checkpointer(tmp_path, say=said.append).restore(abstract)
        assert said == []
        if found is None:
            assert printed == [1]  # killed before the very first save was complete
            continue
        # A step is printed when its save has begun, which waits for the one before: at most the last one is missing.
        assert max(restored, printed[-1] - 1) <= found.step <= printed[-1] + 1
        assert found.host == {"step": found.step}
        np.testing.assert_array_equal(found.state["w"], np.full((300, 100), found.step, np.float32))
        np.testing.assert_array_equal(found.state["v"], np.full((7,), found.step, np.int32))
        restored = found.step
    assert restored > 0


STATE = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from trainer.checkpoint import Checkpointer

    def state_on(devices):
        data = max(1, len(devices) // 2)
        mesh = Mesh(np.array(devices).reshape(data, -1), ("data", "tensor"))
        specs = {"both": P("data", "tensor"), "rows": P("data"), "columns": P(None, "tensor"), "none": P(), "scalar": P(),
                 "empty": P()}
        make = lambda: {
            "both": jnp.arange(8 * 16, dtype=jnp.float32).reshape(8, 16) / 7,
            "rows": (jnp.arange(8 * 3) / 3).reshape(8, 3).astype(jnp.bfloat16),
            "columns": jnp.arange(5 * 4, dtype=jnp.int32).reshape(5, 4),
            "none": jnp.arange(2, dtype=jnp.uint32),
            "scalar": jnp.float32(0.1),
            "empty": jnp.zeros((0, 4)),
        }
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        return jax.jit(make, out_shardings=shardings)(), shardings

    def restored_equal(checkpointer, devices):
        expected, shardings = state_on(devices)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), expected, shardings)
        found = checkpointer.restore(abstract)
        for name in expected:
            got, want = found.state[name], expected[name]
            assert got.sharding == shardings[name], name
            assert got.dtype == want.dtype and got.shape == want.shape, name
            for a, b in zip(got.addressable_shards, want.addressable_shards, strict=True):
                assert a.index == b.index and np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), name
        return found
"""


def test_a_checkpoint_of_eight_devices_restores_on_four_and_on_one_and_goes_on(tmp_path):
    code = (
        STATE
        + """
    checkpointer = Checkpointer(sys.argv[1], keep_latest=9)
    state, _ = state_on(jax.devices())
    if sys.argv[2] != "0":
        assert restored_equal(checkpointer, jax.devices()).step == int(sys.argv[2])
    checkpointer.save(int(sys.argv[2]) + 1, state, {"devices": jax.device_count()})
    checkpointer.close()
    print(jax.device_count())
    """
    )
    counts = [run(code, tmp_path, step, devices=devices).strip() for step, devices in enumerate((8, 4, 1, 8))]
    assert counts == ["8", "4", "1", "8"]


TWO_PROCESSES = (
    STATE
    + """
    from strata import StrataError

    process, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    assert jax.device_count() == 4 and jax.local_device_count() == 2
    said = []
    checkpointer = Checkpointer(directory, keep_latest=2, keep_best=0, say=said.append)
    assert checkpointer.restore({}) is None
    state, _ = state_on(jax.devices())
    for step in (1, 2, 3):
        checkpointer.save(step, state, {"step": step})
    checkpointer.wait()
    assert checkpointer.steps() == [2, 3]
    assert restored_equal(checkpointer, jax.devices()).host == {"step": 3}
    if process == 0:
        path = next(p for p in sorted((checkpointer.directory / "3" / "state").rglob("*")) if p.is_file())
        path.write_bytes(path.read_bytes() + b"x")
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    assert restored_equal(checkpointer, jax.devices()).step == 2
    assert len(said) == (1 if process == 0 else 0)

    import trainer.manifest
    def fail(*args, **rest):
        raise OSError(28, "No space left on device", "here")
    if process == 0:
        trainer.manifest.write_manifest = fail
    checkpointer.save(4, state, {})
    try:
        checkpointer.wait()
        raise AssertionError("the failure of process 0 was not seen")
    except StrataError as error:
        assert ("No space left" if process == 0 else "another process") in str(error)
    assert checkpointer.latest() == 2
    checkpointer.close()
    print("done")
"""
)


def test_two_processes_write_one_checkpoint_agree_on_damage_and_on_failure(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = TWO_PROCESSES.replace("    import sys\n", "    import sys\n    import jax.experimental.multihost_utils\n", 1)
    children = [start(code, process, port, tmp_path, devices=2) for process in (0, 1)]
    results = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(err for _, err in results)
    assert all(out.strip().endswith("done") for out, _ in results)
