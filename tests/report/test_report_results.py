"""From run directories to a report: pairs, failures, other code, unfinished sweeps, changed rules, comparisons."""

import json
import shutil

import numpy as np
import pytest

from strata import ConfigError
from trainer.report import markdown, page
from trainer.report.analysis import analyse, to_json
from trainer.report.cli import main
from trainer.report.reading import of_plan, read_results
from trainer.report.results import seconds_at
from trainer.report.tables import machines, verdict_facts
from trainer.report.verdicts import NO_VERDICT, NOT_REPRODUCED, REPRODUCED
from trainer.sweep import Arm, Claim, Metric, Rule, Scale
from trainer.sweep.outcome import crossing, value
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import read


def test_a_planted_improvement_is_paired_by_seed_and_reproduced(planted):
    report = planted.report(planted.write_all(planted.better))
    verdict = report.verdicts[0]
    assert verdict.word == REPRODUCED and report.finished and not report.warnings
    assert verdict.evidence.improvements == pytest.approx(np.subtract(planted.better["a"], planted.better["b"]))
    assert report.arms[0].summaries[0].mean == pytest.approx(2.0) and report.arms[0].states == {"finished": 5}


def test_for_a_metric_that_grows_an_improvement_is_an_increase(planted, make_experiment):
    found = make_experiment(metric=Metric("accuracy", lower_is_better=False))
    report = planted.report(planted.write_all(planted.better, found))
    assert report.verdicts[0].word == REPRODUCED and report.verdicts[0].summary.mean > 0


def test_a_run_that_crashed_is_counted_and_in_no_mean(planted):
    plan = planted.write_all(planted.better)
    crashed = next(run for run in plan.runs if run.arm == "b" and run.seed == 1)
    planted.write(crashed, [4.0, -1000.0], state="failed", message="StrataError: it broke")
    report = planted.report(plan)
    assert report.arms[1].summaries[0].mean == pytest.approx(np.mean([1.0, 0.9, 1.0, 0.97]))
    verdict = report.verdicts[0]
    assert verdict.evidence.seeds == (0, 2, 3, 4) and verdict.evidence.failed == 1 and verdict.word == REPRODUCED
    assert "1 runs failed" in verdict.why and "b seed 1: StrataError: it broke" in report.warnings[0] and report.finished


def test_a_diverged_run_of_the_arm_ends_the_claim(planted):
    plan = planted.write_all(planted.better)
    lost = next(run for run in plan.runs if run.arm == "b" and run.seed == 3)
    planted.write(lost, [4.0, 0.1], state="failed", message="Diverged: the loss is not finite")
    report = planted.report(plan)
    assert report.verdicts[0].word == NOT_REPRODUCED and "b seed 3 at step 2" in report.warnings[0]
    assert report.arms[1].states == {"finished": 4, "diverged": 1}


def test_an_unfinished_sweep_says_so_and_decides_nothing(planted, capsys):
    plan = planted.plan()
    for run in plan.runs[:7]:
        planted.write(run, [4.0, planted.better[run.arm][run.seed]])
    planted.place.write_plan(plan)
    report = planted.report(plan)
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
        planted.write(run, [4.0, planted.better[run.arm][run.seed]])
    report = planted.report(plan)
    assert report.verdicts[0].word == REPRODUCED and "5 of 15 runs are still to end, all of part 2" in report.warnings[0]


def test_one_seed_gives_no_verdict(planted, make_experiment):
    found = make_experiment(scales={"smoke": Scale(seeds=1)})
    report = planted.report(planted.write_all(planted.better, found))
    assert report.verdicts[0].word == NO_VERDICT and any("n = 1" in warning for warning in report.warnings)


def test_a_changed_file_does_not_change_the_report_of_a_sweep(planted, command_file):
    results = read_results(str(planted.place.path))
    assert "has changed since" in results.notes[-1] and [arm.name for arm in results.arms] == ["a", "b"]


@pytest.fixture
def command_file(planted):
    """A sweep whose file was edited after its last start."""
    plan = planted.plan()
    for run in plan.runs:
        planted.write(run, [3.0, planted.better[run.arm][run.seed]])
    planted.place.write_plan(plan)
    path = planted.root / "planted.py"
    path.write_text(path.read_text().replace('Arm("a")', 'Arm("z")').replace('against="a"', 'against="z"'))


def test_a_sweep_is_reported_from_anywhere_without_its_config_files(planted, tmp_path_factory, monkeypatch):
    planted.write_all(planted.better)
    (planted.root / "small.py").unlink()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    results = read_results(str(planted.place.path))
    assert len(results.records) == 10 and analyse(results).verdicts[0].word == REPRODUCED


def test_changes_on_the_command_line_are_shown(planted):
    plan = make_plan(read("planted.py"), "smoke", changes=[("model.layers", "1")])
    warnings = planted.report(plan).warnings
    assert "every run was changed on the command line: model.layers = 1" in warnings


def test_a_directory_of_runs_is_grouped_by_what_differs_and_claims_nothing(planted):
    planted.write_all(planted.better)
    results = read_results("runs")
    assert sorted(arm.name for arm in results.arms) == ["small learning_rate=0.01", "small learning_rate=0.5"]
    assert len(results.records) == 10 and not analyse(results).verdicts
    twice = sorted(path for path in (planted.root / "runs").glob("small-*") if path.is_dir())[0]
    shutil.copytree(twice, twice.with_name("small-again"))
    with pytest.raises(
        ConfigError, match=f"{twice.name} and small-again in runs are one run, of seed ., which would count twice"
    ):
        read_results("runs")
    (planted.root / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a sweep"):
        read_results("empty")


@pytest.mark.parametrize("content", ["[1]", "{", '{"seed": 0, "train": 3}', '{"seed": 0, "data": {"batch_size": "8"}}', "{}"])
def test_what_is_no_run_in_a_directory_of_runs_is_left_out_and_named(planted, content):
    planted.write_all(planted.better)
    (planted.root / "runs" / "another").mkdir()
    (planted.root / "runs" / "another" / "config.json").write_text(content)
    report = analyse(read_results("runs"))
    assert len(report.results.records) == 10
    assert any("another/config.json is not the config of a run" in warning for warning in report.warnings)


def test_an_unknown_experiment_is_refused():
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
    report = planted.report(plan)
    assert report.verdicts[0].evidence.improvements[0] == pytest.approx(1.0) and report.verdicts[0].word == REPRODUCED


def test_an_improvement_of_a_logarithm_is_a_factor_and_no_share(planted, make_experiment):
    def shown(metric):
        report = planted.report(planted.write_all(planted.better, make_experiment(metric=metric)))
        return report, to_json(report)["claims"][0], dict(verdict_facts(report.verdicts[0], report))["improvement"]

    report, claim, words = shown(Metric("loss", log_base=2))
    mean = np.mean(np.subtract(planted.better["a"], planted.better["b"]))
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
    from trainer.report.records import machine

    known = {"devices": {"count": 1, "kind": "cpu"}, "cpus": 2, "packages": {"jax": "0.10.2"}, "python": "3.11.7"}
    assert machine(known) == "1 x cpu, 2 CPUs, jax 0.10.2, Python 3.11.7"  # of earlier versions
    assert machine(known | {"processor": None}) == machine(known)
    assert machine(known | {"processor": "AMD EPYC"}) == "1 x cpu, 2 CPUs of AMD EPYC, jax 0.10.2, Python 3.11.7"


def test_a_last_evaluation_of_other_data_is_said_where_steps_to_a_loss_are_compared(planted, make_experiment):
    for also, said in ((), False), ([Metric(kind="steps_to", target="a")], True):
        plan = planted.write_all(planted.better, make_experiment(also=also))
        for run in plan.runs:
            path = planted.place.directory(run) / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [row | {"tokens": 10 if row["step"] < 3 else 99} for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert any("(10, 99 tokens)" in warning for warning in planted.report(plan).warnings) == said


def test_seconds_count_updates_alone(planted, make_experiment):
    found = make_experiment(also=[Metric("loss", kind="seconds_to", target=3.0)])
    plan = planted.write_all(planted.better, found)
    report = planted.report(plan)
    assert report.arms[0].values[1][0] == pytest.approx(0.5 * (1 + 1.0))  # reached at step 2, half a second each


@pytest.mark.parametrize(
    "metric,slot,said",
    [
        (Metric(kind="seconds_to", target="a"), {"index": 1}, True),
        (Metric("timing.step_seconds", split="train"), {"index": 1}, True),
        (Metric("timing.step_seconds", split="train"), {"index": 0}, False),
        (Metric("timing.step_seconds", split="train"), {"index": 1, "cluster": "slurm"}, False),  # a job of its own
        (Metric("accuracy"), {"index": 1}, False),
    ],
)
def test_seconds_of_runs_that_ran_side_by_side_are_said_to_be_no_ones_own(planted, make_experiment, metric, slot, said):
    plan = planted.write_all(planted.better, make_experiment(also=[metric]))
    for index, run in enumerate(plan.runs):
        planted.place.ledger.append("start", run=run.directory, slot=slot if index else {"index": 0})
    warnings = planted.report(plan).warnings
    assert any("runs shared the machine with others" in warning for warning in warnings) is said


# ---- measurements


def test_a_claim_about_measurements_names_the_tokens_of_what_they_looked_at(planted, make_experiment):
    from trainer.report.tables import arms
    from trainer.sweep import RunOf

    how = {"measure": "experiments.muon_spectra:quantiles"}  # is never called here
    arms_of = [Arm("a"), Arm("b", {"optimizer.direction.learning_rate": 0.5})]
    arms_of += [Arm(f"of {name}", {"run": RunOf(name)}, **how) for name in "ab"]
    claim = Claim(statement="s", source="x", arm="of b", against="of a", metric=Metric("accuracy"), rule=Rule())
    found = make_experiment(arms=arms_of, claims=[claim], also=[Metric("only_there")])
    plan = planted.plan(found)
    for run in plan.runs:
        planted.write(run, [4.0, 3.0, planted.better[run.arm[-1]][run.seed]])
        if run.arm == "of b":
            file = planted.place.directory(run) / "metrics.jsonl"
            file.write_text(file.read_text() + '{"step": 9, "split": "val", "only_there": 1.5}\n')
    report = planted.report(plan)
    trained = next(run.tokens for run in plan.runs if run.arm == "a")
    assert trained > 0 and to_json(report)["claims"][0]["tokens"] == trained
    facts = dict(verdict_facts(report.verdicts[0], report))
    assert "tokens a run" in facts["seen at"] and facts["by seed"].count(":") == 5
    tables = arms(report)
    assert [row[0] for row in tables[1].rows] == ["a", "b", "of a", "of b"]
    assert [row[0] for row in tables[2].rows] == ["of b"] and "3 arms have no such number" in tables[2].caption


# ---- numbers out


def test_the_json_has_every_number_and_all_that_is_needed_to_run_it_again(planted):
    plan = planted.write_all(planted.better)
    found = json.loads(json.dumps(to_json(planted.report(plan)), allow_nan=False))
    claim = found["claims"][0]
    assert claim["verdict"] == REPRODUCED and claim["p_holm"] == claim["p"] and len(claim["improvements"]) == 5
    assert claim["paper_effect"] == 0.4 and claim["tokens"] == plan.runs[0].tokens and claim["p_sign_flip"] == 0.0625
    run = found["runs"][0]
    assert run["config"]["seed"] == 0 and run["command"].startswith("python -m trainer --config") and run["versions"]
    again = found["source"]["command"].splitlines()
    assert again == [f"python -m trainer.{what} planted.py --scale smoke" for what in ("sweep", "report")]


def test_it_names_runs_that_others_start_from_where_sweeps_keep_them_and_no_directory_of_this_machine(planted, make_experiment):
    from trainer.sweep import RunOf

    found = make_experiment(arms=[Arm("a"), Arm("b", {"init_from.run": RunOf("a")})])
    plan = planted.write_all(planted.better, found)
    assert str(planted.place.runs) in plan.runs[-1].config and str(planted.place.runs) in plan.runs[-1].command
    report = planted.report(plan)
    text = json.dumps(to_json(report)) + markdown.render(report, []) + page.render(report, [])
    donor = next(run.directory for run in plan.runs if run.arm == "a" and run.seed == 0)
    assert f"--config.init_from.run=runs/{donor}" in text and str(planted.root) not in text
    assert not [warning for warning in report.warnings if "than planned" in warning]


def test_the_changes_of_a_code_that_no_revision_names_are_in_the_json(planted):
    source = {"revision": "b" * 40, "diff": "+x\n+y", "untracked": ["new.py"]}
    environment = {"packages": {}, "source": source, "data": {"kind": "text", "fingerprint": "f" * 64}}
    report = planted.report(planted.write_all(planted.better, environment=environment))
    changes = to_json(report)["changes"]
    assert list(changes.values()) == [{"diff": "+x\n+y", "untracked": ["new.py"]}] and "with changes" in list(changes)[0]
    text = str(machines(report).rows)
    assert "2 lines of diff, kept in report.json, and 1 new files" in text and "text, fingerprint ffffffffffff'" in text
    assert not to_json(planted.report(planted.write_all(planted.better)))["changes"]


def test_two_hundred_reports_of_a_planted_null_reproduce_no_more_than_the_error_rate(planted, make_experiment):
    import scipy.stats

    from trainer.report.records import Record
    from trainer.report.results import Results
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


def test_runs_of_a_version_without_an_option_are_no_others_than_planned(planted):
    plan = planted.write_all(planted.better)
    for run, given in zip(plan.runs[:3], (None, 0.0, 0.5), strict=True):
        file = planted.place.directory(run) / "config.json"
        config = json.loads(file.read_text())
        del config["model"]["head_std"]
        config["model"] |= {} if given is None else {"head_std": given}
        file.write_text(json.dumps(config))
    notes = of_plan(plan, planted.place).notes
    assert "1 runs were made with another model.head_std than planned" in notes
    assert sum("made with another" in note for note in notes) == 1


def test_a_report_is_compared_with_another_one(planted, capsys):
    plan = planted.write_all(planted.better)
    assert main([str(planted.place.path), "--out", "first"]) == 0
    for run in plan.runs:
        if run.arm == "b":
            planted.write(run, [4.0, planted.better["b"][run.seed] + 1.0])
    assert main([str(planted.place.path), "--out", "second", "--compare", "first/report.json"]) == 0
    text = (planted.root / "second" / "report.md").read_text()
    assert "Compared with first/report.json" in text and "5 pairs by seed" in text
    row = next(line for line in text.splitlines() if line.startswith("| b | val loss"))
    assert "| 1 [1, 1] |" in row
    row = next(line for line in text.splitlines() if line.startswith("| a | val loss"))
    assert "equal bit for bit" in row
    for run in [run for run in plan.runs if run.arm == "b"]:
        planted.write(run, [4.0, 3.0], state="failed", message="StrataError: it broke")
    assert main([str(planted.place.path), "--out", "third", "--compare", "first/report.json"]) == 0
    rows = (planted.root / "third" / "report.md").read_text().splitlines()
    assert next(row for row in rows if row.startswith("| b | val loss")).endswith("| no run |")
    whole = json.loads((planted.root / "first" / "report.json").read_text())
    for bad in ({}, [], whole | {"arms": [1]}, whole | {"claims": {"a": 0}}, whole | {"metrics": [{}]}):
        (planted.root / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match=r"--compare bad.json: not .* ?report.json"):
            main([str(planted.place.path), "--compare", "bad.json"])
