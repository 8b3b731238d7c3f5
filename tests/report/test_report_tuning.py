"""What a report says of tuning: the choice, how near it was, what it was made without, and what was not tuned."""

import dataclasses

import pytest

from trainer.report import markdown, page
from trainer.report.analysis import to_json
from trainer.report.tables import verdict_facts, verdicts
from trainer.report.verdicts import REPRODUCED
from trainer.sweep import Arm, Scale, Tuning, axis


def test_the_tuned_arm_is_reported_with_its_choice(planted, make_experiment):
    rate = "optimizer.direction.learning_rate"
    arms = [Arm("a"), Arm("b", tune=Tuning(space=axis(rate, [0.1, 0.5, 0.9]), seeds=[100]))]
    found = make_experiment(arms=arms)
    for run in planted.plan(found).runs:
        planted.write(run, [4.0, {"0.1": 3.0, "0.5": 1.0, "0.9": 2.0}.get(run.point.partition("=")[2], 2.0)])
    assert planted.plan(found).choices[0].chosen == "learning_rate=0.5"
    for run in planted.plan(found).runs:
        if run.stage == "compare":
            planted.write(run, [4.0, planted.better[run.arm][run.seed]])
    report = planted.report(planted.plan(found))
    assert report.arms[1].chosen == "learning_rate=0.5" and report.verdicts[0].word == REPRODUCED


@pytest.mark.parametrize("seeds", [[100], [100, 101, 102]])
def test_a_choice_of_tuning_by_less_than_seeds_differ_is_said(planted, make_experiment, seeds):
    """Of several seeds the lead by seed counts: that all points are higher on one of them says nothing about them."""
    tune = Tuning(space=axis("optimizer.direction.learning_rate", [0.1, 0.5]), seeds=seeds)
    found = make_experiment(arms=[Arm("a"), Arm("b", tune=tune)])
    spread = 0.1  # between neighbouring seeds
    for lead, said in ((0.5, False), (0.01, True)):
        for run in planted.plan(found).runs:
            level = 2.0 + 3 * (run.seed - 100)
            by_seed = lead + 0.1 * (run.seed - 101) * (len(seeds) > 1)
            planted.write(run, [9.0, level + by_seed * run.point.endswith("0.1")])
        for run in planted.plan(found).runs:
            if run.stage == "compare":
                planted.write(run, [4.0, 1.0 + spread * run.seed])
        warnings = planted.report(planted.plan(found)).warnings
        shown = [warning for warning in warnings if "tuning preferred its point by less than seeds differ" in warning]
        assert bool(shown) == said and all("b by 0.01, standard error 0." in warning for warning in shown)


def test_a_tuning_run_that_crashed_is_left_out_of_the_choice_and_named(planted, make_experiment):
    rate = "optimizer.direction.learning_rate"
    arms = [Arm("a"), Arm("b", tune=Tuning(space=axis(rate, [0.1, 0.5, 0.9]), seeds=[100]))]
    found = make_experiment(arms=arms)
    for run in planted.plan(found).runs:
        if run.point.endswith("0.9"):
            planted.write(run, [4.0], state="failed", message="RuntimeError: out of memory")
            planted.place.ledger.append(
                "end", run=run.directory, outcome="failed", step=1, message="out of memory", again=False
            )
        else:
            planted.write(run, [4.0, {"0.1": 3.0, "0.5": 1.0}.get(run.point.partition("=")[2], 2.0)])
    assert planted.plan(found).choices[0].chosen == "learning_rate=0.5"
    warnings = planted.report(planted.plan(found)).warnings
    assert any("the tuning of b chose without learning_rate=0.9" in warning for warning in warnings)


def test_a_claim_whose_arm_is_not_tuned_where_others_are_says_so_wherever_it_is_shown(planted, make_experiment):
    tuned = Tuning(space=axis("optimizer.direction.learning_rate", [0.1, 0.5]), seeds=[100], scales=["laptop"])
    scales = {"smoke": Scale(seeds=5), "laptop": Scale(seeds=5)}
    arms = [Arm("a"), Arm("b", {"optimizer.direction.learning_rate": 0.5}, tune=tuned)]
    report = planted.report(planted.write_all(planted.better, make_experiment(arms=arms, scales=scales)))
    verdict = report.verdicts[0]
    assert verdict.word == REPRODUCED and "not tuned at this scale: a, b" in verdict.why
    assert dict(verdict_facts(verdict, report))["tuning"] == "not tuned at this scale: a, b"
    assert verdicts(report).rows[0][1] == "reproduced (not tuned at this scale)"
    assert to_json(report)["claims"][0]["not_tuned"] == ["a", "b"]
    assert markdown.render(report, []).count("not tuned at this scale") == 3
    assert page.render(report, []).count("not tuned at this scale") == 2
    here = [Arm("a"), Arm("b", tune=dataclasses.replace(tuned, scales=None))]
    assert planted.report(planted.plan(make_experiment(arms=here))).verdicts[0].evidence.untuned == ("a",)
    plain = planted.report(planted.write_all(planted.better))
    assert "not tuned" not in markdown.render(plain, []) + page.render(plain, [])
