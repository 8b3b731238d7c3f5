"""The experiments of the repository: every scale is valid, claims are whole, and the small ones run through to a report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.report.cli import main as report
from trainer.sweep.cost import describe_work
from trainer.sweep.measurement import measure
from trainer.sweep.needs import needed
from trainer.sweep.place import Place
from trainer.sweep.plan import arms_at, make_plan
from trainer.sweep.reading import read
from trainer.sweep.space import read_seeds

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "experiments").glob("*.py")) if "def get_experiment" in path.read_text()}
QUICK = ("triangular_inverse", "wsd_s")
"""Measurements of milliseconds."""


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Configs are named from the root of the repository."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", FILES)
def test_every_scale_of_every_experiment_is_valid_and_its_claims_are_tested(name):
    source = read(str(FILES[name]))
    experiment = source.experiment
    assert experiment.name == name and experiment.question.endswith("?")
    if name not in ("muon_recall", "recipes"):  # the worked example, and a question of no paper
        assert {"smoke", "laptop", "gpu", "paper"} <= set(experiment.scales)
    tested = set()
    for scale in experiment.scales:
        plan = make_plan(source, scale)
        here = {arm.name for arm in plan.arms}
        assert plan.claims and all({claim.arm, claim.against} <= here for claim in plan.claims), scale
        assert any(arm.part == 1 for arm in plan.arms) or scale in ("gpu", "paper"), scale
        tested |= {claim.statement for claim in plan.claims}
    assert tested == {claim.statement for claim in experiment.claims}
    assert experiment.scales["smoke"].seeds != 1 and not any(arm.tune and arm.tune.at("smoke") for arm in plan.arms)


def minutes(plan):
    """Of all runs that are not there yet, by what the file expects, comparison runs of tuned arms included."""
    expected = {arm.name: arm.minutes.get(plan.scale_name, plan.scale.minutes) for arm in plan.arms}
    seeds = len(read_seeds(plan.scale.seeds))
    runs = sum(expected[run.arm] for run in plan.distinct) + sum(seeds * expected[choice.arm] for choice in plan.choices)
    return runs / plan.scale.slots


@pytest.mark.parametrize("name", FILES)
def test_a_headline_takes_three_quarters_of_an_hour_on_a_laptop_and_eight_minutes_on_a_gpu(name):
    experiment = read(str(FILES[name])).experiment
    for scale, limit in (("laptop", 45), ("gpu", 8)):
        headline = [arm.part for arm in arms_at(experiment, scale) if arm.part == 1]
        if scale in experiment.scales:
            plan = make_plan(read(str(FILES[name])), scale, part=1 if headline else None)
            assert minutes(plan) <= limit, f"{scale}: {minutes(plan):.1f}"
            trained = {run.arm for run in plan.runs if run.kind == "train"}
            donors = {name for arm in plan.arms for name in needed(arm) if name in trained}
            assert len(trained - donors) <= (3 if headline else 5), scale


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if '"paper": Scale(' in path.read_text()])
def test_the_papers_own_scale_is_costed(name):
    plan = make_plan(read(str(FILES[name])), "paper")
    lines = describe_work(plan)
    if any(run.kind == "train" for run in plan.runs):
        assert "hours of one NVIDIA H100" in lines[-1] and not any("unknown" in line for line in lines), lines
        assert float(lines[-1].split("runs: ")[1].split(" FLOP")[0]) > 1e17


def test_a_claim_about_relaxation_compares_arms_that_differ_in_that_alone():
    """Depth, start or teacher: one of them between two looped arms. Models from scratch differ by their nature."""
    from trainer.sweep.changes import flat

    plan = make_plan(read(str(FILES["relaxed_recursive"])), "laptop")
    configs = {run.arm: flat(json.loads(run.config)) for run in plan.runs}
    assert sum(arm.part == 1 for arm in plan.arms) == 4  # the donor and three arms
    alone = {
        "recursive, own norms": {"model.depth.rank"},
        "recursive, average": {"model.depth.share_norms"},
    }
    steps = [("relaxed", "recursive, own norms"), ("recursive, own norms", "recursive, average")]
    for claim in plan.claims:
        if (claim.arm, claim.against) in steps:
            one, two = configs[claim.arm], configs[claim.against]
            assert {k for k in one.keys() | two.keys() if one.get(k) != two.get(k)} - {"seed"} == alone[claim.against]
            steps.remove((claim.arm, claim.against))
    assert not steps and not any({claim.arm, claim.against} == {"relaxed", "recursive"} for claim in plan.claims)


def test_what_a_paper_says_costs_nothing_is_claimed_as_the_paper_does():
    for name, arm, against in (
        ("muon_spectra", "layer-aware steps", "five steps"),
        ("noise_adaptive_lr", "lanton", "d-muon"),
        ("relaxed_recursive", "relaxed", "full size, trained on"),
    ):
        claims = read(str(FILES[name])).experiment.claims
        assert any((c.arm, c.against) == (arm, against) and c.rule.at_most_worse for c in claims), name
        assert not any((c.arm, c.against) == (against, arm) for c in claims), name


def test_validating_an_experiment_loads_no_jax():
    script = (
        "import sys\nfrom trainer.sweep.reading import read\nfrom trainer.sweep.plan import make_plan\n"
        "source = read('experiments/snlp.py')\nmake_plan(source, 'paper')\nassert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", QUICK)
def test_the_smoke_scale_runs_through_to_a_report(name, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="a report draws with Matplotlib")
    plan = make_plan(read(str(FILES[name])), "smoke", runs_at=tmp_path)
    place = Place(tmp_path, plan.name)
    for run in plan.distinct:  # what the launcher starts as processes
        measure(json.loads(run.config), place.directory(run))
    place.write_plan(plan)
    assert report([str(place.path)]) == 0
    out = capsys.readouterr().out
    assert f"{len(plan.runs)} of {len(plan.runs)} runs finished" in out and "no verdict" not in out
    found = json.loads((place.path / "report" / "report.json").read_text())
    assert found["finished"] and len(found["claims"]) == len(plan.claims)
    assert all(claim["pairs"] == 3 and claim["failed"] == 0 for claim in found["claims"])
    if name == "triangular_inverse":
        ladder, neumann = (next(arm for arm in found["arms"] if arm["name"] == other) for other in ("ladder", "neumann"))
        assert ladder["summaries"][0]["mean"] > 2 > 1 > neumann["summaries"][0]["mean"]  # digits at a cosine of 0.8
    else:
        updates = {arm["name"]: arm["summaries"][4]["mean"] for arm in found["arms"]}
        assert updates["WSD-S"] == updates["WSD, equal compute"] == 80 and updates["WSD"] == 80 + 2 + 4
        assert updates["cosine, each budget"] == 20 + 40 + 80


def test_a_wsd_s_checkpoint_at_the_first_budget_is_that_of_wsd(tmp_path):
    plan = make_plan(read(str(FILES["wsd_s"])), "smoke")
    found = {}
    for run in [run for run in plan.runs if run.seed == 0 and run.arm in ("WSD-S", "WSD")]:
        measure(json.loads(run.config), tmp_path / run.arm)
        rows = [json.loads(line) for line in (tmp_path / run.arm / "metrics.jsonl").read_text().splitlines()]
        found[run.arm] = [row["loss"] for row in rows if row["split"] == "val"]
    assert found["WSD"][0] == found["WSD-S"][0] and found["WSD"][1] != found["WSD-S"][1]


def measured(function, arguments, directory):
    """The rows of a measurement, by step."""
    measure({"measurement": f"experiments.{function}", "arguments": arguments, "seed": 0}, directory)
    return {row["step"]: row for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())}


def test_the_image_network_learns_with_and_without_dropped_layers(tmp_path):
    pytest.importorskip("sklearn", reason="the image network needs scikit-learn")
    arms = {arm.name: arm for arm in read(str(FILES["drop_muon"])).experiment.arms if arm.name.startswith("images: ")}
    small = {"channels": [4, 8, 8], "batch": 64, "every": 6, "steps": 18}
    for name in ("images: muon, low rate", "images: drop, uniform, low rate"):
        directory = tmp_path / name.partition(" ")[2]
        measured("drop_muon:digits", small | dict(arms[name].changes), directory)
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [(row["step"], row["split"]) for row in rows] == [
            (step, split) for step in (6, 12, 18) for split in ("train", "val")
        ]
        train = [row for row in rows if row["split"] == "train"]
        assert all(row["timing"]["step_seconds"] > 0 for row in train) and train[0]["loss"] > train[-1]["loss"]
        assert rows[-1]["accuracy"] > 0.3, "three times what guessing gives"


@pytest.fixture(scope="module")
def spectra(tmp_path_factory):
    """Spectra of four sizes that follow the paper's exponents in the median, and the width alone in the other quantiles."""
    from optim.directions.spectral_laws import MEDIAN_LAWS

    root, found = tmp_path_factory.mktemp("spectra"), {}
    for number, (width, size) in enumerate([(64, 3e5), (32, 8e4), (128, 1.1e6), (256, 4e6)]):
        (root / str(number)).mkdir()
        found[f"spectra_{number}"] = str(root / str(number))
        with (root / str(number) / "metrics.jsonl").open("w") as file:
            for q in (10, 50, 90):
                s = {}
                for (kind, depth), law in MEDIAN_LAWS.items():
                    s.setdefault(kind, {})[depth] = law.at(size) if q == 50 else width**-0.5
                row = {"step": q, "split": "val", "s": s, "parameters": int(size), "width": width}
                file.write(json.dumps(row) + "\n")
    return found


def test_exponents_of_planted_spectra_are_found_beside_those_of_the_width(spectra, tmp_path):
    middle = measured("muon_spectra:exponents", spectra | {"last": False}, tmp_path / "middle")
    last = measured("muon_spectra:exponents", spectra | {"last": True}, tmp_path / "last")
    assert middle[50]["by"]["value"]["mid"] == pytest.approx(0.25) and middle[50]["by"]["query"]["mid_late"] == pytest.approx(
        0.27
    )
    assert last[50]["by"]["down"]["final"] == pytest.approx(0.96) and last[50]["alpha"] > middle[50]["alpha"] + 0.3
    assert set(last[50]["by"]["key"]) == {"final"} and "final" not in middle[50]["by"]["key"]
    assert middle[50]["r_squared"] == pytest.approx(1) and middle[90]["alpha"] == pytest.approx(middle[90]["flat"])


def test_the_largest_size_is_predicted_by_what_was_planted(spectra, tmp_path):
    found = {by: measured("muon_spectra:next_size", spectra | {"by": by}, tmp_path / by) for by in ("laws", "paper", "width")}
    assert found["laws"][50]["error"] < 1e-9 and found["paper"][50]["error"] < 1e-9 < found["width"][50]["error"]
    assert found["width"][90]["error"] < 1e-9 < found["paper"][90]["error"]
    assert found["width"][50]["bias"] > 0  # the last layer falls faster than the width says


def test_exchanged_steps_are_about_the_same_work():
    """And the laws of the laptop give what the file's docstring says of their steps."""
    from experiments.muon_spectra import BY_LAYER, predicted
    from optim.directions.layer_aware import predicted_choices
    from optim.directions.newton_schulz import flops
    from optim.options import Predicted
    from optim.roles import Parameter

    square, wide = (4, 128, 128), {"ffn.up": (4, 128, 512), "ffn.down": (4, 512, 128)}
    shapes = {f"mixer.{name}": square for name in ("query", "key", "value", "out")} | wide
    layers = {"positions": (0, 1, 2, 3)}
    declared = {
        f"blocks.block0.{site}.kernel": Parameter(f"blocks.block0.{site}.kernel", shape, float, "matrix", (), **layers)
        for site, shape in shapes.items()
    }

    def steps(q, exchange=False):
        given = {key: tuple(value) for key, value in predicted(q, exchange)[BY_LAYER].items() if key != "name"}
        choices = predicted_choices(Predicted(model_size=853_632, **given), declared)
        return [(path, 2 + index) for path, own in choices.items() for index in own]

    def work(found):
        return sum(flops(*declared[path].shape[1:], count) for path, count in found)

    assert sorted(count for _, count in steps(0.5)) == [3] * 22 + [4] * 2
    assert {count for _, count in steps(0.75)} == {3, 4, 5}
    assert steps(0.75) != steps(0.75, exchange=True) and 1.05 < work(steps(0.75, exchange=True)) / work(steps(0.75)) < 1.06


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name not in (*QUICK, "muon_recall")])
def test_the_headline_of_every_other_smoke_scale_runs_as_a_sweep(name, tmp_path):
    if name == "drop_muon":
        pytest.importorskip("sklearn", reason="the image network needs scikit-learn")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    file, runs = str(FILES[name]), f"--runs={tmp_path}"
    for module, words in (("trainer.sweep", ["--part=1"] if name != "drop_muon" else []), ("trainer.report", [])):
        command = [sys.executable, "-m", module, file, "--scale=smoke", runs, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3000)
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(Path(tmp_path, "sweeps").glob("*/report/report.json")).read_text())
    ended = {run["state"] for run in found["runs"] if run["state"] != "missing"}
    assert ended == {"finished"}
