"""Runs whose directories are gone, known from an earlier report alone."""

import json
import shutil

import pytest

from strata import ConfigError
from tests.report.conftest import FILE
from trainer.report.analysis import analyse, to_json
from trainer.report.cli import write
from trainer.report.curves import curves, drawn_rows
from trainer.report.figures import draw
from trainer.report.reading import read_results
from trainer.report.records import make_record
from trainer.report.tables import runs
from trainer.report.verdicts import NOT_REPRODUCED, REPRODUCED
from trainer.sweep.outcome import Outcome

TUNED = 'tune=Tuning(space=axis("optimizer.direction.learning_rate", [0.1, 0.5, 0.9]), seeds=[100])'
ENDS = {"a": [2.1, 2.0, 2.2, 2.05, 2.15], "b": [1.1, 1.2, 1.0, 1.15, 1.05]}


def fields(run):
    """What a plan knows of a run, for its record."""
    config = json.loads(run.config)
    known = {name: getattr(run, name) for name in ("arm", "seed", "stage", "point", "command", "tokens")}
    return known | {"config": config, "steps": 0}


@pytest.fixture
def report_file(planted):
    """Of a finished sweep with a tuned arm, whose directories of that arm are then removed."""
    tuned = FILE.replace('control="nothing <b>bold</b>"', f'control="nothing", {TUNED}')
    (planted.root / "planted.py").write_text(tuned)
    for _ in range(2):  # runs that compare are known once the tuning has ended
        for run in planted.plan().runs:
            end = 1.0 + abs(float(run.point.split("=")[1]) - 0.5) if run.stage == "tune" else ENDS[run.arm][run.seed]
            planted.write(run, [4.0, 3.0, end])
    plan = planted.plan()
    planted.place.write_plan(plan)
    planted.drawings = write(analyse(read_results("planted.py")), planted.root)
    for run in plan.runs:
        if run.arm == "b":
            shutil.rmtree(planted.place.directory(run))
    return planted.root / "report.json"


def test_what_is_gone_counts_as_the_report_said(planted, report_file):
    whole = json.loads(report_file.read_text())
    assert len(read_results("planted.py").unfinished) == 3  # the tuning begins anew, and no comparison is known
    report = analyse(read_results("planted.py", earlier=report_file))
    found = to_json(report)
    assert report.finished and report.verdicts[0].word == REPRODUCED
    for key in ("arms", "claims", "tuning", "runs"):
        assert found[key] == json.loads(json.dumps(whole[key])), key
    assert any("8 runs are known from an earlier report alone" in text and "(b 8)" in text for text in report.warnings)
    assert not any("changed" in text for text in report.warnings)
    assert [row[4] for row in runs(report).rows if row[0].startswith("b [") and row[1] == "0"] == ["1.1"]


def test_it_is_in_pictures_of_numbers_and_in_none_of_curves(report_file):
    report_file.with_name("report.curves.jsonl").unlink()
    report = analyse(read_results("planted.py", earlier=report_file))
    drawings = {drawing.name: drawing for drawing in draw(report)}
    curves = [drawing for name, drawing in drawings.items() if name.startswith("curve")]
    assert curves and all("a (n = 5)" in drawing.alt and "b (n" not in drawing.alt for drawing in curves)
    assert any("b (tuning)" in drawing.alt for drawing in drawings.values())
    assert any("8 runs are known" in text and "and 5 are in no curve (b 8)" in text for text in report.warnings)


def test_curves_that_the_report_kept_are_drawn_as_they_were_and_kept_on(planted, report_file):
    before = {drawing.name: drawing.svg for drawing in planted.drawings}
    report = analyse(read_results("planted.py", earlier=report_file))
    after = {drawing.name: drawing.svg for drawing in draw(report)}
    assert {"curve-val-loss", "curve-train-loss", "speed"} <= after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert curves(report.results) == report_file.with_name("report.curves.jsonl").read_text()
    assert not any("no curve" in text for text in report.warnings)


def test_what_is_drawn_of_a_long_run_is_thinned_and_its_evaluations_are_whole(planted):
    run = planted.plan().runs[0]
    losses = [4 - (step / 100) ** 0.5 for step in range(300)]
    record = make_record(planted.write(run, losses, arrays=True), Outcome("finished"), **fields(run))
    rows = drawn_rows(record, [("val", "loss"), ("train", "loss")])
    evaluations = [(row["step"], row["loss"], row["accuracy"]) for row in rows if row["split"] == "val"]
    assert evaluations == [(step, loss, 1 / (1 + loss)) for step, loss in enumerate(losses, start=1)]
    training = [row for row in rows if row["split"] == "train"]
    assert len(training) == 64 and (training[0]["step"], training[-1]["step"]) == (1, 300)
    for row in training:
        loss = losses[row["step"] - 1]
        assert row["loss"] == float(f"{loss:.5g}") and row["grad_norm_by_layer"][:2] == [row["loss"], float(f"{2 * loss:.5g}")]


def test_runs_that_have_ended_here_are_read_here(planted, report_file):
    gone = [run for run in json.loads(report_file.read_text())["runs"] if run["arm"] == "b" and run["stage"] == "compare"]
    before = analyse(read_results("planted.py", earlier=report_file))
    again = next(run for run in before.results.of("b") if run.directory.name == gone[0]["directory"])
    again.directory.mkdir()
    (again.directory / "config.json").write_text(json.dumps(again.config))
    for message, states in (("OSError: full", {"finished": 5}), ("Diverged: nan", {"diverged": 1, "finished": 4})):
        (again.directory / "status.json").write_text(json.dumps({"state": "failed", "step": 3, "message": message}))
        report = analyse(read_results("planted.py", earlier=report_file))
        assert report.arms[1].states == states


def test_a_rule_changed_since_is_told(planted, report_file):
    (planted.root / "planted.py").write_text((planted.root / "planted.py").read_text().replace("effect=0.5", "effect=0.2"))
    (planted.place.path / "ledger.jsonl").unlink()
    warnings = analyse(read_results("planted.py", earlier=report_file)).warnings
    assert any("effect then 0.5, now 0.2" in text and "earlier report" in text for text in warnings)


def test_a_number_that_is_not_finite_and_the_loss_of_a_run_that_went_on_stay_what_they_were(planted):
    plan = planted.plan()
    label = "val loss (last, nats/token)"
    for run in plan.runs:
        last = float("inf") if (run.arm, run.seed) == ("b", 1) else ENDS[run.arm][run.seed]
        planted.write(run, [4.0] * 9 + [last, 0.0])
    for keeps in (True, False):
        lasting = plan.runs[0]
        directory = planted.place.directory(lasting)
        (directory / "status.json").write_text(json.dumps({"state": "finished", "step": 11}))
        if not keeps:
            rows = [
                line
                for line in (directory / "metrics.jsonl").read_text().splitlines()
                if '"step": 10, "split": "val"' not in line
            ]
            (directory / "metrics.jsonl").write_text("\n".join([*rows, ""]))
        whole = analyse(read_results("planted.py"))
        write(whole, planted.root)
        shutil.move("runs", "gone")
        report = analyse(read_results("planted.py", earlier="report.json"))
        assert report.verdicts[0].word == NOT_REPRODUCED and report.verdicts[0].evidence == whole.verdicts[0].evidence
        assert report.verdicts[0].evidence.not_finite == (1, 0) and report.verdicts[0].evidence.no_number == (not keeps)
        assert any("b seed 1: " in text for text in report.warnings)
        assert any("1 run went on beyond the 10 updates" in text for text in report.warnings) is not keeps
        content = json.loads((planted.root / "report.json").read_text())
        for run in content["runs"]:
            if run["directory"] == directory.name:
                run["numbers"][label] = [4.0, False]  # as reports of earlier versions took it
        (planted.root / "report.json").write_text(json.dumps(content))
        again = analyse(read_results("planted.py", earlier="report.json"))
        assert again.verdicts[0].evidence == whole.verdicts[0].evidence
        shutil.rmtree("runs", ignore_errors=True)
        shutil.move("gone", "runs")


def test_what_an_earlier_report_said_of_how_runs_came_about_is_said_again_and_once(planted, report_file):
    content = json.loads(report_file.read_text())
    lasting = [
        "runs shared the machine with others (more than one slot): their seconds are not those of a run alone",
        "2 runs were made with another evaluate.batches than planned",
        "planned.py is not what it was when the sweep was first started",
        "seeds or axes were given on the command line, not by the file: --sweep.seed=0,1",
    ]
    uneven = "evaluations score different amounts of held-out data (1, 2 tokens), so steps and seconds to a loss compare"
    said = [
        lasting[0],
        f"the earlier report said: {lasting[0]}",
        *lasting[1:],
        uneven,
        "one seed: no verdict is given at n = 1",
    ]
    report_file.write_text(json.dumps(content | {"warnings": said}))

    def repeated():
        found = [text for text in read_results("planted.py", earlier=report_file).notes if "earlier report said" in text]
        return [text.removeprefix("the earlier report said: ") for text in found]

    assert repeated() == lasting
    report_file.with_name("report.curves.jsonl").unlink()  # what evaluations scored is not known from anything else
    assert repeated() == [*lasting, uneven]


def test_what_is_no_report_of_this_experiment_is_refused(planted, report_file):
    content = json.loads(report_file.read_text())
    report_file.write_text(json.dumps(content | {"scale": "laptop"}))
    with pytest.raises(ConfigError, match="is of planted at scale laptop, this one of planted at smoke"):
        read_results("planted.py", earlier=report_file)
    del content["runs"][0]["numbers"]
    report_file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="not a report.json whose runs have numbers"):
        read_results("planted.py", earlier=report_file)
    with pytest.raises(ConfigError, match="No such file"):
        read_results("planted.py", earlier="gone.json")
    with pytest.raises(ConfigError, match="needs the experiment's file"):
        read_results(str(planted.place.path), earlier=report_file)
