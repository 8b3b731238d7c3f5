"""Sweeps whose runs are known from an earlier report alone, with runs that are acted (`actor.py`)."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from strata import ConfigError
from tests.sweep.conftest import RATE, Sweep
from trainer.report.analysis import analyse, to_json
from trainer.report.curves import curves as report_curves
from trainer.report.reading import of_plan, read_results
from trainer.sweep import Arm, Claim, Metric, Rule, RunOf, Tuning, axis
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

    def make(arms, curves=False):
        sweep = Sweep(arms)
        assert sweep.launch() == 0
        results = of_plan(sweep.plan(), sweep.place)
        Path("report.json").write_text(json.dumps(to_json(analyse(results))))
        if curves:
            Path("report.curves.jsonl").write_text(report_curves(results))
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
    assert [line.split("  ")[0] for line in lines] == ["finished"] * 2 and not any("starting" in line for line in lines)


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
    assert "(1 known from an earlier report, 1 missing)" in describe_cost(sweep.plan(), sweep.place, slots=1)[0]
    assert sweep.launch() == 0 and sweep.starts() == [("low", content["runs"][0]["seed"])]


def test_a_run_of_another_length_is_another(known):
    """A constant rate does not depend on the length, nor does the name of the directory."""
    constant = dataclasses.replace(LOW, changes=LOW.changes | {"optimizer.schedule": {"name": "constant", "warmup": 1}})
    file = known([constant])
    longer = dataclasses.replace(constant, changes=constant.changes | {"train.steps": 16})
    sweep = later([longer], file)
    assert {run.directory for run in sweep.plan().runs} == {run["directory"] for run in json.loads(file.read_text())["runs"]}
    assert sweep.launch() == 0 and len(sweep.starts()) == 2


def test_a_donor_that_is_made_again_changes_neither_its_number_nor_what_was_chosen(known):
    file = known([tuned(1e-1, 1e-2)])
    tune = Tuning(space=axis("model.layers", [1, 2]), seeds=[100])
    student = Arm("student", {"train.teacher.run": RunOf("tuned")}, tune=tune)
    sweep = later([tuned(1e-1, 1e-2), student], file)
    donor = next(run for run in sweep.plan().runs if run.stage == "tune" and run.point == "learning_rate=0.01")
    sweep.script("tuned", donor.seed, "finish")
    (sweep.place.runs / f"{donor.directory}.script").write_text("crash")
    assert sweep.launch(retries=0) == 1  # the student's tuning runs cannot start
    assert sweep.plan().choices[0].chosen == "learning_rate=0.01"
    assert sweep.place.outcome(donor).state == "finished"  # as the report says
    assert {arm for arm, seed in sweep.starts() if seed != 100} == set()


def test_a_failure_in_the_ledger_does_not_go_before_a_run_that_the_report_has_as_finished(known):
    file = known([LOW])
    fresh = later([LOW])
    run = fresh.script("low", 0, "data")  # exits before there is a directory
    assert fresh.launch() == 1 and fresh.place.outcome(run).state == "failed"
    sweep = later([LOW], file)
    assert sweep.place.outcome(run).state == "finished" and sweep.launch() == 0
    results = of_plan(sweep.plan(), sweep.place)
    assert not results.unfinished and len(results.values("low", results.metric)) == 2


def test_the_report_must_have_the_number_that_runs_are_compared_by(known):
    file = known([LOW])
    with pytest.raises(
        ConfigError, match=r"no run in it has the number that runs are compared by here, val loss \(last, nats\)"
    ):
        Earlier(file).check("acted", "smoke", Metric(unit="nats"))


@pytest.mark.parametrize("curves", [False, True])
def test_steps_to_another_arms_loss_are_known_where_the_report_kept_its_curves_and_seconds_are_not(known, curves):
    steps, seconds = (Metric(kind=kind, target="high") for kind in ("steps_to", "seconds_to"))
    claims = [Claim(statement=m.kind, source="x", arm="low", against="high", rule=Rule(), metric=m) for m in (steps, seconds)]
    sweep = later([LOW, HIGH], known([LOW, HIGH], curves=curves))
    sweep.experiment = dataclasses.replace(sweep.experiment, claims=claims)
    results = of_plan(sweep.plan(), sweep.place)
    lacking = {f"of 4 of them {metric.label} is not known" for metric in ((seconds,) if curves else (steps, seconds))}
    assert lacking == {note for note in results.notes if note.endswith("is not known")}
    found = {arm: set(results.values(arm, steps).values()) for arm in ("low", "high")}
    # The actor's loss is 1 / step, and 2 more for the high rate, whose last is 2.125.
    assert found == ({"low": {(1.0, False)}, "high": {(8.0, False)}} if curves else {"low": {None}, "high": {None}})
    assert set(results.values("low", seconds).values()) == {None}


def test_the_sweep_keeps_the_curves_too_and_a_report_without_them_takes_them_away(known):
    file = known([LOW], curves=True)
    later([LOW], file).place.keep_earlier()
    kept = Path("runs/sweeps/acted-smoke/earlier.curves.jsonl")
    assert kept.read_bytes() == Path("report.curves.jsonl").read_bytes()
    Path("report.curves.jsonl").unlink()
    sweep = later([LOW])  # goes by its own copy
    assert all(len(record.rows) == 16 for record in of_plan(sweep.plan(), sweep.place).of("low"))
    later([LOW], file).place.keep_earlier()
    assert not kept.exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"step": 1, "split": "val", "loss": 1.0}', "does not say of which run"), ("}", "line 17 of .* is not a row")],
)
def test_damaged_curves_are_refused(known, line, said):
    file = known([LOW], curves=True)
    curves = Path("report.curves.jsonl")
    lines = curves.read_text().splitlines()[:16]
    curves.write_text("\n".join([*lines, line, ""]))
    with pytest.raises(ConfigError, match=said):
        Earlier(file)


def test_runs_with_another_evaluation_are_told(known):
    file = known([LOW])
    content = json.loads(file.read_text())
    for run in content["runs"]:
        run["config"]["evaluate"]["batches"] = 77
    file.write_text(json.dumps(content | {"warnings": ["the rules were changed after the first run"]}))
    sweep = later([LOW], file)
    notes = of_plan(sweep.plan(), sweep.place).notes
    assert "2 runs were made with another evaluate.batches than planned" in notes
    assert "the earlier report said: the rules were changed after the first run" in notes


def test_a_second_report_that_lacks_runs_of_the_first_is_refused(known):
    first, second = known([LOW]).rename("first.json"), known([HIGH])
    later([LOW, HIGH], first).place.keep_earlier()
    with pytest.raises(ConfigError, match=r"goes by .*earlier.json already, which has 2 runs that report.json has not"):
        later([LOW, HIGH], second)


def test_a_donor_that_is_made_again_is_submitted_to_slurm_and_its_dependant_waits(known):
    from trainer.sweep.slurm import may_start

    student = Arm("student", {"train.teacher.run": RunOf("low"), "model.layers": 1})
    sweep = later([LOW, HIGH, student], known([LOW, HIGH]))
    made = sweep.place.to_make(sweep.plan())
    assert {run.arm for run in made} == {"low", "student"}
    assert {run.arm for run in made if may_start(sweep.place, run)} == {"low"}


@pytest.mark.parametrize("key", ["step", "numbers", "versions", "config"])
def test_a_report_whose_runs_lack_something_is_refused(known, key):
    file = known([LOW])
    content = json.loads(file.read_text())
    del content["runs"][0][key]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"report.json: not a report.json whose runs have numbers .*{key}"):
        Earlier(file)


def test_what_failed_here_leaves_what_the_report_has_and_what_ended_here_goes_before_it(known):
    file = known([LOW])
    fresh = later([LOW])
    first, second = fresh.script("low", 0, "crash"), fresh.script("low", 1, "diverge")
    assert fresh.launch(retries=0) == 1
    sweep = later([LOW], file)
    assert [sweep.place.outcome(run).state for run in (first, second)] == ["finished", "diverged"]
    assert sweep.place.to_make(sweep.plan()) == [] and sweep.place.remembered(second) is None
    assert list(of_plan(sweep.plan(), sweep.place).values("low", sweep.experiment.metric)) == [0]


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
