"""The table of findings in `experiments/results/README.md` says what the reports beside it say."""

import json
from pathlib import Path

from trainer.sweep.plan import make_plan
from trainer.sweep.reading import read

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"
PARTIAL = ("recipes-laptop-part-1", "recipes-laptop-part-2")
"""Kept for their curves: their claims are decided again, with more runs, in `recipes-laptop`."""


def rows():
    """A line of the table for every claim with a verdict."""
    for path in sorted(RESULTS.glob("*/report.json")):
        report = json.loads(path.read_text())
        for claim in report["claims"]:
            if claim["verdict"] == "no verdict" or path.parent.name in PARTIAL:
                continue
            name = f"[`{report['title']}`]({path.parent.name}/report.md)"
            low, high = claim["interval95"]
            reached = claim.get("missed", [0])[0] < claim["pairs"]
            difference = f"{claim['mean']:.3g} [{low:.3g}, {high:.3g}]" if reached else "reached by no run of the arm"
            small = "yet smaller than the effect worth seeing" in claim["why"]
            verdict = claim["verdict"] + ", yet small" * small + ", not tuned" * bool(claim.get("not_tuned"))
            yield f"| {name} | {claim['statement']} | {claim['metric']} | {verdict} | {difference} |"


def test_the_table_of_findings_is_that_of_the_reports():
    text = (RESULTS / "README.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| [`")]
    assert table == list(rows())


def test_a_whole_report_decides_the_claims_of_its_experiment_by_their_rules(monkeypatch):
    monkeypatch.chdir(RESULTS.parents[1])
    whole = 0
    for path in sorted(RESULTS.glob("*/report.json")):
        report = json.loads(path.read_text())
        if not report["finished"]:
            continue
        whole += 1
        plan = make_plan(read(f"experiments/{report['title']}.py"), report["scale"])
        claims = [(claim["statement"], claim["arm"], claim["against"], claim["rule"]) for claim in report["claims"]]
        assert claims == [(claim.statement, claim.arm, claim.against, str(claim.rule)) for claim in plan.claims], (
            path.parent.name
        )
    assert whole > 5


def test_no_report_names_a_directory_of_the_machine_that_made_it():
    for path in RESULTS.glob("*/report.*"):
        assert "/tmp/" not in path.read_text() and "/home/" not in path.read_text(), path
