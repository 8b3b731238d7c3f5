"""Runs of a sweep that another one, or a person, has extended beyond what is planned: their directories have the same name."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.sweep.conftest import RATE, Sweep
from trainer.metrics.jsonl import read_metrics
from trainer.sweep import Arm, RunOf
from trainer.sweep.assembly import longer_donors
from trainer.sweep.display import status_lines
from trainer.sweep.outcome import outcome

CONSTANT = Arm("constant", {RATE: 1e-3, "optimizer.schedule": {"name": "constant", "warmup": 1}})


@pytest.fixture
def extended(acted):
    """A sweep of 8 steps whose runs have gone on to 16, and their directories."""
    sweep = Sweep([CONSTANT])
    assert sweep.launch() == 0
    longer = Sweep([dataclasses.replace(CONSTANT, changes=CONSTANT.changes | {"train.steps": 16})])
    assert longer.launch() == 0
    return sweep, [sweep.place.directory(run) for run in sweep.plan().runs]


def test_the_status_is_of_what_is_planned(extended):
    sweep, directories = extended
    lines = status_lines(sweep.place, sweep.plan())
    assert all("step 8/8 (100%)" in line and line.endswith("0.1250") for line in lines[:2])  # the actor's loss is 1 / step
    for directory in directories:
        path = directory / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] != 8))
    lines = status_lines(sweep.place, sweep.plan())
    assert all(line.endswith("step 8/8 (100%)") for line in lines[:2])


@pytest.mark.parametrize("state", ["failed", "preempted", "running"])
def test_how_the_longer_part_ended_is_nothing_to_the_planned_one(extended, state):
    sweep, directories = extended
    for directory in directories:
        status = {"state": state, "step": 12, "message": "Diverged: the loss is not finite"}
        Path(directory / "status.json").write_text(json.dumps(status))
        assert outcome(directory, 8).state == "finished" and outcome(directory, 16).state != "finished"
    starts = sweep.starts()
    assert sweep.launch() == 0 and sweep.starts() == starts


@pytest.mark.parametrize("beside", [{}, {"train.teacher.step": 8}])
def test_a_run_never_starts_from_more_training_than_was_planned(extended, beside, monkeypatch):
    student = Arm("student", {"train.teacher.run": RunOf("constant"), RATE: 1e-3} | beside)
    sweep = Sweep([CONSTANT, student])
    found = [f"{problem.path}: {problem.message}" for problem in longer_donors(sweep.plan(), sweep.place)]
    assert len(found) == (0 if beside else 2)
    assert all("is to make 8 updates and went on to 16: student seed" in words for words in found)
    Path("measured.py").write_text("def look(output, *, run, step=None):\n    pass\n")
    monkeypatch.syspath_prepend(Path.cwd())
    arguments = {"run": RunOf("constant"), **({"step": 8} if beside else {})}
    sweep = Sweep([CONSTANT, Arm("measured", arguments, measure="measured:look")])
    assert len(longer_donors(sweep.plan(), sweep.place)) == len(found)


def test_a_donor_that_made_what_was_planned_is_taken_as_it_is(acted):
    sweep = Sweep([CONSTANT, Arm("student", {"train.teacher.run": RunOf("constant"), RATE: 1e-3})])
    sweep.script("student", 0, "data")
    sweep.launch()
    assert not longer_donors(sweep.plan(), sweep.place)
