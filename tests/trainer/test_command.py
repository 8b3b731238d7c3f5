"""`python -m trainer` as a user, a shell and a scheduler meet it: exit codes, messages, signals, kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import trainer
from strata import StrataError
from trainer.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 150
CONFIG = f"""
def get_config(arg=""):
    return dict(
        data=dict(name="bigram", sequence_length=16, batch_size=4, vocabulary=12, validation_examples=8),
        model=dict(width=16, layers=2, heads=2),
        optimizer=dict(schedule=dict(name="cosine", warmup=2)),
        train=dict(steps=int(arg or {STEPS})),
        evaluate=dict(every=25, batches=1),
        checkpoint=dict(every=10),
        log=dict(every=1),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of a user's own, with a config in it; commands are given there."""
    place = tmp_path_factory.mktemp("place")
    (place / "small.py").write_text(CONFIG)
    return place


def begin(place: Path, *arguments: object, module: str = "trainer", **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(place)])} | variables
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(place: Path, *arguments: object, module: str = "trainer", **variables: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    child = begin(place, *arguments, module=module, **variables)
    out, err = child.communicate(timeout=300)
    assert "Traceback" not in out + err, out + err
    return child.returncode, out, err


def rows(run: Path) -> list[dict]:
    """Rows without what may differ between two runs."""
    return [{key: value for key, value in row.items() if key != "timing"} for row in read_metrics(run / "metrics.jsonl")]


def same_bits(one: object, two: object) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, two)))


def same_run(one: Path, two: Path) -> bool:
    """Equal rows and equal last parameters, bit for bit."""
    first, second = trainer.load(one), trainer.load(two)
    return rows(one) == rows(two) and first.step == second.step and same_bits(first.params, second.params)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run in the default place: its directory, standard output, standard error."""
    code, out, err = command(place, "--config", "small.py")
    assert code == 0, err
    runs = list((place / "runs").iterdir())
    assert len(runs) == 1
    return runs[0], out, err


# ---- a run from beginning to end


def test_without_a_workdir_a_run_lives_in_runs_under_its_name_and_id(place, whole):
    _, out, _ = command(place, "--config", "small.py", "--validate")
    identity = out.split("run id ")[1].strip()
    assert whole[0].name == f"small-{identity}" and identity.endswith("-s0")
    kept = json.loads((whole[0] / "overrides.json").read_text())
    assert kept["config"] == "small.py" and kept["name"] == "small" and kept["overrides"] == []


def test_away_from_a_terminal_there_are_plain_lines_and_only_results_on_standard_output(whole):
    _, out, err = whole
    assert "\x1b" not in out + err and "\r" not in out + err
    assert "held-out data: loss" in out and "evaluate     python -m trainer.evaluate --run runs/small-" in out
    assert f"step {STEPS}/{STEPS}  100 %" in err and "step 25  evaluation  loss" in err
    assert "step 1/" not in out


def test_a_finished_run_says_so_and_exits_0(place, whole):
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file() and path.name != ".lock"}
    code, out, _ = command(place, "--config", "small.py")
    assert code == 0 and f"is finished at step {STEPS}: nothing to do" in out
    after = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


def test_a_runs_own_config_json_is_a_config(place, whole):
    code, out, err = command(place, "--config", whole[0] / "config.json", "--workdir", whole[0])
    assert code == 0 and "nothing to do" in out and err == ""


# ---- kill -9


def rows_in(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def saving(run: Path) -> bool:
    try:
        return any(path.name.endswith(".partial") for path in (run / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


def until(child: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Wait for something to be seen from outside, or for the process to end."""
    while child.poll() is None and not happened():
        time.sleep(0.001)


def kill(place: Path, run: Path, happened: Callable[[], bool], after: float, *arguments: object, **variables: str) -> bool:
    """Start, wait, `kill -9`; whether the process was still there to be killed."""
    child = begin(place, "--config", "small.py", "--workdir", run, *arguments, **variables)
    until(child, happened)
    time.sleep(after)
    child.kill()
    child.communicate()
    return child.returncode == -signal.SIGKILL


def check_kills(place: Path, run: Path, whole: Path, chance: random.Random, count: int) -> None:
    killed = kill(place, run, lambda: True, chance.uniform(0.2, 1.5))  # while it starts up
    for i in range(count - 1):
        target = chance.randrange(1, 60) + rows_in(run)
        happened = (lambda: saving(run)) if i % 3 == 1 else (lambda target=target: rows_in(run) >= target)
        killed += kill(place, run, happened, chance.uniform(0, 0.03))
    assert killed >= 3, "the run ended before it could be killed"
    code, _, err = command(place, "--config", "small.py", "--workdir", run)
    assert code == 0, err
    assert same_run(run, whole)
    assert status(run)["state"] == "finished" and not saving(run)


def test_kill_9_again_and_again_changes_neither_a_metric_nor_a_bit(place, whole, tmp_path):
    check_kills(place, tmp_path / "run", whole[0], random.Random(0), 5)


def test_kill_9_changes_no_bit_where_xla_optimises_and_splits_work_for_threads_as_it_does_for_users(place, tmp_path):
    """Every other test runs with the flags of tests/conftest.py, under which a step is another program."""
    flags = {"XLA_FLAGS": ""}
    changes = ("model.width=128", "data.sequence_length=64", "train.accumulation=2", "train.steps=40")
    changes = [f"--config.{change}" for change in (*changes, "optimizer.direction.name=muon")]
    one, run = tmp_path / "whole", tmp_path / "killed"
    code, _, err = command(place, "--config", "small.py", "--workdir", one, *changes, **flags)
    assert code == 0, err
    assert kill(place, run, lambda: rows_in(run) >= 25, 0.01, *changes, **flags)
    code, _, err = command(place, "--config", "small.py", "--workdir", run, *changes, **flags)
    assert code == 0 and "resuming   after step" in err, err
    assert same_run(run, one)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_kill_9_at_many_other_moments(place, whole, tmp_path, seed):
    check_kills(place, tmp_path / "run", whole[0], random.Random(seed), 6)


# ---- signals


def test_each_stopping_signal_saves_exits_75_and_the_next_start_goes_on(place, whole, tmp_path):
    run, step = tmp_path / "run", 0
    for number, target in ((signal.SIGTERM, 20), (signal.SIGUSR1, 50), (signal.SIGINT, 80)):
        child = begin(place, "--config", "small.py", "--workdir", run)
        until(child, lambda target=target: rows_in(run) >= target)
        child.send_signal(number)
        out, err = child.communicate(timeout=300)
        name = signal.Signals(number).name
        assert child.returncode == 75, err
        assert "Traceback" not in out + err
        assert err.splitlines()[-1].startswith(f"error: stopped by {name} after saving step")
        found = status(run)
        assert found["state"] == "preempted" and found["message"] == name and step < found["step"] < STEPS
        step = found["step"]
        assert (run / "checkpoints" / str(step) / "manifest.json").is_file()
        assert max(row["step"] for row in rows(run)) == step
    code, _, err = command(place, "--config", "small.py", "--workdir", run)
    assert code == 0 and f"resuming   after step {step}" in err
    assert same_run(run, whole[0])


def test_a_second_ctrl_c_interrupts_at_once():
    from trainer.signals import StopRequest

    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_ctrl_c_during_the_start_ends_with_one_word(place, tmp_path):
    text = "import time\ndef get_config(arg=''):\n    print('here', flush=True)\n    time.sleep(60)\n"
    (tmp_path / "slow.py").write_text(text)
    child = begin(place, "--config", tmp_path / "slow.py")
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == "error: interrupted\n" and out == ""


# ---- what is wrong, and the code it ends with


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "no config given"),
        (["--config.x=1"], 2, "there is no config"),
        (["--confgi", "small.py"], 2, "did you mean --config?"),
        (["--config", "smal.py"], 2, "did you mean small.py?"),
        (["--config", "small.py:many"], 2, "raised ValueError"),
        (["--config", "small.py", "--config.model.width=1.5", "--config.nothing=1"], 2, "2 problems"),
        (["--config", "small.py", "--config.mesh.data=2", "--workdir", "wide"], 2, "needs 2 devices and there are 1"),
        (["--config", "small.py", "--process_count", "2"], 2, "go together"),
        (["--config", "small.py", *"--coordinator here --process_count 1 --process_index 0".split()], 2, "expected HOST:PORT"),
        (["--config", "small.py", *"--coordinator h:1 --process_count 1 --process_index 1".split()], 2, "numbered from 0"),
        (["--config", "small.py", "--workdir="], 2, "--workdir is empty"),
        (["--config", "small.py", "--config.data.name=tokens", "--config.data.directory=gone"], 4, "gone/index.json"),
        (["--config", "small.py", "--config.data.name=text_files", "--config.data.files=*.md"], 4, "no file matches '*.md'"),
        (["--config", "small.py", "--workdir", "small.py"], 1, "small.py cannot be written"),
    ],
)
def test_mistakes_end_with_their_code_and_a_sentence(place, arguments, code, words):
    found, out, err = command(place, *arguments)
    assert found == code, err
    assert words in err and out == "" and "error: " in err


@pytest.mark.parametrize(
    ("module", "arguments", "code", "words"),
    [
        ("trainer.evaluate", ["--run", "nowhere"], 2, "run directory nowhere does not exist"),
        ("trainer.evaluate", ["--run", "."], 2, "has no config.json"),
        ("trainer.generate", ["--run", "nowhere", "--prompt", "x"], 2, "run directory nowhere does not exist"),
        ("trainer.generate", ["--run", "nowhere", "--top_p", "0"], 2, "top_p = 0.0: expected above 0"),
    ],
)
def test_so_do_those_of_the_other_commands(place, module, arguments, code, words):
    found, out, err = command(place, *arguments, module=module)
    assert found == code and words in err and out == ""


@pytest.mark.parametrize("flag", ["--validate", "--print_config", "--help", "--fields"])
def test_what_only_looks_exits_0_and_makes_nothing(place, tmp_path, flag):
    (tmp_path / "small.py").write_text(CONFIG)
    code, out, err = command(tmp_path, "--config", "small.py", flag)
    assert code == 0 and out and err == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["small.py"]


def test_a_reader_that_goes_away_is_no_traceback(place):
    child = begin(place, "--config", "small.py", "--fields", PYTHONUNBUFFERED="1")
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(timeout=60) == 1 and err == ""


def test_a_run_that_diverges_exits_3_and_says_which_batch(place, tmp_path):
    run = tmp_path / "run"
    arguments = ["--config", "small.py", "--workdir", run, "--config.optimizer.direction.learning_rate=1e38"]
    for _ in range(2):  # the cause has not gone away, so a second start ends in the same way
        code, _, err = command(place, *arguments)
        assert code == 3, err
        report = json.loads((run / "nonfinite.json").read_text())
        step = report["step"]
        assert f"the {report['what']} of step {step} is not finite" in err
        assert report["examples"] == [4 * (step - 1), 4 * step] and f"examples {4 * (step - 1)} to {4 * step - 1}" in err
        assert status(run)["state"] == "failed" and status(run)["step"] == step - 1
        loaded = trainer.load(run)
        assert loaded.step == step - 1
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded.params))


def test_two_processes_cannot_train_in_one_directory(place, tmp_path):
    from trainer.run_directory import RunDirectory

    with RunDirectory(tmp_path / "run"):
        code, _, err = command(place, "--config", "small.py", "--workdir", tmp_path / "run")
    assert code == StrataError.exit_code and f"is in use by another process (id {os.getpid()}" in err
