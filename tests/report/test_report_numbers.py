"""Runs that finished and have no number, or none that is finite; runs that went on; evaluations of different size."""

import json
import math

import numpy as np
import pytest

from trainer.report import markdown, page
from trainer.report.analysis import analyse, to_json
from trainer.report.reading import of_plan
from trainer.report.tables import arms, runs, verdict_facts
from trainer.report.verdicts import CONTRADICTED, NOT_REPRODUCED, REPRODUCED
from trainer.sweep import Arm, Claim, Metric, Rule, Tuning, axis

RATE = "optimizer.direction.learning_rate"


def rewrite(planted, run, change):
    """The rows of a run as `change` makes them of each; None drops one."""
    path = planted.place.directory(run) / "metrics.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


# ---- not finite


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_run_that_finished_with_a_number_that_is_not_finite_has_diverged_for_its_claim(planted, lost):
    plan = planted.write_all({"a": planted.better["a"], "b": [1.0, lost, 0.9, 1.0, 0.97]})
    report = planted.report(plan)
    verdict, found = report.verdicts[0], json.loads(json.dumps(to_json(report), allow_nan=False))
    assert verdict.word == NOT_REPRODUCED and verdict.evidence.seeds == (0, 2, 3, 4)
    assert "1 runs of 'b' diverged or have no finite number, 0 of 'a'" in verdict.why
    assert "1 run finished with a number that is not finite" in report.warnings[0]
    assert "(b seed 1: val loss (last, nats/token))" in report.warnings[0]
    claim = found["claims"][0]
    assert (claim["failed"], claim["diverged"], claim["not_finite"], claim["no_number"]) == (0, [1, 0], [1, 0], 0)
    assert [arm["not_finite"] for arm in found["arms"]] == [[0], [1]] and report.arms[1].states == {"finished": 5}
    numbers = {run["seed"]: run["numbers"] for run in found["runs"] if run["arm"] == "b"}
    assert numbers[1] == {"val loss (last, nats/token)": [None, False]}
    assert [row[5] for row in arms(report)[1].rows] == ["", "1 not finite: in no mean"]
    assert [row[4] for row in runs(report).rows if row[0] == "b" and row[1] == "1"] == ["not finite"]
    assert "1 + 0 diverged (1 with a number that is not finite)" in dict(verdict_facts(verdict, report))["runs missing"]
    assert "1 not finite" in markdown.render(report, []) and "1 not finite" in page.render(report, [])


def test_a_baseline_without_a_finite_number_is_no_win_and_no_loss(planted):
    plan = planted.write_all({"a": [2.0, math.inf, 1.9, 2.05, 1.95], "b": planted.better["b"]})
    verdict = planted.report(plan).verdicts[0]
    assert verdict.word == REPRODUCED and "0 and 1 runs diverged or have no finite number" in verdict.why


def test_an_arm_of_which_no_number_is_finite_is_in_the_table(planted):
    report = planted.report(planted.write_all({"a": [math.nan] * 5, "b": [math.nan] * 5}))
    assert [row[:3] for row in arms(report)[1].rows] == [["a", "0", "–"], ["b", "0", "–"]]
    assert not any("no run has a" in warning for warning in report.warnings)


def test_a_number_that_is_finite_at_its_best_is_a_number(planted, make_experiment):
    found = make_experiment(metric=Metric(at="best"))
    report = planted.report(planted.write_all({"a": planted.better["a"], "b": [1.0, math.nan, 0.9, 1.0, 0.97]}, found))
    assert len(report.verdicts[0].evidence.seeds) == 5 and not report.warnings


def test_a_point_whose_number_is_infinite_is_not_chosen(planted, make_experiment):
    tune = Tuning(space=axis(RATE, [0.1, 0.5, 0.9]), seeds=[100])
    found = make_experiment(arms=[Arm("a"), Arm("b", tune=tune)], metric=Metric("loss", lower_is_better=False))
    for run in planted.plan(found).runs:
        planted.write(run, [4.0, {"0.1": 1.0, "0.5": 2.0, "0.9": math.inf}.get(run.point.partition("=")[2], 2.0)])
    choice = planted.plan(found).choices[0]
    assert choice.chosen == "learning_rate=0.5" and choice.means["learning_rate=0.9"] is None


# ---- no number


def test_finished_runs_without_a_number_of_the_metric_are_not_called_failed(planted, make_experiment):
    metric = Metric("loss", kind="steps_to", target="a")
    claim = Claim(statement="faster", source="x", arm="b", against="a", metric=metric, rule=Rule())
    plan = planted.plan(make_experiment(claims=[claim]))
    for run in plan.runs:
        losses = [4.0, 3.0, 2.0] if run.arm == "a" else [4.0, 2.0 + run.seed / 100, 1.0]
        if (run.arm, run.seed) == ("a", 2):  # b's run of this seed has no loss to reach
            planted.write(run, losses, state="failed", message="Diverged: the loss is not finite")
        else:
            planted.write(run, losses)
    report = planted.report(plan)
    verdict, claim = report.verdicts[0], to_json(report)["claims"][0]
    assert verdict.word == REPRODUCED and "failed" not in verdict.why and "1 run has no such number" in verdict.why
    assert (claim["failed"], claim["no_number"], tuple(claim["diverged"])) == (0, 1, (0, 1))
    assert "1 without such a number" in dict(verdict_facts(verdict, report))["runs missing"]


def test_an_arm_whose_own_loss_is_to_be_reached_and_is_not_finite_has_diverged(planted, make_experiment):
    metric = Metric("loss", kind="steps_to", target="b")
    claim = Claim(statement="faster", source="x", arm="b", against="a", metric=metric, rule=Rule())
    plan = planted.plan(make_experiment(claims=[claim]))
    for run in plan.runs:
        last = math.nan if run.arm == "b" and run.seed == 3 else 1.5
        planted.write(run, [4.0, 1.4 - run.seed / 100, last] if run.arm == "b" else [4.0, 3.0, 1.0])
    verdict = planted.report(plan).verdicts[0]
    assert verdict.word == NOT_REPRODUCED and verdict.evidence.not_finite == (1, 0) and verdict.evidence.no_number == 1


def test_several_are_counted_in_the_plural(planted, make_experiment):
    plan = planted.write_all(planted.better)
    for run in plan.runs[:2]:
        rewrite(planted, run, lambda row: row if row["split"] == "train" else None)
    verdict = planted.report(plan).verdicts[0]
    assert verdict.evidence.no_number == 2 and "2 runs have no such number" in verdict.why


# ---- extended


def extended(planted, found=None, *, kept):
    """Runs of the ten steps planned that went on to step 12, evaluated every fifth and, where it is `kept`, at step 10.

    At step 5 b is far worse, at step 10 better.
    """
    plan = planted.plan(found)
    for run in plan.runs:
        end = planted.better[run.arm][run.seed]
        losses = [9.0 * (1 + (run.arm == "b"))] * 9 + [end, 0.1, 0.1]
        planted.write(run, losses)
        steps = (5, 10, 12) if kept else (5, 12)
        rewrite(planted, run, lambda row, steps=steps: row if row["split"] == "train" or row["step"] in steps else None)
        status = {"state": "finished", "step": 12, "message": ""}
        (planted.place.directory(run) / "status.json").write_text(json.dumps(status))
    return plan


def test_an_extended_run_has_the_number_of_the_planned_step(planted):
    report = planted.report(extended(planted, kept=True))
    assert report.verdicts[0].evidence.improvements == pytest.approx(np.subtract(planted.better["a"], planted.better["b"]))
    assert not any("went on" in warning for warning in report.warnings)


def test_an_extended_run_that_kept_no_evaluation_at_the_planned_step_has_no_number(planted, make_experiment):
    plan = extended(planted, kept=False)
    report = planted.report(plan)
    verdict = report.verdicts[0]
    assert verdict.word != CONTRADICTED and verdict.evidence.no_number == 10 and not verdict.evidence.seeds
    note = "10 runs went on beyond the 10 updates planned here and kept no evaluation at that step: they have no number"
    assert note in report.warnings
    for run in plan.runs:
        rewrite(planted, run, lambda row, arm=run.arm: row | {"tokens": 1000 if arm == "a" else 2000})
    assert not any("held-out data" in warning for warning in planted.report(plan).warnings)
    also = [Metric(at="best"), Metric(at=5)]
    report = planted.report(extended(planted, make_experiment(also=also, metric=Metric(at="best")), kept=False))
    assert len(report.verdicts[0].evidence.seeds) == 5 and not any("went on" in warning for warning in report.warnings)


def test_a_target_is_not_taken_of_an_earlier_evaluation_of_a_run_that_went_on(planted, make_experiment):
    metric = Metric("loss", kind="steps_to", target="a")
    claim = Claim(statement="faster", source="x", arm="b", against="a", metric=metric, rule=Rule())
    found = make_experiment(claims=[claim])
    assert planted.report(extended(planted, found, kept=False)).verdicts[0].evidence.no_number == 10
    assert len(planted.report(extended(planted, found, kept=True)).verdicts[0].evidence.seeds) == 5


def test_tuning_goes_by_the_planned_step(planted, make_experiment):
    tune = Tuning(space=axis(RATE, [0.1, 0.5]), seeds=[100])
    found = make_experiment(arms=[Arm("a"), Arm("b", tune=tune)])
    for run in planted.plan(found).runs:
        planted.write(run, [1.0] * 9 + ([3.0, 0.0] if run.point.endswith("0.1") else [2.0, 9.0]))
        (planted.place.directory(run) / "status.json").write_text(json.dumps({"state": "finished", "step": 11}))
    choice = planted.plan(found).choices[0]
    assert choice.means == {"learning_rate=0.1": 3.0, "learning_rate=0.5": 2.0} and choice.chosen == "learning_rate=0.5"
    for run in [run for run in planted.plan(found).runs if run.stage == "tune"]:
        rewrite(planted, run, lambda row: None if (row["split"], row["step"]) == ("val", 10) else row)
    assert set(planted.plan(found).choices[0].means.values()) == {None}


# ---- unlike evaluations


def test_last_evaluations_of_different_amounts_of_the_same_data_are_said(planted, make_experiment):
    other_data = {RATE: 0.3, "data.vocabulary": 16}
    arms = [Arm("a"), Arm("b", {RATE: 0.5}), Arm("c", other_data)]
    claims = [Claim(statement=f"{x} beats a", source="x", arm=x, against="a", rule=Rule()) for x in "bc"]

    def said(of, claims=claims, **metric):
        plan = planted.write_all(
            planted.better | {"c": planted.better["b"]}, make_experiment(arms=arms, claims=claims, metric=Metric(**metric))
        )
        for run in plan.runs:
            rewrite(planted, run, lambda row, arm=run.arm: row | {"tokens": of(arm, row["step"])})
        warnings = analyse(of_plan(plan, planted.place)).warnings
        return [warning for warning in warnings if "held-out data" in warning]

    (warning,) = said(lambda arm, _: 2000 if arm == "a" else 1000)
    assert "the last evaluations of b and a score different amounts of held-out data (1,000 and 2,000 tokens)" in warning
    assert not said(lambda _, step: 2000 if step == 3 else 1000)  # the last one of every run is of more
    assert not said(lambda arm, _: 2000 if arm == "a" else 1000, at="best")
    assert not said(lambda arm, _: 2000 if arm == "a" else 1000, claims=claims[1:])
