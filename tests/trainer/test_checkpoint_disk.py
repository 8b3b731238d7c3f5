"""A full disk or an unwritable directory costs nothing that was saved, and the message says what is wrong."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from strata import StrataError
from trainer.checkpoint import Checkpointer

SMALL = {"w": jnp.arange(1000, dtype=jnp.float32)}
ABSTRACT = jax.eval_shape(lambda: SMALL)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def random_state(count: int) -> dict:
    return {"w": jax.random.normal(jax.random.key(0), (count,))}


@pytest.fixture(params=["known before", "found while writing"])
def when(request, monkeypatch):
    """Whether the free space is looked at first, or something else fills the disk during the save."""
    if request.param == "found while writing":
        monkeypatch.setattr(Checkpointer, "_require_space", lambda self, needed: None)
    return request.param


def test_a_full_disk_names_the_path_and_the_cause_and_leaves_the_earlier_checkpoint(small_disk, when):
    checkpointer = Checkpointer(small_disk / "checkpoints", keep_latest=1)
    checkpointer.save(1, SMALL, {"n": 1}, blocking=True)
    with pytest.raises(StrataError) as error:
        checkpointer.save(2, random_state(1_000_000), {}, blocking=True)  # 4 MB
    assert error.value.exit_code == 1
    assert "step 2" in str(error.value) and str(checkpointer.directory) in str(error.value)
    assert "No space left on device" in str(error.value)
    assert sorted(path.name for path in checkpointer.directory.iterdir()) == ["1"]  # its space was given back
    assert checkpointer.restore(ABSTRACT).host == {"n": 1}
    checkpointer.save(3, SMALL, {"n": 3})  # the disk has room for this one
    checkpointer.close()
    assert checkpointer.restore(ABSTRACT).host == {"n": 3}


def test_a_disk_known_to_be_too_small_says_what_is_needed(small_disk):
    with pytest.raises(StrataError, match=r"the state has 4.0 MB, [12]\.\d MB are free"):
        Checkpointer(small_disk / "checkpoints").save(1, random_state(1_000_000), {})


def test_a_disk_that_fills_up_during_a_save_prints_no_traceback(small_disk):
    code = """
        import sys, jax
        from strata import StrataError
        from trainer.checkpoint import Checkpointer
        Checkpointer._require_space = lambda self, needed: None
        checkpointer = Checkpointer(sys.argv[1])
        checkpointer.save(1, {str(i): jax.random.normal(jax.random.key(i), (100_000,)) for i in range(30)}, {})
        try:
            checkpointer.close()
        except StrataError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), small_disk / "checkpoints"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert "No space left on device" in done.stdout and done.stderr == ""


def test_an_asynchronous_failure_is_said_by_the_next_save_which_takes_its_place(small_disk, monkeypatch):
    monkeypatch.setattr(Checkpointer, "_require_space", lambda self, needed: None)
    said, committed = [], []
    checkpointer = Checkpointer(small_disk / "checkpoints", say=said.append, committed=committed.append)
    checkpointer.save(1, random_state(1_000_000), {})
    checkpointer.save(2, SMALL, {"n": 2})
    assert (
        "step 1 could not" in said[0]
        and "No space left" in said[0]
        and said[1:] == ["the checkpoint of step 2 is saved instead"]
    )
    assert committed == [2] and checkpointer.latest() == 2 and not checkpointer.failed
    checkpointer.save(3, random_state(1_000_000), {})
    with pytest.raises(StrataError, match="step 4.*No space left"):  # a second failure in a row
        checkpointer.save(4, random_state(1_000_000), {})
    checkpointer.save(5, random_state(1_000_000), {})
    checkpointer.close(quietly=True)
    assert "step 5 could not" in said[-1] and checkpointer.restore(ABSTRACT).host == {"n": 2} and committed == [2]


def test_a_disk_without_room_for_one_byte_more_is_named_too(small_disk, when):
    checkpointer = Checkpointer(small_disk / "checkpoints")
    checkpointer.save(1, SMALL, {"n": 1}, blocking=True)
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(b"x" * 4096)
    with pytest.raises(StrataError, match="No space left on device"):
        checkpointer.save(2, SMALL, {}, blocking=True)
    assert checkpointer.restore(ABSTRACT).host == {"n": 1}
    checkpointer.close()


@pytest.mark.parametrize("file", ["host.json", "manifest.json"])
def test_a_disk_that_fills_up_between_the_arrays_and_the_manifest_leaves_no_step(tmp_path, monkeypatch, file):
    import errno

    import trainer.atomic_files
    import trainer.checkpoint
    import trainer.manifest

    write = trainer.atomic_files.write_bytes_atomic

    def full(path, data):
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(trainer.checkpoint, "write_bytes_atomic", full)
    monkeypatch.setattr(trainer.manifest, "write_bytes_atomic", full)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(StrataError, match=f"No space left on device .*{file}"):
        checkpointer.save(1, SMALL, {}, blocking=True)
    assert list(tmp_path.iterdir()) == [] and checkpointer.latest() is None


def test_a_read_only_file_system_is_named_and_loses_nothing(small_disk):
    checkpointer = Checkpointer(small_disk / "checkpoints")
    checkpointer.save(1, SMALL, {"n": 1}, blocking=True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StrataError, match="step 2 could not be written to .*Read-only file system"):
        checkpointer.save(2, SMALL, {}, blocking=True)
    assert checkpointer.restore(ABSTRACT).host == {"n": 1}
    checkpointer.close()


def test_a_file_in_place_of_the_directory_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(StrataError, match="checkpoints.*Not a directory|checkpoints.*File exists"):
        Checkpointer(tmp_path / "checkpoints").save(1, SMALL, {}, blocking=True)
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(tmp_path, monkeypatch):
    said = []
    checkpointer = Checkpointer(tmp_path, keep_latest=1, keep_best=0, say=said.append)
    checkpointer.save(1, SMALL, {}, blocking=True)

    def refuse(path, **rest):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "_delete", lambda self, path: refuse(path))
        checkpointer.save(2, SMALL, {"n": 2}, blocking=True)
    assert len(said) == 1 and "could not be deleted: Permission denied" in said[0]
    assert checkpointer.restore(ABSTRACT).host == {"n": 2}
