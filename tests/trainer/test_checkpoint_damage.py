"""A half-written, truncated or altered checkpoint is never loaded; the next older good one is, and the run says so."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from strata import StrataError
from trainer.checkpoint import Checkpointer


def make_state(step: int) -> dict:
    return {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) + step, "step": jnp.int32(step)}


ABSTRACT = jax.eval_shape(lambda: make_state(0))


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A directory with the good steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("good") / "checkpoints"
    checkpointer = Checkpointer(directory, keep_latest=3, keep_best=1)
    for step in (1, 2, 3):
        checkpointer.save(step, make_state(step), {"step": step}, metric=float(step))
    checkpointer.close()
    return directory


@pytest.fixture
def opened(three_steps, tmp_path):
    """A copy of them to damage, and what was said."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(three_steps, directory)
    said = []
    checkpointer = Checkpointer(directory, keep_latest=3, keep_best=1, say=said.append)
    yield checkpointer, directory, said
    checkpointer.close()


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def assert_falls_back(checkpointer, said, *, to: int, naming: str = "") -> None:
    assert checkpointer.latest() == to
    said.clear()
    restored = checkpointer.restore(ABSTRACT)
    assert restored.step == to and restored.host == {"step": to}
    np.testing.assert_array_equal(restored.state["w"], make_state(to)["w"])
    assert len(said) == 1 and "damaged" in said[0] and f"Going on from step {to}" in said[0] and naming in said[0]


def flip_bit(path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_one_flipped_bit_in_any_file_is_never_loaded(opened):
    checkpointer, directory, said = opened
    random = np.random.default_rng(0)
    for path in files_of(directory / "3"):
        original = path.read_bytes()
        for position in {0, len(original) - 1, int(random.integers(max(1, len(original))))} if original else ():
            flip_bit(path, position, int(random.integers(8)))
            assert_falls_back(checkpointer, said, to=2)
            path.write_bytes(original)
    assert checkpointer.latest() == 3


def test_every_byte_of_the_manifest_is_covered(three_steps):
    from trainer import manifest

    original = (three_steps / "3" / "manifest.json").read_bytes()
    assert manifest.Manifest.decode(original).step == 3
    for position in range(len(original)):
        altered = bytearray(original)
        altered[position] ^= 1 << position % 8
        with pytest.raises(manifest.Damaged):
            manifest.Manifest.decode(bytes(altered))


def test_any_truncated_file_is_never_loaded(opened):
    checkpointer, directory, said = opened
    for path in files_of(directory / "3"):
        original = path.read_bytes()
        for size in {0, len(original) // 2, len(original) - 1} - {len(original), -1}:
            path.write_bytes(original[:size])
            assert_falls_back(checkpointer, said, to=2, naming=path.name)
            path.write_bytes(original)


def test_any_missing_file_is_never_loaded(opened):
    checkpointer, directory, said = opened
    for path in files_of(directory / "3"):
        original = path.read_bytes()
        path.unlink()
        assert_falls_back(checkpointer, said, to=2, naming=path.name)
        path.write_bytes(original)


def test_a_grown_file_is_never_loaded(opened):
    checkpointer, directory, said = opened
    with open(directory / "3" / "host.json", "a") as file:
        file.write(" ")
    assert_falls_back(checkpointer, said, to=2, naming="host.json")


def test_a_foreign_file_among_the_arrays_is_damage_and_beside_them_is_not(opened):
    checkpointer, directory, said = opened
    (directory / "3" / "note.txt").write_text("mine")
    assert checkpointer.latest() == 3
    (directory / "3" / "state" / "note.txt").write_text("mine")
    assert_falls_back(checkpointer, said, to=2, naming="state/note.txt")


def test_damage_found_after_a_good_look_is_seen(opened):
    checkpointer, directory, said = opened
    assert checkpointer.steps() == [1, 2, 3]
    flip_bit(next(path for path in files_of(directory / "3") if path.stat().st_size > 100), 50, 3)
    assert checkpointer.steps() == [1, 2]


def test_two_damaged_checkpoints_fall_back_by_two(opened):
    checkpointer, directory, said = opened
    (directory / "3" / "manifest.json").unlink()
    flip_bit(directory / "2" / "host.json", 3, 0)
    assert_falls_back(checkpointer, said, to=1)
    assert "manifest.json is missing" in said[0] and "host.json does not match its checksum" in said[0]


def test_the_best_is_never_a_damaged_one(opened):
    checkpointer, directory, _ = opened
    assert checkpointer.best() == 1
    flip_bit(directory / "1" / "host.json", 0, 0)
    assert checkpointer.best() == 2


def test_a_named_damaged_step_is_an_error_and_not_a_fallback(opened):
    checkpointer, directory, said = opened
    flip_bit(directory / "3" / "host.json", 0, 0)
    with pytest.raises(StrataError, match=r"3 cannot be used: host.json does not match.*Good steps here: 1, 2"):
        checkpointer.restore(ABSTRACT, 3)
    assert said == []


def test_with_no_good_checkpoint_left_the_run_does_not_start_over_silently(opened):
    checkpointer, directory, _ = opened
    for step in (1, 2, 3):
        flip_bit(directory / str(step) / "host.json", 0, 0)
    with pytest.raises(StrataError, match="No good checkpoint is left"):
        checkpointer.restore(ABSTRACT)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "3"]


def test_a_checkpoint_under_the_name_of_another_step_is_not_that_step(opened):
    checkpointer, directory, said = opened
    shutil.copytree(directory / "1", directory / "9")
    assert_falls_back(checkpointer, said, to=3, naming="is of step 1")


def test_empty_directories_and_foreign_files_are_passed_over_and_left_alone(opened):
    checkpointer, directory, said = opened
    (directory / "7").mkdir()
    (directory / "8").write_text("not a directory")
    (directory / "README").write_text("mine")
    (directory / "007").mkdir()
    (directory / "007" / "x").write_text("mine")
    assert checkpointer.restore(ABSTRACT).step == 3 and said == []
    checkpointer.save(4, make_state(4), {})
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2, 3, 4]
    assert {"7", "8", "README", "007"} <= {path.name for path in directory.iterdir()}


def test_an_empty_step_directory_is_filled_when_the_run_gets_there(opened):
    checkpointer, directory, _ = opened
    (directory / "4").mkdir()
    checkpointer.save(4, make_state(4), {"step": 4}, blocking=True)
    assert checkpointer.restore(ABSTRACT).step == 4


def test_leftovers_of_a_killed_process_are_ignored_by_readers_and_removed_by_the_next_save(opened):
    checkpointer, directory, said = opened
    shutil.copytree(directory / "3", directory / "5.partial")
    shutil.copytree(directory / "3", directory / "6.deleted")
    assert checkpointer.restore(ABSTRACT).step == 3 and said == []
    assert (directory / "5.partial").exists() and (directory / "6.deleted").exists()
    checkpointer.save(5, make_state(5), {"step": 5}, blocking=True)
    assert not list(directory.glob("*.partial")) and not list(directory.glob("*.deleted"))
    assert checkpointer.restore(ABSTRACT).host == {"step": 5}


def test_a_damaged_step_does_not_count_as_one_of_the_latest_and_is_not_deleted(opened):
    checkpointer, directory, _ = opened
    flip_bit(directory / "3" / "host.json", 0, 0)
    checkpointer.save(4, make_state(4), {}, blocking=True)
    checkpointer.save(5, make_state(5), {}, blocking=True)
    assert checkpointer.steps() == [1, 2, 4, 5]  # 1 is the best, 2, 4 and 5 the latest three
    assert (directory / "3").exists()


def test_a_damaged_step_is_replaced_when_training_reaches_it_again(opened):
    checkpointer, directory, _ = opened
    flip_bit(directory / "3" / "host.json", 0, 0)
    assert checkpointer.restore(ABSTRACT).step == 2
    checkpointer.save(3, make_state(3), {"step": 3}, blocking=True)
    assert checkpointer.restore(ABSTRACT).step == 3


def test_a_checkpoint_that_its_run_deletes_while_it_is_read_is_no_damage(opened, monkeypatch):
    from trainer import manifest

    checkpointer, directory, said = opened
    verify = manifest.verify

    def deleted_meanwhile(path):
        if path.name == "3":
            shutil.rmtree(path)
        return verify(path)

    monkeypatch.setattr(manifest, "verify", deleted_meanwhile)
    assert checkpointer.restore(ABSTRACT).step == 2 and said == []
