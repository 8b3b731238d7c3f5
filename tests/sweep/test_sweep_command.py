"""`python -m trainer.sweep` with real runs: killed and started again, measurements, exit codes, messages."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from strata import ConfigError
from trainer.metrics import read_metrics
from trainer.sweep.assembly import check_assembly, unbegun, without_devices
from trainer.sweep.cli import chosen_arms
from trainer.sweep.cost import describe_cost
from trainer.sweep.ledger import Ledger, by_run
from trainer.sweep.place import Place
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import read

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ["--config.model.layers=1", "--config.train.steps=300", "--config.checkpoint.every=20", "--config.evaluate.every=100"]
SWEEP = ["experiment.py", "--slots=2", "--sweep.seed=0", *CHANGES]


def rows(run):
    """Rows without what may differ between two runs."""
    return [{key: value for key, value in row.items() if key != "timing"} for row in read_metrics(run / "metrics.jsonl")]


def lines(path):
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def test_a_sweep_that_was_killed_with_its_runs_ends_with_the_same_ledger_and_equal_bits(place, begin, command, children):
    code, out, err = command(*SWEEP, "--runs=whole")
    assert code == 0, err
    assert "2 runs: 2 finished" in out and "finished   low seed 0  step 300" in err
    whole = {path.name: path for path in (place / "whole").glob("small-*")}
    assert len(whole) == 2

    launcher = begin(*SWEEP, "--runs=killed")
    killed = {name: place / "killed" / name for name in whole}
    deadline = time.monotonic() + 60
    while not any(lines(run / "metrics.jsonl") > 25 for run in killed.values()):
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()
        time.sleep(0.01)
    for pid in [launcher.pid, *children(launcher.pid)]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    code, out, _ = command("status", *SWEEP, "--runs=killed")
    assert code == 0 and "finished" not in out and ("1 broken" in out or "2 broken" in out), out

    code, out, err = command(*SWEEP, "--runs=killed")
    assert code == 0 and "2 runs: 2 finished" in out, err
    for name, run in whole.items():
        assert rows(run) == rows(killed[name]) and len(rows(run)) > 300
    contents = [by_run(Ledger(place / runs / "sweeps" / "small-smoke").rows()) for runs in ("whole", "killed")]
    assert contents[0] == contents[1] and {end["outcome"] for end in contents[0].values()} == {"finished"}


MEASUREMENT = '''
"""A measurement and the experiment around it."""
from trainer.sweep import *


def noise(run, *, steps):
    import numpy as np
    drawn = np.random.default_rng(run.seed)
    for step in range(1, steps + 1):
        run.write(step, loss=float(drawn.normal()), by_layer=[float(step), 2.0], timing={"seconds": 0.5})
    (run.directory / "note.txt").write_text("mine")


def get_experiment():
    return Experiment(
        name="noise",
        arms=[Arm(name, {"steps": steps}, measure="measured:noise") for name, steps in (("short", 2), ("long", 4))],
        scales={"smoke": Scale(seeds=1)},
    )
'''


def test_a_measurement_fills_a_run_directory_and_is_done_once(place, command):
    (place / "measured.py").write_text(MEASUREMENT)
    code, out, err = command("measured.py", "--slots=2")
    assert code == 0, err
    assert [line.partition(": noise-")[0] for line in out.splitlines() if line.endswith("-s{0}")] == ["  short", "  long"]
    runs = sorted(path for path in (place / "runs").iterdir() if path.name.startswith("noise-"))
    assert sorted(len(rows(run)) for run in runs) == [2, 4] and (runs[0] / "note.txt").read_text() == "mine"
    assert {"config.json", "environment.json", "metrics.jsonl", "status.json"} <= {path.name for path in runs[0].iterdir()}
    spec = json.loads((runs[0] / "config.json").read_text())
    assert set(spec) == {"measurement", "arguments", "seed"}
    code, out, _ = command("measured.py")
    assert code == 0 and "to run: 0 runs" in out and "-s{0}" not in out


def test_a_module_that_an_arm_requires_is_looked_for_before_any_run_starts(place, command):
    needing = MEASUREMENT.replace(
        'Arm(name, {"steps": steps},', 'Arm(name, {"steps": steps}, requires={"nowhere.at_all": "pip install it"},'
    )
    (place / "measured.py").write_text(needing)
    code, out, err = command("measured.py")
    assert code == 2 and "the module nowhere.at_all: pip install it" in err and "needed by arm 'short', arm 'long'" in err
    assert not list((place / "runs").glob("noise-*")), out
    (place / "measured.py").write_text(MEASUREMENT)
    assert command("measured.py")[0] == 0
    (place / "measured.py").write_text(needing)
    assert command("measured.py")[0] == 0, "what has ended needs nothing"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment.py", "--sweep.model.layerz=1,2"], "makes claims about its arms"),
        (["small.py", "--sweep.model.layerz=1,2"], "unknown field; did you mean model.layers"),
        (["small.py", "--sweep.model.layers="], "axis model.layers has no values"),
        (["small.py", "--sweep.seed=x"], "'x' is not a whole number"),
        (["small.py", "--sweep.seed=0,1,0"], "--sweep.seed names 0 twice"),
        (["small.py", "--sweep.model.layers=[2, 2]"], "--sweep.model.layers names 2 twice"),
        (["small.py"], "give axes"),
        (["experiment.py", "--scale=paper"], "small has the scales smoke"),
        (["experiment.py", "--slots=0"], "--slots 0"),
        (["experiment.py", "--slots=1000"], "processors here"),
        (["experiment.py", "--timeout=-1"], "expected minutes above 0"),
        (["experiment.py", "--timeout=soon", "--dry_run"], "expected minutes above 0"),
        (["experiment.py", "--retries=-1", "--dry_run"], "--retries -1"),
        (["experiment.py", "--arms=none"], "the arms are low, high"),
        (["experiment.py", "--arms="], "the arms are low, high"),
        (["small.py", "--sweep.model.layers=1,,2"], "'1,,2' have nothing where one belongs"),
        (["experiment.py", "--launcher=cloud"], "expected local, slurm or submitit"),
        (["experiment.py", "--slurm.partition=gpu"], "need --launcher slurm"),
        (["experiment.py", "--submitit.timeout_min=5"], "need --launcher submitit"),
        (["experiment.py", "--launcher=submitit", "--slurm.partition=gpu"], "need --launcher slurm"),
        (["experiment.py", "--launcher=submitit", "--timeout=5"], "--submitit.timeout_min=60"),
        (["experiment.py", "--launcher=submitit", "--submitit.cluster=pbs"], "any executor named pbs"),
        (["experiment.py", "--launcher=submitit", "--submitit.timeout_min=soon", "--dry_run"], "expected whole minutes"),
        (["experiment.py", "--launcher=slurm", "--retries=1"], "--retries: with Slurm"),
        (["experiment.py", "--trials=3", "--watch"], "--trials is of a search; --watch is of status"),
        (
            ["search", "small.py", "--scale=smoke", "--launcher=slurm"],
            "--launcher slurm submits an array; --launcher submitit stays; --scale: a search has none",
        ),
        (["experiment.py", "--dryrun"], "did you mean --dry_run"),
        (["experiment.py", "other.py"], "expected one file"),
        ([], "expected one file"),
        (["missing.py"], "does not exist"),
    ],
)
def test_a_wrong_command_exits_2_with_the_reason_and_starts_nothing(place, command, arguments, words):
    code, out, err = command(*arguments)
    assert code == 2 and words in err, err
    assert not list((place / "runs").glob("small-*"))


WRONG = """
from trainer.sweep import *


def get_experiment():
    tokens = {"name": "tokens", "directory": "no_such_shards", "sequence_length": 8, "batch_size": 4}
    wrong = {"name": "optax", "transformation": "optax.scale_by_lyon", "learning_rate": 0.1}
    arms = [
        Arm("right"),
        Arm("another rate", {"optimizer.direction.learning_rate": 0.5}),
        Arm("misspelt", {"optimizer.direction": wrong}),
        Arm("misspelt too", {"optimizer.direction": wrong, "model.width": 16}),
        Arm("no data", {"data": tokens}),
    ]
    return Experiment(name="wrong", config="small.py", arms=arms, scales={"smoke": Scale(seeds=2)})
"""


def test_what_only_jax_and_the_data_can_tell_is_found_before_the_first_start_and_all_at_once(place, command):
    (place / "wrong.py").write_text(WRONG)
    code, out, err = command("wrong.py")
    assert code == 2 and "assembling 4 distinct runs" in out, out + err
    assert err.count("scale_by_lyon") == 1 and "arm 'misspelt', arm 'misspelt too'" in err
    assert "no_such_shards" in err and "'right'" not in err
    assert not list((place / "runs").glob("*"))
    code, out, err = command("wrong.py", "--arms=right", "--sweep.seed=0")
    assert code == 0 and "assembling 1 distinct runs" in out and "assembled in" in out, out + err
    plan = make_plan(read("wrong.py"), "smoke")  # what ran once, at whatever rate, need not be assembled again
    assert [run.arm for run in unbegun(plan, Place("runs", plan.name))] == ["misspelt", "misspelt too", "no data"]


def test_without_the_devices_of_the_runs_a_mesh_is_checked_by_processors_that_stand_for_them(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the process that assembles
    plan = make_plan(read("experiment.py"), "smoke", changes=[("mesh.data", "4")])
    there = Place("runs", plan.name)
    assert without_devices(plan)["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=4")
    check_assembly(plan, there, without_devices(plan))
    with pytest.raises(ConfigError, match="needs 4 devices and there are 1"):
        check_assembly(plan, there, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"})


def test_names_of_arms_may_hold_commas():
    known = ["a", "a, b", "a, b, c", "d"]
    assert chosen_arms("a, b,d", known) == ["a, b", "d"] and chosen_arms("a,b,c", known) == ["a, b, c"]
    assert chosen_arms("d,a,x", known) == ["d", "a", "x"]


def test_a_dry_run_prints_every_run_with_its_cost_and_rule_and_starts_nothing(place, command):
    code, out, err = command("experiment.py", "--dry_run")
    assert code == 0, err
    assert "4 runs: 2 arms, 2 seeds (4 missing)" in out and "12 updates, 384 tokens" in out
    assert out.count("python -m trainer --config small.py") == 4 and "MFLOP a token" in out
    assert "claim: high is better [[made up]]" in out and "decided by: paired t-test" in out
    assert not (place / "runs").exists()


def test_a_run_that_is_half_done_costs_the_other_half(place):
    plan = make_plan(read("experiment.py"), "smoke", changes=[("train.steps", "1000")])
    there = Place("runs", plan.name)
    assert "about 24 s" in describe_cost(plan, there, 1)[2]  # 4 runs of 0.1 minutes, as the file says
    for run, step in zip(plan.runs, (1000, 500, 500, 500), strict=True):
        directory = there.directory(run)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(run.config)
        state = {"state": "finished" if step == 1000 else "preempted", "step": step, "message": ""}
        (directory / "status.json").write_text(json.dumps(state))
    assert "about 9 s" in describe_cost(plan, there, 1)[2]
    for run in plan.runs:
        row = {"step": 100, "split": "train", "loss": 1.0, "timing": {"step_seconds": 0.02}}
        (there.directory(run) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "about 30 s" in describe_cost(plan, there, 1)[2]


def test_a_second_launcher_of_one_sweep_is_refused(place, begin, command, children):
    first = begin(*SWEEP, "--config.train.steps=100000")
    while not (place / "runs" / "sweeps" / "small-smoke" / "ledger.jsonl").is_file():
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    code, _, err = command(*SWEEP, "--config.train.steps=100000")
    assert code == 1 and "is in use by another process" in err
    while len(children(first.pid)) < 1:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGTERM)  # what has not begun to train is just ended
    assert first.wait(60) == 75
