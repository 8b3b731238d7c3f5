"""From run directories to a report: pairs, failures, other code, unfinished sweeps, changed rules, comparisons."""

import json

import numpy as np
import pytest

from strata import ConfigError
from trainer.report import markdown, page
from trainer.report.analysis import analyse, to_json
from trainer.report.cli import main
from trainer.report.results import code_version, of_plan, read_results, seconds_at
from trainer.report.tables import machines, mixed_versions, verdict_facts, verdicts
from trainer.report.verdicts import CONTRADICTED, NO_VERDICT, NOT_REPRODUCED, REPRODUCED
from trainer.sweep import Arm, Claim, Metric, Rule, Scale, Tuning, axis
from trainer.sweep.outcome import crossing, value
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import read

ENVIRONMENT = {"python": "3.11.7", "packages": {"jax": "0.10.2"}, "source": {"revision": "a" * 40, "diff": "", "untracked": []}}
BETTER = {"a": [2.0, 2.1, 1.9, 2.05, 1.95], "b": [1.0, 1.2, 0.9, 1.0, 0.97]}


def report_of(planted, plan):
    return analyse(of_plan(plan, planted.place))


def test_a_planted_improvement_is_paired_by_seed_and_reproduced(planted):
    report = report_of(planted, planted.write_all(BETTER))
    verdict = report.verdicts[0]
    assert verdict.word == REPRODUCED and report.finished and not report.warnings
    assert verdict.evidence.improvements == pytest.approx(np.subtract(BETTER["a"], BETTER["b"]))
    assert report.arms[0].summaries[0].mean == pytest.approx(2.0) and report.arms[0].states == {"finished": 5}


def test_for_a_metric_that_grows_an_improvement_is_an_increase(planted, make_experiment):
    found = make_experiment(metric=Metric("accuracy", lower_is_better=False))
    report = report_of(planted, planted.write_all(BETTER, found))
    assert report.verdicts[0].word == REPRODUCED and report.verdicts[0].summary.mean > 0


def test_a_run_that_crashed_is_counted_and_in_no_mean(planted):
    plan = planted.write_all(BETTER)
    crashed = next(run for run in plan.runs if run.arm == "b" and run.seed == 1)
    planted.write(crashed, [4.0, -1000.0], state="failed", message="StrataError: it broke")
    report = report_of(planted, plan)
    assert report.arms[1].summaries[0].mean == pytest.approx(np.mean([1.0, 0.9, 1.0, 0.97]))
    verdict = report.verdicts[0]
    assert verdict.evidence.seeds == (0, 2, 3, 4) and verdict.evidence.failed == 1 and verdict.word == REPRODUCED
    assert "1 runs failed" in verdict.why and "b seed 1: StrataError: it broke" in report.warnings[0] and report.finished


def test_a_diverged_run_of_the_arm_ends_the_claim(planted):
    plan = planted.write_all(BETTER)
    lost = next(run for run in plan.runs if run.arm == "b" and run.seed == 3)
    planted.write(lost, [4.0, 0.1], state="failed", message="Diverged: the loss is not finite")
    report = report_of(planted, plan)
    assert report.verdicts[0].word == NOT_REPRODUCED and "b seed 3 at step 2" in report.warnings[0]
    assert report.arms[1].states == {"finished": 4, "diverged": 1}


def test_a_finished_run_without_a_finite_number_is_no_pair(planted):
    plan = planted.write_all({"a": BETTER["a"], "b": [1.0, float("nan"), 0.9, 1.0, 0.97]})
    report = report_of(planted, plan)
    assert report.verdicts[0].evidence.seeds == (0, 2, 3, 4) and report.verdicts[0].evidence.failed == 1


def test_an_unfinished_sweep_says_so_and_decides_nothing(planted, capsys):
    plan = planted.plan()
    for run in plan.runs[:7]:
        planted.write(run, [4.0, BETTER[run.arm][run.seed]])
    planted.place.write_plan(plan)
    report = report_of(planted, plan)
    assert report.verdicts[0].word == NO_VERDICT and not report.finished
    assert "not finished: 3 of 10 runs are still to end" in report.warnings[0]
    assert main([str(planted.place.path)]) == 0
    out = capsys.readouterr().out
    assert "UNFINISHED: 7 of 10 runs finished" in out and "no verdict: b beats a & more" in out
    assert "UNFINISHED" in (planted.place.path / "report" / "report.md").read_text()
    assert "UNFINISHED" in (planted.place.path / "report" / "report.html").read_text()


def test_a_sweep_whose_second_part_was_not_run_says_so_and_decides_the_first(planted, make_experiment):
    arms = [
        Arm("a"),
        Arm("b", {"optimizer.direction.learning_rate": 0.5}),
        Arm("c", {"optimizer.direction.learning_rate": 0.7}, part=2),
    ]
    plan = planted.plan(make_experiment(arms=arms))
    for run in [run for run in plan.runs if run.arm != "c"]:
        planted.write(run, [4.0, BETTER[run.arm][run.seed]])
    report = report_of(planted, plan)
    assert report.verdicts[0].word == REPRODUCED and "5 of 15 runs are still to end, all of part 2" in report.warnings[0]


def test_one_seed_gives_no_verdict(planted, make_experiment):
    found = make_experiment(scales={"smoke": Scale(seeds=1)})
    report = report_of(planted, planted.write_all(BETTER, found))
    assert report.verdicts[0].word == NO_VERDICT and any("n = 1" in warning for warning in report.warnings)


def test_runs_of_another_code_version_are_shown_with_their_arms_and_pairs(planted):
    plan = planted.write_all(BETTER)
    other = dict(
        python="3.11.7", packages={"jax": "0.10.2"}, devices={"kind": "cpu", "count": 1}, cpus=2,
        source={"revision": "b" * 40, "diff": "+x", "untracked": []},
    )  # fmt: skip
    for run in [run for run in plan.runs if run.arm == "b" and run.seed < 2]:
        planted.write(run, [4.0, BETTER["b"][run.seed]], environment=other)
    report = report_of(planted, plan)
    warning = next(w for w in report.warnings if "code versions are mixed" in w)
    assert "aaaaaaaaaa" in warning and "bbbbbbbbbb with changes" in warning and "(b 2)" in warning
    assert "2 of 5 pairs were made by different code versions" in mixed_versions(report.verdicts[0], report)


def test_an_edited_file_that_git_does_not_track_is_another_version():
    source = {"revision": "c" * 40, "diff": "", "untracked": ["new.py"]}
    versions = [code_version({"source": source | {"contents": {"new.py": digest}}}) for digest in ("1", "2")]
    assert versions[0] != versions[1] and code_version({"source": source}) not in versions


def test_another_content_of_a_plugin_or_of_a_measurements_module_is_shown(planted):
    plan = planted.write_all(BETTER, environment=ENVIRONMENT | {"modules": {"mine": "1" * 16}})
    for run in [run for run in plan.runs if run.arm == "b" and run.seed < 2]:
        planted.write(run, [4.0, BETTER["b"][run.seed]], environment=ENVIRONMENT | {"modules": {"mine": "2" * 16}})
    for run in [run for run in plan.runs if run.arm == "b" and run.seed == 2]:  # another module is no mixture
        planted.write(run, [4.0, BETTER["b"][2]], environment=ENVIRONMENT | {"modules": {"other": "3" * 16}})
    report = report_of(planted, plan)
    assert "runs of 2 versions of the module mine are mixed: a, b with 111111; b with 222222" in report.warnings
    assert "2 of 5 pairs were made by different code" in mixed_versions(report.verdicts[0], report)
    assert ["module", "mine, digest 222222", "2"] in machines(report).rows
    assert to_json(report)["runs"][0]["modules"] == {"mine": "1" * 16}


def test_other_uncommitted_changes_are_another_version():
    versions = [
        code_version({"source": {"revision": "c" * 40, "diff": diff, "untracked": names}})
        for diff, names in (("", []), ("+x", []), ("+y", []), ("", ["new.py"]))
    ]
    assert len(set(versions)) == 4 and versions[0] == "c" * 10


def test_rules_that_were_changed_after_the_first_run_are_shown(planted, make_experiment):
    plan = planted.write_all(BETTER)
    planted.place.ledger.append("end", run=plan.runs[0].directory, outcome="finished", step=10)
    assert not report_of(planted, plan).warnings
    claim = Claim(statement="b beats a", source="[made up]", arm="b", against="a", rule=Rule(alpha=0.3), paper_effect=0.4)
    changed = report_of(planted, planted.plan(make_experiment(claims=[claim])))
    text = next(w for w in changed.warnings if "rules were changed after" in w)
    assert "alpha 0.3" in text and "alpha 0.05" in text


def ended(planted, found):
    """A plan whose runs are there, whose rules stand in the ledger, and of which a run has ended."""
    plan = planted.write_all(BETTER, found)
    planted.place.ledger.append("end", run=plan.runs[0].directory, outcome="finished", step=10)
    return plan


def grid(*rates):
    return Tuning(space=axis("optimizer.direction.learning_rate", list(rates)), seeds=[100])


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({}, {"metric": Metric("loss", unit="nats", lower_is_better=False)}, "lower_is_better then true, now false"),
        ({}, {"scales": {"smoke": Scale(seeds=6)}}, "seeds.a then [0, 1, 2, 3, 4], now [0, 1, 2, 3, 4, 5]"),
        ({}, {"arms": [Arm("a"), Arm("b", tune=grid(0.5, 0.7))]}, 'tuning.b.points then null, now [{"optimizer.direction'),
        ({}, {"rule": Rule(effect=0.5, power=0.5)}, "rule.power then 0.8, now 0.5"),
        ({}, {"rule": Rule(effect=0.5, margin=0.1)}, "rule.margin then 0.0, now 0.1"),
        ({}, {"metric": Metric("loss", at="best")}, "val loss (best)"),
        ({}, {}, None),
    ],
)
def test_whatever_of_a_claim_was_changed_after_the_first_run_is_named(planted, make_experiment, before, after, words):
    def of(rule=None, **changes):
        claim = Claim(statement="b beats a", source="x", arm="b", against="a", rule=rule or Rule(effect=0.5))
        return make_experiment(claims=[claim], **changes)

    ended(planted, of(**before))
    said = [w for w in report_of(planted, planted.plan(of(**after))).warnings if "were changed after" in w]
    assert len(said) == (words is not None) and all(words in text for text in said)


def test_a_ledger_of_an_earlier_version_is_compared_by_what_it_has(planted, make_experiment):
    ended(planted, make_experiment())
    path = planted.place.ledger.path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for rule in rows[0]["rules"]:
        for name in ("claim", "metrics", "seeds", "tuning"):
            del rule[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not report_of(planted, planted.plan(make_experiment())).warnings
    claim = Claim(statement="b beats a", source="x", arm="b", against="a", rule=Rule(alpha=0.3), paper_effect=0.4)
    assert any("alpha 0.05" in w for w in report_of(planted, planted.plan(make_experiment(claims=[claim]))).warnings)


def test_seeds_of_the_command_line_are_said(planted):
    plan = make_plan(read("planted.py", [("seed", "0,1,2,3,4,5")]), "smoke")
    assert any("not by the file: --sweep.seed=0,1,2,3,4,5" in warning for warning in report_of(planted, plan).warnings)


def test_a_file_that_was_edited_after_the_first_start_is_said_of_the_file_too(planted):
    ended(planted, None)
    path = planted.root / "planted.py"
    assert not analyse(read_results("planted.py", scale="smoke")).warnings
    path.write_text(path.read_text() + "\n# looked at the results\n")
    warnings = analyse(read_results("planted.py", scale="smoke")).warnings
    assert warnings == ["planted.py is not what it was when the sweep was first started"]


def test_a_changed_file_does_not_change_the_report_of_a_sweep(planted, command_file):
    results = read_results(str(planted.place.path))
    assert "has changed since" in results.notes[-1] and [arm.name for arm in results.arms] == ["a", "b"]


@pytest.fixture
def command_file(planted):
    """A sweep whose file was edited after its last start."""
    plan = planted.plan()
    for run in plan.runs:
        planted.write(run, [3.0, BETTER[run.arm][run.seed]])
    planted.place.write_plan(plan)
    path = planted.root / "planted.py"
    path.write_text(path.read_text().replace('Arm("a")', 'Arm("z")').replace('against="a"', 'against="z"'))


def test_a_sweep_is_reported_from_anywhere_without_its_config_files(planted, tmp_path_factory, monkeypatch):
    planted.write_all(BETTER)
    (planted.root / "small.py").unlink()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    results = read_results(str(planted.place.path))
    assert len(results.records) == 10 and analyse(results).verdicts[0].word == REPRODUCED


def test_changes_on_the_command_line_are_shown(planted):
    plan = make_plan(read("planted.py"), "smoke", changes=[("model.layers", "1")])
    warnings = report_of(planted, plan).warnings
    assert "every run was changed on the command line: model.layers = 1" in warnings


def test_a_directory_of_runs_is_grouped_by_what_differs_and_claims_nothing(planted):
    planted.write_all(BETTER)
    results = read_results("runs")
    assert sorted(arm.name for arm in results.arms) == ["small learning_rate=0.01", "small learning_rate=0.5"]
    assert len(results.records) == 10 and not analyse(results).verdicts
    (planted.root / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a sweep"):
        read_results("empty")
    with pytest.raises(ConfigError, match="does not exist"):
        read_results("nowhere.py")


# ---- metrics


def test_last_best_and_a_step_are_read_from_the_rows():
    rows = [{"step": s, "split": "val", "loss": y} for s, y in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0))]
    assert value(rows, Metric()) == 2.0 and value(rows, Metric(at="best")) == 1.0 and value(rows, Metric(at=1)) == 3.0
    assert value(rows, Metric(at=9)) is None and value(rows, Metric("bpb")) is None
    assert value(rows, Metric(at="best", lower_is_better=False)) == 3.0


def test_a_number_within_a_dict_is_read_by_its_path_and_over_rows_by_its_median():
    rows = [
        {"step": s, "split": "val", "a.b": float(s), "a": {"c": {"d": 2.0 * s}}, "timing": {"seconds": y}}
        for s, y in ((0, 5.0), (1, 1.0), (2, 9.0))
    ]
    assert (
        value(rows, Metric("a.b")) == 2.0
        and value(rows, Metric("a.c.d", at=1)) == 2.0
        and value(rows, Metric("a.c.d", at=0)) == 0
    )
    assert value(rows, Metric("timing.seconds", at="median")) == 5.0 and value(rows, Metric("a.c")) is None
    assert value(rows, Metric("a.x.y")) is None and Metric("a.b", at="median").label == "val a.b (median)"


def test_a_curve_crosses_a_target_between_its_points():
    points = [(10, 4.0), (20, 2.0), (30, 3.0)]
    assert crossing(points, 3.0) == 15.0 and crossing(points, 5.0) == 10.0 and crossing(points, 1.0) is None
    assert crossing(points, 2.0) == 20.0 and crossing([(0, 0.0), (4, 1.0)], 0.25, lower_is_better=False) == 1.0
    assert seconds_at([(10, 5.0), (20, 15.0)], 15) == 10.0 and seconds_at([(10, 5.0)], 11) is None


def test_steps_to_a_target_are_those_of_the_other_arm_at_the_same_seed(planted, make_experiment):
    metric = Metric("loss", kind="steps_to", target="a", at="last")
    found = make_experiment(claims=[Claim(statement="faster", source="x", arm="b", against="a", metric=metric, rule=Rule())])
    plan = planted.plan(found)
    for run in plan.runs:
        planted.write(run, [4.0, 3.0, 2.0] if run.arm == "a" else [4.0, 2.0 + run.seed / 100, 1.0])
    report = report_of(planted, plan)
    assert report.verdicts[0].evidence.improvements[0] == pytest.approx(1.0) and report.verdicts[0].word == REPRODUCED


def test_an_improvement_of_a_logarithm_is_a_factor_and_no_share(planted, make_experiment):
    def shown(metric):
        report = report_of(planted, planted.write_all(BETTER, make_experiment(metric=metric)))
        return report, to_json(report)["claims"][0], dict(verdict_facts(report.verdicts[0], report))["improvement"]

    report, claim, words = shown(Metric("loss", log_base=2))
    mean = np.mean(np.subtract(BETTER["a"], BETTER["b"]))
    assert claim["factor"] == pytest.approx(2**mean) and claim["relative"] is None
    assert f"(a factor of {2**mean:.4g})" in words and "%" not in words.partition(",")[0]
    _, claim, words = shown(Metric("loss"))
    assert claim["factor"] is None and claim["relative"] == pytest.approx(mean / 2) and "% of a)" in words
    steps, claim, words = shown(Metric("loss", kind="steps_to", target=3.0, log_base=2))  # steps are no logarithm
    assert claim["factor"] is None and "% of a)" in words
    grown = Metric("accuracy", lower_is_better=False, log_base=10)
    _, claim, _ = shown(grown)
    assert claim["factor"] == pytest.approx(10 ** claim["mean"]) and claim["factor"] > 1


def test_the_base_of_a_logarithm_is_above_one(make_experiment):
    from trainer.sweep.experiment import check

    assert "log_base 1" in str(check(make_experiment(metric=Metric(log_base=1)))[0])


def test_the_machine_names_its_processor_where_the_run_does():
    from trainer.report.results import machine

    known = {"devices": {"count": 1, "kind": "cpu"}, "cpus": 2, "packages": {"jax": "0.10.2"}, "python": "3.11.7"}
    assert machine(known) == "1 x cpu, 2 CPUs, jax 0.10.2, Python 3.11.7"  # of earlier versions
    assert machine(known | {"processor": None}) == machine(known)
    assert machine(known | {"processor": "AMD EPYC"}) == "1 x cpu, 2 CPUs of AMD EPYC, jax 0.10.2, Python 3.11.7"


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
    return report_of(planted, plan)


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


def test_a_claim_whose_arm_is_tuned_elsewhere_says_so_wherever_it_is_shown(planted, make_experiment):
    tuned = Tuning(space=axis("optimizer.direction.learning_rate", [0.1, 0.5]), seeds=[100], scales=["laptop"])
    scales = {"smoke": Scale(seeds=5), "laptop": Scale(seeds=5)}
    arms = [Arm("a"), Arm("b", {"optimizer.direction.learning_rate": 0.5}, tune=tuned)]
    report = report_of(planted, planted.write_all(BETTER, make_experiment(arms=arms, scales=scales)))
    verdict = report.verdicts[0]
    assert verdict.word == REPRODUCED and "not tuned at this scale: b" in verdict.why
    assert dict(verdict_facts(verdict, report))["tuning"] == "not tuned at this scale: b"
    assert verdicts(report).rows[0][1] == "reproduced (not tuned at this scale)"
    assert to_json(report)["claims"][0]["not_tuned"] == ["b"]
    assert markdown.render(report, []).count("not tuned at this scale") == 3
    assert page.render(report, []).count("not tuned at this scale") == 2
    plain = report_of(planted, planted.write_all(BETTER))
    assert "not tuned" not in markdown.render(plain, []) + page.render(plain, [])


def test_a_last_evaluation_of_other_data_is_said_where_steps_to_a_loss_are_compared(planted, make_experiment):
    for also, said in ((), False), ([Metric(kind="steps_to", target="a")], True):
        plan = planted.write_all(BETTER, make_experiment(also=also))
        for run in plan.runs:
            path = planted.place.directory(run) / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [row | {"tokens": 10 if row["step"] < 3 else 99} for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert any("(10, 99 tokens)" in warning for warning in report_of(planted, plan).warnings) == said


def test_seconds_count_updates_alone(planted, make_experiment):
    found = make_experiment(also=[Metric("loss", kind="seconds_to", target=3.0)])
    plan = planted.write_all(BETTER, found)
    report = report_of(planted, plan)
    assert report.arms[0].values[1][0] == pytest.approx(0.5 * (1 + 1.0))  # reached at step 2, half a second each


def test_the_tuned_arm_is_reported_with_its_choice(planted, make_experiment):
    rate = "optimizer.direction.learning_rate"
    arms = [Arm("a"), Arm("b", tune=Tuning(space=axis(rate, [0.1, 0.5, 0.9]), seeds=[100]))]
    found = make_experiment(arms=arms)
    for run in planted.plan(found).runs:
        planted.write(run, [4.0, {"0.1": 3.0, "0.5": 1.0, "0.9": 2.0}.get(run.point.partition("=")[2], 2.0)])
    assert planted.plan(found).choices[0].chosen == "learning_rate=0.5"
    for run in planted.plan(found).runs:
        if run.stage == "compare":
            planted.write(run, [4.0, BETTER[run.arm][run.seed]])
    report = report_of(planted, planted.plan(found))
    assert report.arms[1].chosen == "learning_rate=0.5" and report.verdicts[0].word == REPRODUCED


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
    warnings = report_of(planted, planted.plan(found)).warnings
    assert any("the tuning of b chose without learning_rate=0.9" in warning for warning in warnings)


# ---- measurements


def test_a_claim_about_measurements_names_the_tokens_of_what_they_looked_at(planted, make_experiment):
    from trainer.report.tables import arms
    from trainer.sweep import RunOf

    how = {"measure": "trainer.sweep.measurement:main"}  # is never called here
    arms_of = [Arm("a"), Arm("b", {"optimizer.direction.learning_rate": 0.5})]
    arms_of += [Arm(f"of {name}", {"run": RunOf(name)}, **how) for name in "ab"]
    claim = Claim(statement="s", source="x", arm="of b", against="of a", metric=Metric("accuracy"), rule=Rule())
    found = make_experiment(arms=arms_of, claims=[claim], also=[Metric("only_there")])
    plan = planted.plan(found)
    for run in plan.runs:
        planted.write(run, [4.0, 3.0, BETTER[run.arm[-1]][run.seed]])
        if run.arm == "of b":
            file = planted.place.directory(run) / "metrics.jsonl"
            file.write_text(file.read_text() + '{"step": 9, "split": "val", "only_there": 1.5}\n')
    report = report_of(planted, plan)
    trained = next(run.tokens for run in plan.runs if run.arm == "a")
    assert trained > 0 and to_json(report)["claims"][0]["tokens"] == trained
    facts = dict(verdict_facts(report.verdicts[0], report))
    assert "tokens a run" in facts["seen at"] and facts["by seed"].count(":") == 5
    tables = arms(report)
    assert [row[0] for row in tables[1].rows] == ["a", "b", "of a", "of b"]
    assert [row[0] for row in tables[2].rows] == ["of b"] and "3 arms have no such number" in tables[2].caption


# ---- numbers out


def test_the_json_has_every_number_and_all_that_is_needed_to_run_it_again(planted):
    plan = planted.write_all(BETTER)
    found = json.loads(json.dumps(to_json(report_of(planted, plan)), allow_nan=False))
    claim = found["claims"][0]
    assert claim["verdict"] == REPRODUCED and claim["p_holm"] == claim["p"] and len(claim["improvements"]) == 5
    assert claim["paper_effect"] == 0.4 and claim["tokens"] == plan.runs[0].tokens and claim["p_sign_flip"] == 0.0625
    run = found["runs"][0]
    assert run["config"]["seed"] == 0 and run["command"].startswith("python -m trainer --config") and run["versions"]
    again = found["source"]["command"].splitlines()
    assert again == [f"python -m trainer.{what} planted.py --scale smoke" for what in ("sweep", "report")]


def test_the_changes_of_a_code_that_no_revision_names_are_in_the_json(planted):
    source = {"revision": "b" * 40, "diff": "+x\n+y", "untracked": ["new.py"]}
    environment = {"packages": {}, "source": source, "data": {"kind": "text", "fingerprint": "f" * 64}}
    report = report_of(planted, planted.write_all(BETTER, environment=environment))
    changes = to_json(report)["changes"]
    assert list(changes.values()) == [{"diff": "+x\n+y", "untracked": ["new.py"]}] and "with changes" in list(changes)[0]
    text = str(machines(report).rows)
    assert "2 lines of diff, kept in report.json, and 1 new files" in text and "text, fingerprint ffffffffffff'" in text
    assert not to_json(report_of(planted, planted.write_all(BETTER)))["changes"]


def test_two_hundred_reports_of_a_planted_null_reproduce_no_more_than_the_error_rate(planted, make_experiment):
    import scipy.stats

    from trainer.report.results import Record, Results
    from trainer.sweep.outcome import Outcome

    claims = [Claim(statement=f"{arm} beats a", source="x", arm=arm, against="a", rule=Rule()) for arm in ("b", "c", "d")]
    drawn, wrong = np.random.default_rng(7), 0
    for _ in range(200):
        records = [
            Record(arm, seed, "compare", "", planted.root, Outcome("finished", 10), {}, "", 10, 0,
                   [{"step": 10, "split": "val", "loss": drawn.normal(2.0, 0.1)}])
            for arm in "abcd" for seed in range(5)
        ]  # fmt: skip
        results = Results(
            "null", "", "smoke", "", Metric(), (), tuple(claims), [Arm(n) for n in "abcd"], records, tuple(range(5))
        )
        wrong += any(verdict.word == REPRODUCED for verdict in analyse(results).verdicts)
    assert wrong <= scipy.stats.binom.ppf(1 - 1e-4, 200, 0.05)


def test_a_report_is_compared_with_another_one(planted, capsys):
    plan = planted.write_all(BETTER)
    assert main([str(planted.place.path), "--out", "first"]) == 0
    for run in plan.runs:
        if run.arm == "b":
            planted.write(run, [4.0, BETTER["b"][run.seed] + 1.0])
    assert main([str(planted.place.path), "--out", "second", "--compare", "first/report.json"]) == 0
    text = (planted.root / "second" / "report.md").read_text()
    assert "Compared with first/report.json" in text and "5 pairs by seed" in text
    row = next(line for line in text.splitlines() if line.startswith("| b | val loss"))
    assert "| 1 [1, 1] |" in row
    row = next(line for line in text.splitlines() if line.startswith("| a | val loss"))
    assert "equal bit for bit" in row
    with pytest.raises(ConfigError, match="not a report.json"):
        (planted.root / "bad.json").write_text("{}")
        main([str(planted.place.path), "--compare", "bad.json"])
