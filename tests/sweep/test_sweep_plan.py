"""From a file to runs: the identity is the trainer's own, and every mistake is found before anything starts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from strata import ConfigError
from trainer import config as configuration
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, RunOf, Scale, Tuning, axis, product, seeds
from trainer.sweep.experiment import check, expanded_arms
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import Source, read, read_search, split_values

ROOT = Path(__file__).resolve().parents[2]
RATE = "optimizer.direction.learning_rate"


def plan(experiment, scale=None, **rest):
    return make_plan(Source(experiment, Path("experiment.py"), ""), experiment.choose_scale(scale), **rest)


def experiment(**changes):
    given = dict(name="x", config="small.py", arms=[Arm("a"), Arm("b", {RATE: 1e-3})], scales={"smoke": Scale(seeds=2)})
    return Experiment(**{**given, **changes})


def test_a_run_has_the_identity_and_the_directory_that_the_trainer_gives_it(place):
    for run in plan(experiment()).runs:
        words = [word for word in run.command.split() if word.startswith("--config.")]
        loaded = configuration.load("small.py", [tuple(w.removeprefix("--config.").split("=", 1)) for w in words])
        assert run.id == configuration.run_id(loaded.config) and run.directory == f"small-{run.id}"
        assert run.config == configuration.canonical_json(loaded.config)


def test_seeds_come_before_arms_so_that_a_stopped_sweep_is_balanced(place):
    assert [(run.seed, run.arm) for run in plan(experiment()).runs] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


def test_the_first_part_is_run_before_the_others(place):
    arms = [Arm("late", {RATE: 1e-4}, part=2), Arm("headline")]
    assert [run.arm for run in plan(experiment(arms=arms)).runs] == ["headline", "headline", "late", "late"]


def test_an_arm_wins_over_the_scale_and_the_command_line_over_both(place):
    scales = {"smoke": Scale(seeds=1, changes={RATE: 0.5, "model.layers": 3})}
    found = {run.arm: configuration.resolve_config(json.loads(run.config)) for run in plan(experiment(scales=scales)).runs}
    assert found["a"].optimizer.direction.learning_rate == 0.5 and found["b"].optimizer.direction.learning_rate == 1e-3
    run = plan(experiment(scales=scales), changes=[(RATE, "0.25")], only=["a"]).runs[0]
    assert '"learning_rate": 0.25' in run.config and '"layers": 3' in run.config


def test_a_whole_component_of_an_arm_replaces_what_a_scale_set_inside_it_and_takes_deeper_paths(place):
    arms = [Arm("muon", {"optimizer.direction": {"name": "muon", "momentum": 0.9}}, space=axis(RATE, [0.02, 0.03]))]
    scales = {"smoke": Scale(seeds=1, changes={RATE: 0.5})}
    runs = plan(experiment(arms=arms, scales=scales)).runs
    assert [run.arm for run in runs] == ["muon learning_rate=0.02", "muon learning_rate=0.03"]
    assert '"momentum": 0.9' in runs[0].config and '"learning_rate": 0.02' in runs[0].config


def test_a_space_of_points_is_a_sweep_and_may_hold_its_seeds(place):
    found = plan(experiment(arms=product({RATE: [0.1, 0.2]}, seeds([5, 6, 7])), scales={"default": Scale(seeds=1)})).runs
    assert len(found) == 6 and {run.seed for run in found} == {5, 6, 7}
    assert len({run.group for run in found}) == 2


def test_axes_on_the_command_line_cross_a_config(place):
    source = read("small.py", [(RATE, "1e-2,1e-3"), ("model.layers", "[1, 2]"), ("seed", "3,4")])
    runs = make_plan(source, "default").runs
    assert len(runs) == 8 and {run.seed for run in runs} == {3, 4}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1,2", ["1", "2"]), ("[1, 2]", [1, 2]), ('{"a": 1},{"a": 2}', ['{"a": 1}', '{"a": 2}']), ("muon", ["muon"]), ("", [])],
)
def test_values_on_the_command_line_split_outside_brackets(text, expected):
    assert split_values(text) == expected


# ---- refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(arms=[Arm("a", {"model.layerz": 1})]), "unknown field; did you mean model.layers"),
        (dict(arms=[]), "the sweep would be empty"),
        (dict(arms=[Arm("a"), Arm("a", {RATE: 1.0})]), "two arms have this name"),
        (dict(arms=[Arm("a"), Arm("b")]), "are the same run"),
        (dict(arms=[Arm("a"), Arm("b", {"log.every": 2})]), "differ only in keys that make no other run: log.every"),
        (dict(arms=[Arm("a", {"seed": 3})]), "seed is an axis of its own"),
        (dict(scales={"smoke": Scale(seeds=0)}), "there are no seeds"),
        (dict(scales={}), "there are none"),
        (dict(arms=[Arm("a", config="nowhere.py")]), "nowhere.py does not exist"),
        (dict(config=""), "names no config file"),
        (dict(name="a/b"), "names a directory"),
        (dict(arms=[Arm("a", scales=["galaxy"])]), "names the scale 'galaxy'"),
        (dict(arms=[Arm("a", scales=[])]), "runs no arm at scale"),
        (dict(arms=[Arm("a", measure="nowhere:f")]), "there is no module 'nowhere'"),
        (dict(arms=[Arm("a", measure="trainer.sweep.space:spectra")]), "defines axis"),
        (dict(arms=[Arm("a", {"zize": 2}, measure="trainer.sweep.space:label")]), "it takes no arguments, not zize"),
        (
            dict(arms=[Arm("a", measure="experiments.triangular_inverse:invert")]),
            "it also needs method, size, matrices, levels",
        ),
        (dict(metric=Metric(kind="steps_to")), "needs a target"),
        (dict(metric=Metric(kind="steps_to", target="c")), "target 'c' is none of the arms"),
        (dict(metric=Metric(at="first")), "neither last, best, median nor a step"),
        (dict(arms=[Arm("a", tune=Tuning(space=axis(RATE, [1.0]), seeds=[1]))]), "tuning uses seeds \\[1\\]"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(place, changes, words):
    with pytest.raises(ConfigError, match=words):
        found = experiment(**changes)
        if problems := check(found):
            raise ConfigError(problems, "x")
        plan(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(rule=None), "has no decision rule"),
        (dict(arm="c"), "compares 'c', and the arms are a, b"),
        (dict(arm="b"), "compares 'b' with itself"),
        (dict(source=""), "has no source"),
        (dict(rule=Rule(alpha=2)), "alpha 2 is not between 0 and 1"),
        (dict(rule=Rule(test="anova")), "is not one of paired_t, sign_flip"),
        (dict(rule=Rule(least_pairs=1)), "one run an arm says nothing about noise"),
        (dict(rule=Rule(margin=-1.0)), "margin -1.0"),
    ],
)
def test_a_claim_needs_two_arms_a_source_and_a_rule(changes, words):
    claim = Claim(**{**dict(statement="s", source="s", arm="a", against="b", rule=Rule()), **changes})
    assert words in str(ConfigError(check(experiment(claims=[claim]))))


def test_every_mistake_of_every_arm_is_reported_at_once_and_each_once(place):
    arms = [Arm("a", {"model.heads": 3}), Arm("b", {"model.heads": 3, RATE: -1.0}), Arm("c", {"trian.steps": 2})]
    with pytest.raises(ConfigError) as error:
        plan(experiment(arms=arms))
    text = str(error.value)
    assert text.count("model.heads = 3") == 1 and "arm 'a', arm 'b'" in text
    assert "learning_rate = -1.0" in text and "trian" in text and text.startswith("3 problems")


def test_an_experiment_file_that_raises_is_one_sentence_with_the_line(place):
    (place / "bad.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ConfigError, match=r"bad.py:2 raised ZeroDivisionError"):
        read("bad.py")
    (place / "none.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="none.py: it defines no function get_experiment"):
        read("none.py")
    with pytest.raises(ConfigError, match="does not exist"):
        read("missing.py")
    with pytest.raises(ConfigError, match="give axes"):
        read("small.py")


def test_an_axis_that_would_split_the_arms_of_a_claim_is_refused(place):
    with pytest.raises(ConfigError, match="makes claims about its arms"):
        read("experiment.py", [("model.layers", "1,2")])


def test_two_hundred_runs_are_checked_without_jax(place):
    script = (
        "import sys\nfrom trainer.sweep.reading import read\nfrom trainer.sweep.plan import make_plan\n"
        "s = read('small.py', [('model.layers', '1,2'), ('seed', ','.join(map(str, range(100))))])\n"
        "assert len(make_plan(s, 'default').runs) == 200\nassert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_one_seed_for_all_is_refused(place):
    with pytest.raises(ConfigError, match="--sweep.seed"):
        plan(experiment(), changes=[("seed", "3")])


def test_a_sweep_is_a_group_of_the_wandb_mirror_and_keeps_the_identity_of_its_runs(place):
    one, two = (plan(experiment(), changes=changes).runs[0] for changes in ([], [("log.wandb", "offline")]))
    assert '"wandb_group": "x-smoke"' in two.config and one.id == two.id and '"wandb_group": null' in one.config


# ---- tuning


def tuned(**changes):
    space = axis(RATE, [1e-3, 1e-2, 1e-1])
    return experiment(arms=[Arm("a", tune=Tuning(space=space, seeds=[100, 101])), Arm("b", {RATE: 1e-4})], **changes)


def test_comparison_runs_of_a_tuned_arm_wait_for_its_tuning_runs(place):
    found = plan(tuned())
    assert [run.stage for run in found.runs] == ["tune"] * 6 + ["compare"] * 2 and found.later == 2
    half = plan(tuned(), score=lambda run: (run.seed == 100, 1.0))
    assert half.later == 2 and half.choices[0].chosen is None


def test_the_point_with_the_best_mean_is_taken_and_an_edge_is_said(place):
    losses = {"learning_rate=0.001": 2.0, "learning_rate=0.01": 1.0, "learning_rate=0.1": 3.0}
    found = plan(tuned(), score=lambda run: (True, losses[run.point] + run.seed / 1000))
    chosen = [run for run in found.runs if run.stage == "compare" and run.arm == "a"]
    assert found.later == 0 and len(chosen) == 2 and all('"learning_rate": 0.01' in run.config for run in chosen)
    assert not found.choices[0].at_edge
    assert plan(tuned(), score=lambda run: (True, -losses[run.point])).choices[0].at_edge


def test_a_point_that_diverged_on_one_seed_is_not_chosen(place):
    def score(run):
        return True, None if run.point.endswith("0.1") and run.seed == 101 else (0.0 if run.point.endswith("0.1") else 1.0)

    assert plan(tuned(), score=score).choices[0].chosen == "learning_rate=0.001"


def test_arms_that_tuning_made_equal_share_their_runs(place):
    arms = [Arm("a", tune=Tuning(space=axis(RATE, [1e-3, 1e-2]), seeds=[100])), Arm("b", {RATE: 1e-3})]
    found = plan(experiment(arms=arms), score=lambda run: (True, 0.0 if run.point.endswith("0.001") else 1.0))
    assert len(found.runs) == 6 and len(found.distinct) == 4 and "are the same runs" in found.notes[0]


def test_points_of_an_arm_are_arms_of_their_own():
    arms = expanded_arms(experiment(arms=[Arm("mix", space=axis("alpha", [0.25, 0.5]), control="c")]))
    assert [arm.name for arm in arms] == ["mix alpha=0.25", "mix alpha=0.5"] and arms[0].control == "c"


# ---- what differs by scale, and arms that start from others


def test_arguments_of_a_scale_are_under_those_of_a_measurement(place):
    (place / "measured.py").write_text("def f(run, *, size, count):\n    pass\n")
    arms = [Arm("m", {"size": 2}, measure="measured:f"), Arm("a", {RATE: 0.1})]
    sys.path.insert(0, str(place))
    try:
        found = plan(experiment(arms=arms, scales={"smoke": Scale(seeds=1, arguments={"size": 9, "count": 3})}))
    finally:
        sys.path.remove(str(place))
    assert json.loads(found.runs[0].config)["arguments"] == {"size": 2, "count": 3} and "count" not in found.runs[1].config


def test_a_change_of_configs_that_no_run_has_is_refused(place, monkeypatch):
    (place / "measured.py").write_text("def f(run, *, size):\n    pass\n")
    monkeypatch.syspath_prepend(place)
    arms = [Arm("m", {"size": 2}, measure="measured:f")]
    with pytest.raises(ConfigError, match=r"--config\.size changes the configs of runs that train, and all of these are meas"):
        plan(experiment(arms=arms), changes=[("size", "3")])
    assert len(plan(experiment(arms=[*arms, Arm("a")]), changes=[(RATE, "0.1")]).runs) == 4


@pytest.mark.parametrize("edit", ["raise SystemExit", "", None])
def test_a_config_that_is_edited_while_a_sweep_runs_changes_nothing_of_it(place, edit):
    source = Source(experiment(), Path("experiment.py"), "")
    before = make_plan(source, "smoke").runs
    config = place / "small.py"
    config.write_text(config.read_text().replace("width=8", "width=16") if edit is None else edit)
    assert make_plan(source, "smoke").runs == before
    if edit is None:
        assert plan(experiment()).runs != before


@pytest.mark.parametrize("name", ["get_experiment", "get_search"])
def test_a_file_that_is_not_utf_8_is_said_in_a_sentence(place, name):
    Path("latin.py").write_bytes(f"# caf\xe9\ndef {name}():\n    pass\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.py is not UTF-8: .* at byte 5"):
        (read if name == "get_experiment" else read_search)("latin.py")


def test_a_claim_may_be_of_one_scale_and_must_read_a_step_that_is_evaluated(place):
    def claim(**rest):
        return Claim(**{**dict(statement="s", source="s", arm="a", against="b", rule=Rule()), **rest})

    scales = {"smoke": Scale(seeds=1, changes={"evaluate.every": 2}), "laptop": Scale(seeds=1)}
    found = experiment(scales=scales, claims=[claim(scales=["smoke"]), claim(statement="t", metric=Metric(at=2))])
    assert [each.statement for each in plan(found, "smoke").claims] == ["s", "t"]
    assert [each.statement for each in plan(found, "laptop").claims] == ["t"]
    for metric, words in (
        (Metric(at=1), "reads step 1 of arm 'a', which is evaluated every 2 of its 3 steps"),
        (Metric(at=4, kind="steps_to", target="b"), "reads step 4 of arm 'b'"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan(experiment(scales=scales, claims=[claim(metric=metric)]), "smoke")
    assert "names the scale 'galaxy'" in str(ConfigError(check(experiment(claims=[claim(scales=["galaxy"])]))))


def test_a_part_is_run_without_the_later_ones(place):
    arms = [Arm("late", {RATE: 1e-4}, part=2), Arm("headline"), Arm("control", {RATE: 2e-2})]
    assert plan(experiment(arms=arms), part=1).only == ("headline", "control")
    assert plan(experiment(arms=arms), part=1, only=["headline", "late"]).only == ("headline",)


def test_an_arm_gets_the_directory_of_the_run_that_it_starts_from(place):
    arms = [Arm("student", {"train.teacher.run": RunOf("donor"), RATE: 1e-3}), Arm("donor")]
    found = plan(experiment(arms=arms), runs_at="elsewhere")
    for student, donor in zip(found.runs[::2], found.runs[1::2], strict=True):
        assert (student.arm, donor.arm) == ("student", "donor") and student.seed == donor.seed
        assert json.loads(student.config)["train"]["teacher"]["run"] == f"elsewhere/{donor.directory}"
        assert student.needs == (donor.directory,) and not donor.needs
        assert f"--config.train.teacher.run=elsewhere/{donor.directory}" in student.command
    assert {run.arm for run in plan(experiment(arms=arms), only=["student"]).runs} == {"student", "donor"}


TUNING = Tuning(space=axis(RATE, [1e-3, 1e-2]), seeds=[100])


def teacher(run):
    """The directory that a run learns from."""
    return Path(json.loads(run.config)["train"]["teacher"]["run"]).name


def test_an_arm_that_starts_from_a_tuned_one_waits_for_the_choice_and_gets_the_run_that_was_chosen(place):
    student, pupil = ({"train.teacher.run": RunOf(name), RATE: rate} for name, rate in (("donor", 0.5), ("student", 0.25)))
    found = experiment(arms=[Arm("pupil", pupil), Arm("student", student), Arm("donor", tune=TUNING)])
    before = plan(found)
    assert [(run.arm, run.stage) for run in before.runs] == [("donor", "tune")] * 2 and before.later == 6
    after = plan(found, score=lambda run: (True, 1.0 if run.point.endswith("0.001") else 0.5))
    of = {(run.arm, run.seed): run for run in after.runs if run.stage == "compare"}
    assert len(of) == 6 and after.later == 0 and '"learning_rate":0.01' in of["donor", 0].config.replace(" ", "")
    for seed in (0, 1):
        assert teacher(of["student", seed]) == of["donor", seed].directory
        assert teacher(of["pupil", seed]) == of["student", seed].directory


def test_arms_that_wait_for_a_choice_are_checked_and_costed_before_it(place):
    from trainer.sweep.cost import describe_cost
    from trainer.sweep.place import Place

    donor, student = Arm("donor", tune=TUNING, minutes={"smoke": 2.0}), {"train.teacher.run": RunOf("donor"), RATE: 0.5}
    found = plan(experiment(arms=[donor, Arm("student", student, minutes={"smoke": 0.25})]))
    assert {run.arm for run in found.waiting} == {"student"} and len(found.waiting) == 2
    cost = describe_cost(found, Place("nowhere", "x-smoke"), 1)[-1]
    assert "about 8.5 min in 1 slot (6 by what the file expects" in cost, cost  # two of tuning and two of the donor, two others
    twice = [donor, Arm("student", student), Arm("again", student)]
    with pytest.raises(ConfigError, match="arms 'student' and 'again'"):
        plan(experiment(arms=twice))
    unseen = Claim(statement="s", source="x", arm="student", against="donor", rule=Rule(), metric=Metric(at=999))
    with pytest.raises(ConfigError, match="reads step 999 of arm"):
        plan(experiment(arms=[donor, Arm("student", student)], claims=[unseen]))


def test_a_mistake_in_an_arm_that_others_start_from_is_said_once(place):
    for tune in (None, TUNING):
        arms = [Arm("student", {"train.teacher.run": RunOf("donor")}), Arm("donor", {"model.layerz": 1}, tune=tune)]
        with pytest.raises(ConfigError, match="unknown field; did you mean model.layers") as caught:
            plan(experiment(arms=arms))
        assert len(caught.value.problems) == 1 and "student" not in str(caught.value)


def test_a_tuned_arm_tries_its_points_on_the_chosen_tuning_run_of_the_arm_that_it_starts_from(place):
    arms = [Arm("student", {"train.teacher.run": RunOf("donor"), "model.layers": 1}, tune=TUNING), Arm("donor", tune=TUNING)]
    before = plan(experiment(arms=arms))
    assert {run.arm for run in before.runs} == {"donor"} and before.later == 2 + 2 + 2
    assert [choice.arm for choice in before.choices] == ["donor", "student"]
    half = plan(experiment(arms=arms), score=lambda run: (run.arm == "donor", 1.0 if run.point.endswith("0.001") else 0.5))
    tried = [run for run in half.runs if run.arm == "student"]
    best = next(run for run in half.runs if run.arm == "donor" and run.stage == "tune" and run.point.endswith("0.01"))
    assert [(run.stage, run.seed) for run in tried] == [("tune", 100)] * 2 and half.later == 2
    assert {teacher(run) for run in tried} == {best.directory} and all(run.needs == (best.directory,) for run in tried)
    whole = plan(experiment(arms=arms), score=lambda run: (True, 1.0 if run.point.endswith("0.001") else 0.5))
    of = {(run.arm, run.seed): run for run in whole.runs if run.stage == "compare"}
    assert whole.later == 0 and all(teacher(of["student", seed]) == of["donor", seed].directory for seed in (0, 1))


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ([Arm("a", {"init_from.run": RunOf("b")})], "starts from the run of 'b', and the arms are a"),
        ([Arm("a", {"init_from.run": RunOf("a")})], "which in the end waits for itself"),
        ([Arm("a", {"init_from.run": RunOf("b")}), Arm("b", {"init_from.run": RunOf("a")})], "waits for itself"),
        ([Arm("a", {"init_from.run": RunOf("b")}, tune=TUNING), Arm("b")], "'b', which is not tuned at the same seeds"),
        (
            [Arm("a", {"init_from.run": RunOf("b")}, tune=TUNING), Arm("b", tune=dataclasses.replace(TUNING, seeds=[101]))],
            "'b', which is not tuned at the same seeds and scales",
        ),
        (
            [
                Arm("a", {"init_from.run": RunOf("b")}, tune=TUNING),
                Arm("b", tune=dataclasses.replace(TUNING, scales=["smoke"])),
            ],
            "'b', which is not tuned at the same seeds and scales",
        ),
        ([Arm("a", {"init_from.run": RunOf("b")}), Arm("b", seeds=[7])], "which has other seeds"),
        ([Arm("a", {"init_from.run": RunOf("b")}), Arm("b", scales=["laptop"])], "which is not run at this scale"),
    ],
)
def test_an_arm_that_cannot_start_from_another_is_refused(place, arms, words):
    found = experiment(arms=arms, scales={"smoke": Scale(seeds=1), "laptop": Scale(seeds=1)})
    with pytest.raises(ConfigError, match=words):
        if problems := check(found):
            raise ConfigError(problems, "x")
        plan(found, "smoke")
