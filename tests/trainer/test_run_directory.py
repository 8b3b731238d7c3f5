"""One process at a time, files that are whole, and an honest list of what changed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from strata import StrataError
from trainer.atomic_files import write_bytes_atomic, write_json_atomic
from trainer.environment import _processor, describe_environment, differences
from trainer.reporter import _mirror_id
from trainer.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
HOLD = "import sys; from trainer.run_directory import RunDirectory; RunDirectory(sys.argv[1]).claim()"


def child(code: str, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, **pipes)


def test_claiming_makes_the_directory_and_its_parents(tmp_path):
    with RunDirectory(tmp_path / "a" / "b") as run:
        assert run.path.is_dir() and run.running
    assert not run.running


def test_making_the_object_touches_nothing(tmp_path):
    run = RunDirectory(tmp_path / "a")
    assert not run.running and run.read_config() is None and run.read_status() is None
    assert not run.path.exists()


def test_a_second_process_cannot_train_into_the_same_directory(tmp_path):
    with RunDirectory(tmp_path):
        other = child(HOLD, tmp_path)
        _, err = other.communicate(timeout=60)
        assert other.returncode != 0 and f"in use by another process (id {os.getpid()}" in err
    other = child(HOLD, tmp_path)
    assert other.wait(60) == 0, other.stderr.read()


def test_the_same_process_cannot_claim_twice_and_keeps_its_lock_when_it_tries(tmp_path):
    with RunDirectory(tmp_path):
        with pytest.raises(StrataError, match="already in use by this process"):
            RunDirectory(tmp_path / ".").claim()
        assert RunDirectory(tmp_path).running
        other = child(HOLD, tmp_path)
        other.communicate(timeout=60)
        assert other.returncode != 0


def test_a_lock_dies_with_its_process_even_when_forked_workers_outlive_it(tmp_path):
    holder = child(
        HOLD + "\nimport os, time\nif os.fork() == 0: time.sleep(60); os._exit(0)\nprint('held', flush=True); time.sleep(60)",
        tmp_path,
    )
    assert holder.stdout.readline() == "held\n"
    run = RunDirectory(tmp_path)
    try:
        assert run.running
        with pytest.raises(StrataError, match=f"id {holder.pid}"):
            run.claim()
    finally:
        workers = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        worker = int(workers.read_text().split()[0]) if workers.exists() else None
        holder.send_signal(signal.SIGKILL)
        holder.wait(60)
    try:
        assert not run.running
        with run:
            assert run.running
    finally:
        if worker:
            os.kill(worker, signal.SIGKILL)


def test_a_full_disk_does_not_keep_a_directory_from_being_claimed(tmp_path):
    (tmp_path / ".lock").symlink_to("/dev/full")  # a file that takes no byte
    for _ in range(2):
        with RunDirectory(tmp_path) as run:
            assert run.running


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StrataError, match="file/run cannot be written: Not a directory"):
        RunDirectory(tmp_path / "file" / "run").claim()


def test_the_config_is_stored_byte_for_byte(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config('{"seed":0}', overrides=["--config.seed=0"])
    assert run.read_config() == '{"seed":0}' and (tmp_path / "config.json").read_bytes() == b'{"seed":0}'
    assert json.loads((tmp_path / "overrides.json").read_text()) == ["--config.seed=0"]


def test_without_overrides_the_file_says_so_and_an_earlier_one_stays(tmp_path):
    run = RunDirectory(tmp_path / "own")
    run.path.mkdir()
    run.write_config("{}")
    assert run.read_json("overrides.json") == {"config": None, "name": "own", "overrides": []}
    run.write_config("{}", overrides={"name": "given"})
    run.write_config("{}")
    assert run.read_json("overrides.json") == {"name": "given"}


def test_status_is_replaced_and_only_known_states_are_written(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_status("running", 0)
    run.write_status("preempted", 12, "SIGTERM")
    status = run.read_status()
    assert (status["state"], status["step"], status["message"]) == ("preempted", 12, "SIGTERM")
    with pytest.raises(ValueError, match="stopped"):
        run.write_status("stopped", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["status.json"]


def test_a_damaged_status_is_named(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "runn')
    with pytest.raises(StrataError, match="status.json is damaged"):
        RunDirectory(tmp_path).read_status()


def test_a_failed_atomic_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json_atomic(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_bytes_atomic(path, b"new")
        with pytest.raises(StrataError, match="status.json could not be written: No space left on device"):
            RunDirectory(tmp_path).write_status("running", 1)
        with pytest.raises(StrataError, match="wandb.json could not be written: No space left on device"):
            _mirror_id(RunDirectory(tmp_path))
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def environment():
    return describe_environment()


def test_the_first_environment_is_kept_and_later_ones_are_appended(tmp_path, environment):
    run = RunDirectory(tmp_path)
    assert run.write_environment(environment) is None
    assert run.write_environment(environment | {"cpus": 99}, step=7) == json.loads(json.dumps(environment))
    assert run.write_environment(environment | {"cpus": 98}, step=9) == json.loads(json.dumps(environment))
    assert run.read_json("environment.json") == json.loads(json.dumps(environment))
    later = [json.loads(line) for line in (tmp_path / "environment.resumed.jsonl").read_text().splitlines()]
    assert [(row["step"], row["cpus"]) for row in later] == [(7, 99), (9, 98)]


def test_the_environment_says_what_the_run_ran_on_and_names_no_host(environment):
    import jax

    assert environment["packages"]["jax"] == jax.__version__ and environment["packages"]["numpy"]
    assert environment["devices"] == {"platform": "cpu", "kind": "cpu", "count": jax.device_count()}
    assert environment["command_line"] and environment["cpus"] >= 1
    recorded = json.dumps({k: v for k, v in environment.items() if k not in ("command_line", "source")})
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", recorded)


def test_the_processor_is_the_model_that_linux_names(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD  EPYC 9B14\n\nmodel name\t: second\n")
    assert _processor(tmp_path / "cpuinfo") == "AMD EPYC 9B14"
    (tmp_path / "other").write_text("processor\t: 0\n")
    for file in ("other", "none"):  # another architecture, another system
        assert _processor(tmp_path / file) != os.uname().machine


def test_an_equal_environment_has_no_differences(environment):
    assert differences(environment, json.loads(json.dumps(environment))) == []


def test_another_processor_is_listed_where_both_are_known(environment):
    one, unknown = environment | {"processor": "one"}, {k: v for k, v in environment.items() if k != "processor"}
    assert differences(one, environment | {"processor": "another"}) == ["processor: one -> another"]
    assert differences(unknown, one) == [] == differences(one, unknown)  # of earlier versions


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cpus": -1}, "CPUs: "),
        ({"devices": {"platform": "gpu", "kind": "cpu", "count": 1}}, "device platform: cpu -> gpu"),
        ({"packages": {}}, "jax: "),
        ({"variables": {"XLA_FLAGS": "--other"}}, "XLA_FLAGS: "),
        ({"processes": 2}, "processes: 1 -> 2"),
        ({"platform": "Linux other"}, "machine: "),
    ],
)
def test_what_ends_bit_for_bit_equality_is_listed(environment, change, expected):
    found = differences(environment, environment | change)
    assert any(line.startswith(expected) for line in found)


def test_python_counts_only_where_the_data_depends_on_it(environment):
    other = environment | {"python": "2.7"}
    assert differences(environment, other) == []
    assert differences(environment, other, python_matters=True) == [f"python: {environment['python']} -> 2.7"]


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def test_the_source_revision_and_its_diff_are_recorded(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    clean = describe_environment(tmp_path / "a.py")
    assert len(clean["source"]["revision"]) == 40 and clean["source"]["diff"] == ""
    (tmp_path / "a.py").write_text("x = 2\n")
    (tmp_path / "b.py").write_text("")
    changed = describe_environment(tmp_path / "a.py")
    assert "+x = 2" in changed["source"]["diff"] and changed["source"]["untracked"] == ["b.py"]
    assert differences(clean, changed) == ["source: uncommitted changes differ"]


def test_the_content_of_python_files_that_git_does_not_track_is_recorded(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    (tmp_path / "new.py").write_text("y = 1\n")
    (tmp_path / "notes.txt").write_text("not code")
    first = describe_environment(tmp_path / "a.py")
    (tmp_path / "new.py").write_text("y = 2\n")
    now = describe_environment(tmp_path / "a.py")
    assert set(first["source"]["contents"]) == {"new.py"} and first["source"]["untracked"] == ["new.py", "notes.txt"]
    assert differences(first, now) == ["source: new.py, which git does not track, has changed"]


def test_the_content_of_a_plugin_is_recorded_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_plugin_file.py").write_text("x = 1\n")
    (tmp_path / "my_plugin_package").mkdir()
    (tmp_path / "my_plugin_package" / "__init__.py").write_text("")
    names = ["my_plugin_file", "my_plugin_package", "math", "no_such_module"]
    first = describe_environment(modules=names)
    assert set(first["modules"]) == {"my_plugin_file", "my_plugin_package"}
    (tmp_path / "my_plugin_file.py").write_text("x = 2\n")
    (tmp_path / "my_plugin_package" / "part.py").write_text("")
    found = differences(first, describe_environment(modules=names))
    assert [line.partition(":")[0] for line in found] == ["module my_plugin_file", "module my_plugin_package"]
    assert not differences({k: v for k, v in first.items() if k != "modules"}, first)  # of earlier versions


def test_a_file_that_git_does_not_track_has_no_source_revision(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("")
    assert describe_environment(tmp_path / "a.py")["source"] is None


def test_a_missing_git_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment()["source"] is None


def test_the_run_directory_imports_no_jax():
    code = "import sys, trainer.run_directory, trainer.environment, trainer.metrics; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
