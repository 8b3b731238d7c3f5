"""Sweeps whose runs are known from an earlier report alone, with runs that are acted (`actor.py`)."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tests.sweep.test_sweep_launcher import RATE, Sweep
from trainer.report.analysis import analyse, to_json
from trainer.report.results import of_plan, read_results
from trainer.sweep import Arm, RunOf, Tuning, axis
from trainer.sweep.cost import describe_cost, describe_runs
from trainer.sweep.display import status_lines
from trainer.sweep.earlier import Earlier
from trainer.sweep.place import Place

LOW, HIGH = Arm("low", {RATE: 1e-3}), Arm("high", {RATE: 1e-1})


def tuned(*rates):
    """An arm with its rate tuned; the actor's best is 1e-3."""
    return Arm("tuned", tune=Tuning(space=axis(RATE, list(rates)), seeds=[100]))


@pytest.fixture
def known(acted):
    """A function from arms to the file of their report, made of runs whose directories, and whose sweep's, are gone."""

    def make(arms):
        sweep = Sweep(arms)
        assert sweep.launch() == 0
        Path("report.json").write_text(json.dumps(to_json(analyse(of_plan(sweep.plan(), sweep.place)))))
        shutil.rmtree("runs")
        return Path("report.json")

    return make


def later(arms, report=None):
    """A sweep of the same name, told of the report or not."""
    sweep = Sweep(arms)
    sweep.place = Place("runs", "acted-smoke", report and Earlier(report))
    return sweep


def test_runs_that_the_report_knows_are_not_made_again_and_those_of_a_new_arm_are(known):
    sweep = later([LOW, HIGH], known([LOW]))
    cost = describe_cost(sweep.plan(), sweep.place, slots=1)
    assert "2 known from an earlier report, 2 missing" in cost[0] and cost[1].startswith("to run: 2 runs, 16 updates")
    assert [line.split(":")[0].strip() for line in describe_runs(sweep.plan(), sweep.place)] == ["high"]
    assert sweep.launch() == 0 and {arm for arm, _ in sweep.starts()} == {"high"}
    lines = [line for line in status_lines(sweep.place, sweep.plan()) if "known from an earlier report" in line]
    assert len(lines) == 2 and all(line.startswith("finished   low seed") for line in lines)


def test_the_sweep_keeps_the_report_and_its_own_is_whole(known):
    file = known([LOW])
    sweep = later([LOW, HIGH], file)
    sweep.place.keep_earlier()
    assert sweep.launch() == 0
    file.unlink()
    again = later([LOW, HIGH])
    assert again.launch() == 0 and len(again.starts()) == 2
    results = of_plan(again.plan(), again.place)
    assert not results.unfinished and {record.state for record in results.of("low")} == {"finished"}
    assert results.values("low", results.metric)[0] == (pytest.approx(1 / 8), False)
    assert any("2 runs are known from an earlier report alone" in note and "(low 2)" in note for note in results.notes)


def test_tuning_goes_by_the_reports_numbers_and_only_a_new_point_is_run(known):
    file = known([tuned(1e-1, 1e-2)])
    assert later([tuned(1e-1, 1e-2)], file).plan().choices[0].chosen == "learning_rate=0.01"
    unchanged = later([tuned(1e-1, 1e-2)], file)
    assert unchanged.launch() == 0 and unchanged.starts() == []
    longer = later([tuned(1e-1, 1e-2, 1e-3)], file)
    assert longer.launch() == 0  # the new point is the best: it is compared as well
    assert longer.starts() == [("tuned", 100), ("tuned", 0), ("tuned", 1)]


def test_a_run_that_another_starts_from_is_made_again_and_only_then(known):
    student = Arm("student", {"train.teacher.run": RunOf("low"), "model.layers": 1})
    file = known([LOW, HIGH, student])
    assert later([LOW, HIGH, student], file).place.to_make(later([LOW, HIGH, student], file).plan()) == []
    other = dataclasses.replace(student, name="other", changes=student.changes | {"model.layers": 3})
    sweep = later([LOW, HIGH, student, other], file)
    assert sweep.launch() == 0
    assert sorted(sweep.starts()) == [("low", 0), ("low", 1), ("other", 0), ("other", 1)]


def test_a_run_that_failed_then_is_tried_again(known):
    file = known([LOW])
    content = json.loads(file.read_text())
    content["runs"][0] |= {"state": "failed", "message": "OSError: full", "numbers": {}}
    file.write_text(json.dumps(content))
    sweep = later([LOW], file)
    assert sweep.launch() == 0 and sweep.starts() == [("low", content["runs"][0]["seed"])]


def test_a_directory_that_is_here_goes_before_what_the_report_says(known):
    file = known([LOW])
    fresh = later([LOW])
    run = fresh.script("low", 0, "crash")
    assert fresh.launch(retries=0) == 1
    sweep = later([LOW], file)
    assert sweep.place.outcome(run).state == "failed" and sweep.place.remembered(run) is None
    assert sweep.place.to_make(sweep.plan()) == [run]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--earlier=none.json"], "No such file"),
        (["--earlier", "small.py"], "not a report.json"),
        (["--earlier"], "--earlier needs a value"),
    ],
)
def test_what_is_no_report_is_refused(place, command, words, said):
    code, _, err = command("experiment.py", "--dry_run", *words)
    assert code == 2 and said in err


def test_a_report_of_another_experiment_is_refused(known, command):
    code, _, err = command("experiment.py", "--dry_run", f"--earlier={known([LOW])}")
    assert code == 2 and "is of acted at scale smoke, this one of small at smoke" in err


def test_a_report_of_the_sweeps_directory_takes_what_the_sweep_was_started_with(place, command):
    assert command("experiment.py", "--arms=low")[0] == 0
    assert command("experiment.py", module="trainer.report")[0] == 0
    shutil.copy("runs/sweeps/small-smoke/report/report.json", "before.json")
    shutil.rmtree("runs")
    lines = command("experiment.py", "--earlier=before.json", "--dry_run")[1].splitlines()
    assert sum(line.endswith("known from an earlier report") for line in lines) == 2
    assert command("experiment.py", "--earlier=before.json")[0] == 0
    assert {row["arm"] for row in Place("runs", "small-smoke").ledger.rows() if row["event"] == "start"} == {"high"}
    results = read_results("runs/sweeps/small-smoke")
    assert not results.unfinished and all(record.numbers for record in results.of("low"))
    assert json.loads(Path("runs/sweeps/small-smoke/earlier.json").read_text())["title"] == "small"
