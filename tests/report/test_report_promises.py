"""What a report goes by must be what stood before the runs, and one code: changed claims, other versions."""

import json

import pytest

from trainer.report.analysis import analyse, to_json
from trainer.report.reading import read_results
from trainer.report.records import code_version
from trainer.report.tables import machines, mixed_versions
from trainer.sweep import Arm, Claim, Metric, Rule, Scale, Tuning, axis
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import read

ENVIRONMENT = {"python": "3.11.7", "packages": {"jax": "0.10.2"}, "source": {"revision": "a" * 40, "diff": "", "untracked": []}}


def test_rules_that_were_changed_after_the_first_run_are_shown(planted, make_experiment):
    plan = planted.write_all(planted.better)
    planted.place.ledger.append("end", run=plan.runs[0].directory, outcome="finished", step=10)
    assert not planted.report(plan).warnings
    claim = Claim(statement="b beats a", source="[made up]", arm="b", against="a", rule=Rule(alpha=0.3), paper_effect=0.4)
    changed = planted.report(planted.plan(make_experiment(claims=[claim])))
    text = next(w for w in changed.warnings if "rules were changed after" in w)
    assert "alpha 0.3" in text and "alpha 0.05" in text


def ended(planted, found):
    """A plan whose runs are there, whose rules stand in the ledger, and of which a run has ended."""
    plan = planted.write_all(planted.better, found)
    planted.place.ledger.append("end", run=plan.runs[0].directory, outcome="finished", step=10)
    return plan


def grid(*rates):
    return Tuning(space=axis("optimizer.direction.learning_rate", list(rates)), seeds=[100])


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({}, {"metric": Metric("loss", unit="nats", lower_is_better=False)}, "lower_is_better then true, now false"),
        ({}, {"scales": {"smoke": Scale(seeds=6)}}, "seeds.a now with 5"),
        ({}, {"arms": [Arm("a"), Arm("b", tune=grid(0.5, 0.7))]}, 'tuning.b.points then null, now [{"optimizer.direction'),
        (
            {"scales": {"smoke": Scale(seeds=[0, 1, 3])}},
            {"scales": {"smoke": Scale(seeds=[0, 1, 2])}},
            "seeds.a now with 2, now without 3",
        ),
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
    said = [w for w in planted.report(planted.plan(of(**after))).warnings if "were changed after" in w]
    assert len(said) == (words is not None) and all(words in text for text in said)


def test_a_statement_about_other_arms_is_said_once_and_a_change_of_many_claims_too(planted, make_experiment):
    arms = [Arm(name, {"optimizer.direction.learning_rate": 0.1 * k}) for k, name in enumerate("abc", start=1)]
    rule = Rule(effect=0.5)

    def of(against, seeds):
        claims = [Claim(statement=f"{arm} wins", source="x", arm=arm, against=against, rule=rule) for arm in "bc"]
        claims.append(Claim(statement="c beats b", source="x", arm="c", against="b", rule=rule))
        return make_experiment(arms=arms, claims=claims, scales={"smoke": Scale(seeds=seeds)})

    def said(now):
        return next(w for w in planted.report(planted.plan(now)).warnings if "were changed after" in w)

    plan = planted.plan(of("a", 5))
    planted.place.write_plan(plan)
    planted.place.ledger.append("end", run=plan.runs[0].directory, outcome="finished", step=10)
    more = said(of("a", 6))
    assert more.count("seeds.c now") == 1 and "2 claims: seeds.c now with 5" in more
    other = [claim for claim in of("a", 5).claims if claim.arm == "b"]
    other.append(Claim(statement="c wins", source="x", arm="c", against="b", rule=rule))
    words = said(make_experiment(arms=arms, claims=other))
    assert "c wins: then c against a, val loss (last), now c against b, val loss (last)" in words.replace(", nats", "")
    assert words.count("c wins") == 1 and "then: c beats b (c against b" in words


def test_a_ledger_of_an_earlier_version_is_compared_by_what_it_has(planted, make_experiment):
    ended(planted, make_experiment())
    path = planted.place.ledger.path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for rule in rows[0]["rules"]:
        for name in ("claim", "metrics", "seeds", "tuning"):
            del rule[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not planted.report(planted.plan(make_experiment())).warnings
    claim = Claim(statement="b beats a", source="x", arm="b", against="a", rule=Rule(alpha=0.3), paper_effect=0.4)
    assert any("alpha 0.05" in w for w in planted.report(planted.plan(make_experiment(claims=[claim]))).warnings)


def test_seeds_of_the_command_line_are_said(planted):
    plan = make_plan(read("planted.py", [("seed", "0,1,2,3,4,5")]), "smoke")
    assert any("not by the file: --sweep.seed=0,1,2,3,4,5" in warning for warning in planted.report(plan).warnings)


def test_a_file_that_was_edited_after_the_first_start_is_said_of_the_file_too(planted):
    ended(planted, None)
    path = planted.root / "planted.py"
    assert not analyse(read_results("planted.py", scale="smoke")).warnings
    path.write_text(path.read_text() + "\n# looked at the results\n")
    warnings = analyse(read_results("planted.py", scale="smoke")).warnings
    assert warnings == ["planted.py is not what it was when the sweep was first started"]


# ---- code versions


def test_runs_of_another_code_version_are_shown_with_their_arms_and_pairs(planted):
    plan = planted.write_all(planted.better)
    other = dict(
        python="3.11.7", packages={"jax": "0.10.2"}, devices={"kind": "cpu", "count": 1}, cpus=2,
        source={"revision": "b" * 40, "diff": "+x", "untracked": []},
    )  # fmt: skip
    for run in [run for run in plan.runs if run.arm == "b" and run.seed < 2]:
        planted.write(run, [4.0, planted.better["b"][run.seed]], environment=other)
    report = planted.report(plan)
    warning = next(w for w in report.warnings if "code versions are mixed" in w)
    assert "aaaaaaaaaa" in warning and "bbbbbbbbbb with changes" in warning and "(b 2)" in warning
    assert "2 of 5 pairs were made by different code versions" in mixed_versions(report.verdicts[0], report)


def test_an_edited_file_that_git_does_not_track_is_another_version():
    source = {"revision": "c" * 40, "diff": "", "untracked": ["new.py"]}
    versions = [code_version({"source": source | {"contents": {"new.py": digest}}}) for digest in ("1", "2")]
    assert versions[0] != versions[1] and code_version({"source": source}) not in versions


def test_another_content_of_a_plugin_or_of_a_measurements_module_is_shown(planted):
    plan = planted.write_all(planted.better, environment=ENVIRONMENT | {"modules": {"mine": "1" * 16}})
    for run in [run for run in plan.runs if run.arm == "b" and run.seed < 2]:
        planted.write(run, [4.0, planted.better["b"][run.seed]], environment=ENVIRONMENT | {"modules": {"mine": "2" * 16}})
    for run in [run for run in plan.runs if run.arm == "b" and run.seed == 2]:  # another module is no mixture
        planted.write(run, [4.0, planted.better["b"][2]], environment=ENVIRONMENT | {"modules": {"other": "3" * 16}})
    report = planted.report(plan)
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
