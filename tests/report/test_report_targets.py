"""Steps and seconds to a value: an arm that misses it earns nothing by that."""

import json

import numpy as np
import pytest

from trainer.report.analysis import to_json
from trainer.report.tables import verdict_facts
from trainer.report.verdicts import CONTRADICTED, NO_VERDICT, NOT_REPRODUCED, REPRODUCED
from trainer.sweep import Claim, Metric, Rule


def timed(found, planted, arms):
    """A report of runs that end at a loss with steps of so many seconds: `arms` from name to (losses, seconds)."""
    plan, drawn = planted.plan(found), np.random.default_rng(0)
    for run in plan.runs:
        losses, seconds = arms[run.arm]
        path = planted.write(run, [x + drawn.normal(0, 0.01) for x in losses]) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"timing": {"step_seconds": seconds * drawn.uniform(0.99, 1.01)}} if "timing" in row else {}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return planted.report(plan)


def sooner(make_experiment, arm="b", against="a", rule=None, **metric):
    claim = Claim(
        statement="sooner", source="x", arm=arm, against=against, metric=Metric(**metric), rule=rule or Rule(effect=0.5)
    )
    return make_experiment(claims=[claim])


FALLS, STAYS = [4.0, 3.0, 2.0, 0.9], [4.0, 3.8, 3.6, 3.4]


def test_an_arm_with_cheaper_steps_that_misses_the_target_gets_no_credit(planted, make_experiment):
    found = sooner(make_experiment, kind="seconds_to", target=1.0)
    report = timed(found, planted, {"a": (FALLS, 1.0), "b": (STAYS, 0.3)})
    verdict = report.verdicts[0]
    assert verdict.word == NOT_REPRODUCED and set(verdict.evidence.improvements) == {0.0} and verdict.evidence.missed == (5, 0)
    assert "reached the target in none of 5 pairs" in verdict.why
    facts = dict(verdict_facts(verdict, report))
    assert "−0" not in facts["by seed"]
    assert "b in 5 pairs" in facts["target not reached"] and to_json(report)["claims"][0]["missed"] == [5, 0]


def test_a_miss_counts_as_the_loss_it_shows_where_it_shows_one(planted, make_experiment):
    found = sooner(make_experiment, kind="seconds_to", target=1.0)
    verdict = timed(found, planted, {"a": (FALLS, 1.0), "b": (STAYS, 3.0)}).verdicts[0]
    assert verdict.word == CONTRADICTED and max(verdict.evidence.improvements) < -5


def test_the_other_arm_gets_no_credit_for_a_miss_either(planted, make_experiment):
    found = sooner(make_experiment, arm="a", against="b", kind="seconds_to", target=1.0)
    verdict = timed(found, planted, {"a": (FALLS, 1.0), "b": (STAYS, 0.3)}).verdicts[0]
    assert verdict.word == NO_VERDICT and set(verdict.evidence.improvements) == {0.0} and verdict.evidence.missed == (0, 5)
    verdict = timed(found, planted, {"a": (FALLS, 1.0), "b": (STAYS, 3.0)}).verdicts[0]
    assert verdict.word == REPRODUCED and "in 5 pairs 'b' did not reach the target" in verdict.why


def test_a_miss_is_no_proof_of_costing_little(planted, make_experiment):
    rule = Rule(at_most_worse=0.2, relative=True)
    found = sooner(make_experiment, rule=rule, kind="seconds_to", target=1.0)
    verdict = timed(found, planted, {"a": (FALLS, 1.0), "b": (STAYS, 0.3)}).verdicts[0]
    assert verdict.word == NOT_REPRODUCED and all(t == pytest.approx(0) for t in verdict.evidence.tested)


def test_where_both_arms_miss_the_target_the_pair_has_no_number_and_is_counted(planted, make_experiment):
    found = sooner(make_experiment, kind="steps_to", target=0.1)
    report = timed(found, planted, {"a": (FALLS, 1.0), "b": (STAYS, 1.0)})
    verdict = report.verdicts[0]
    assert verdict.word == NO_VERDICT and verdict.evidence.both_missed == 5 and not verdict.evidence.seeds
    assert "5 pairs have no number, since neither arm reached the target" in verdict.why
    facts = dict(verdict_facts(verdict, report))
    assert "both in 5 pairs" in facts["target not reached"] and to_json(report)["claims"][0]["both_missed"] == 5
