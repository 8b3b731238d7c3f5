"""What a checkpoint gives back: the same bits, in the structure and on the devices asked for, or a clear refusal."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from strata import ConfigError, StrataError
from trainer.checkpoint import Checkpointer


class Moments(NamedTuple):
    mu: jax.Array
    nu: jax.Array


def make_state(seed: int = 0) -> dict:
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "params": {
            "blocks": [{"kernel": jax.random.normal(keys[0], (3, 16, 8))}, {"kernel": jax.random.normal(keys[1], (5,))}],
            "half": jax.random.normal(keys[2], (7, 3), jnp.bfloat16),
            "odd.name/with slash": jnp.float32(seed),
        },
        "optimizer": (Moments(jax.random.normal(keys[3], (4, 4)), jnp.zeros((4, 4))), ()),
        "random": jax.random.key_data(jax.random.key(seed + 1)),
        "step": jnp.int32(seed),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "flag": jnp.array(True),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(state) -> list:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_latest=3, keep_every=None, keep_best=1)
    yield checkpointer
    checkpointer.close()


def test_restored_arrays_equal_the_saved_ones_bit_for_bit(checkpointer):
    state = make_state(3)
    awkward = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32).view(np.float32)  # NaN payload, -inf, -0
    state["awkward"] = jnp.array(awkward)
    checkpointer.save(5, state, {"position": 7})
    restored = checkpointer.restore(abstract(state))
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.step == 5


def test_host_data_comes_back_exactly(checkpointer):
    host = {"data": {"position": 2**60, "files": ["a", "b"]}, "best": float("inf"), "loss": 0.1 + 0.2, "none": None, "ok": True}
    checkpointer.save(1, make_state(), host, blocking=True)
    assert checkpointer.restore(abstract(make_state())).host == host


def test_the_state_may_be_donated_as_soon_as_save_returns(checkpointer):
    # Large enough that the write is still going on while the donated buffers are reused.
    state = {str(i): jnp.full((512, 1024), float(i)) for i in range(8)}
    expected = bits(state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    described = abstract(state)
    for step in range(1, 4):
        checkpointer.save(step, state, {})
        for _ in range(3):
            state = overwrite(state)
        assert bits(checkpointer.restore(described, step).state) == expected
        state = {str(i): jnp.full((512, 1024), float(i)) for i in range(8)}


def test_a_save_is_not_eligible_before_it_is_complete(checkpointer, monkeypatch):
    import threading

    import trainer.manifest

    reached, go_on = threading.Event(), threading.Event()
    write = trainer.manifest.write_manifest

    def slow(*args, **kwargs):
        reached.set()
        assert go_on.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(trainer.manifest, "write_manifest", slow)
    checkpointer.save(1, make_state(), {})
    assert reached.wait(60)
    assert checkpointer.latest() is None
    go_on.set()
    checkpointer.wait()
    assert checkpointer.latest() == 1


def test_no_checkpoint_at_all_restores_nothing(checkpointer):
    assert checkpointer.restore(abstract(make_state())) is None
    assert checkpointer.latest() is None and checkpointer.best() is None and checkpointer.steps() == []


def test_a_reader_makes_no_directory(checkpointer):
    checkpointer.restore(abstract(make_state()))
    assert not checkpointer.directory.exists()


def test_a_named_step_restores_that_step(checkpointer):
    for step in (1, 2, 3):
        checkpointer.save(step, make_state(step), {"step": step})
    restored = checkpointer.restore(abstract(make_state()), 2)
    assert restored.step == 2 and restored.host == {"step": 2} and bits(restored.state) == bits(make_state(2))


def test_a_named_step_that_is_not_there_is_an_error_that_lists_the_good_ones(checkpointer):
    checkpointer.save(3, make_state(), {}, blocking=True)
    with pytest.raises(ConfigError, match="no such checkpoint.*Good steps here: 3"):
        checkpointer.restore(abstract(make_state()), 4)


def test_saving_the_same_step_twice_keeps_the_first(checkpointer):
    checkpointer.save(3, make_state(), {"n": 1})
    checkpointer.save(3, make_state(), {"n": 2}, blocking=True)
    assert checkpointer.restore(abstract(make_state())).host == {"n": 1}


def test_a_later_process_replaces_a_step_that_it_reaches_again(tmp_path):
    for n in (1, 2):
        checkpointer = Checkpointer(tmp_path, keep_latest=3, keep_every=None, keep_best=0)
        checkpointer.save(3, make_state(n), {"n": n})
        checkpointer.close()
    restored = checkpointer.restore(abstract(make_state()))
    assert restored.host == {"n": 2} and bits(restored.state) == bits(make_state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3"]


def test_every_differing_path_is_named_when_the_state_does_not_fit(checkpointer):
    checkpointer.save(1, make_state(), {}, blocking=True)
    other = make_state()
    other["params"]["half"] = jnp.zeros((7, 4), jnp.bfloat16)
    other["step"] = jnp.float32(0)
    del other["flag"]
    other["extra"] = jnp.zeros((2,))
    with pytest.raises(StrataError) as error:
        checkpointer.restore(abstract(other))
    text = str(error.value)
    assert "params/half: bfloat16[7,3] in the checkpoint, bfloat16[7,4] in the run" in text
    assert "step: int32[] in the checkpoint, float32[] in the run" in text
    assert "flag: bool[] in the checkpoint, not in the run" in text
    assert "extra: not in the checkpoint, the run has float32[2]" in text
    assert "kernel" not in text


def test_a_part_of_the_state_can_be_restored_alone(checkpointer):
    state = make_state(4)
    checkpointer.save(1, state, {}, blocking=True)
    restored = checkpointer.restore({"params": abstract(state["params"])}, partial=True)
    assert bits(restored.state) == bits({"params": state["params"]})
    with pytest.raises(StrataError, match="not in the run"):
        checkpointer.restore({"params": abstract(state["params"])})


def test_an_abstract_leaf_without_sharding_goes_to_the_default_device(checkpointer):
    state = make_state()
    checkpointer.save(1, state, {}, blocking=True)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    assert bits(checkpointer.restore(plain).state) == bits(state)


@pytest.mark.parametrize("leaf", [np.zeros(3), 1.0, jax.random.key(0)], ids=["numpy", "float", "typed key"])
def test_only_plain_jax_arrays_are_saved(checkpointer, leaf):
    with pytest.raises(TypeError, match="state params/x"):
        checkpointer.save(1, {"params": {"x": leaf}}, {})


def test_host_data_that_is_not_json_is_refused_before_anything_is_written(checkpointer):
    with pytest.raises(TypeError):
        checkpointer.save(1, make_state(), {"x": object()})
    assert not checkpointer.directory.exists()


def test_nothing_in_a_checkpoint_is_a_pickle(checkpointer):
    checkpointer.save(1, make_state(), {}, blocking=True)
    for path in (checkpointer.directory / "1").rglob("*"):
        assert not (path.is_file() and path.read_bytes()[:2] in (b"\x80\x04", b"\x80\x05")), path


def test_the_manifest_is_plain_json_that_lists_every_other_file(checkpointer):
    checkpointer.save(1, make_state(), {}, metric=1.5, blocking=True)
    directory = checkpointer.directory / "1"
    tree = json.loads((directory / "manifest.json").read_text())["manifest"]
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert set(tree["files"]) == files - {"manifest.json"}
    assert tree["metric"] == 1.5 and tree["arrays"]["step"] == ["int32", []]


def test_orbax_is_imported_only_when_it_is_used():
    code = "import sys, trainer.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120).returncode == 0
