"""Every benchmark runs at a tiny size and writes what it measured."""

import importlib
import json
import math
import subprocess
import sys

import pytest

from benchmarks.fixed_loss import over, trailing
from benchmarks.measure import Timed
from benchmarks.workers import Worker, alternate

SMALLEST = {"width": 16, "layers": 2, "heads": 2, "length": 8, "batch": 2, "vocabulary": 11}
TINY = {
    "data.name": "bigram",
    "data.sequence_length": 16,
    "data.batch_size": 2,
    "model.width": 16,
    "model.layers": 2,
    "model.heads": 2,
}


def changes(without=None):
    """`TINY` as arguments."""
    return [word for path, value in TINY.items() if path != without for word in ("--set", f"{path}={value}")]


@pytest.fixture
def run(root, tmp_path):
    """A function that runs a benchmark and returns the JSON that it wrote."""

    def start(name, *arguments):
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(tmp_path), *arguments]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (written,) = tmp_path.glob("*.json")
        return json.loads(written.read_text())

    return start


@pytest.fixture
def run_here(monkeypatch, root, tmp_path):
    """As `run`, in this process, which has loaded everything already."""

    def start(name, *arguments):
        monkeypatch.chdir(root)
        importlib.import_module(f"benchmarks.{name}").main(["--out", str(tmp_path), *arguments])
        (written,) = tmp_path.glob("*.json")
        return json.loads(written.read_text())

    return start


def test_loop_overhead_compares_every_loop_segment_with_its_neighbours(run):
    found = run("loop_overhead", "--pairs", "3", "--segment", "4", *changes())
    assert found["loop_over_bare"]["count"] == 3 and found["loop_over_bare"]["median"] > 0
    assert {"waiting for the batch", "metrics row", "the rest"} <= found["host_milliseconds"].keys()


def test_compile_depth_reports_both_depths_and_their_ratio(run):
    found = run("compile_depth", "--depths", "2", "4", "--repeats", "1", *changes(without="model.layers"))
    assert found["depths"].keys() == {"2", "4"} and found["ratio"]["total"]["median"] > 0
    assert found["options"]["model"]["depth"]["unroll"] is False


def test_start_time_accounts_for_every_second(run):
    found = run("start_time", "--repeats", "1", *changes())
    warm = {part: value["median"] for part, value in found["warm"].items()}
    total = warm.pop("total")
    assert sum(warm.values()) == pytest.approx(total, rel=1e-6) and warm["imports"] > 0 and warm["step 1: run"] > 0


def test_gpu_mfu_shows_the_attention_and_the_parts_of_the_step(run):
    small = [*changes(), "--set", "train.precision=bfloat16"]
    found = run("gpu_mfu", "--config", "configs/tiny.py", "--repeats", "2", "--calls", "2", *small)
    assert found["attention"]["implementation"] in ("xla", "cudnn") and found["tokens_a_step"] == 32
    assert found["alone_milliseconds"].keys() == {"attention", "head and loss", "optimizer"}


def test_step_speed_compares_strata_with_the_plain_script_and_any_other_program(run, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import sys\n"
        'print(\'{"ready": "mine", "tokens": 16}\', flush=True)\n'
        "for line in sys.stdin:\n"
        '    print(\'{"seconds": %f, "cpu": 0.1, "loss": 1.0}\' % (0.25 * int(line)), flush=True)\n'
    )
    found = run(
        "step_speed", "--sizes", json.dumps(SMALLEST), "--rounds", "2", "--seconds", "0.02",
        "--external", f"mine={sys.executable} {mine}",
    )  # fmt: skip
    rows = {row["name"]: row for row in found["sizes"][0]["contestants"]}
    assert {"Strata", "plain JAX", "mine"} <= rows.keys()
    assert rows["mine"]["tokens_per_second"]["median"] == pytest.approx(64, rel=1e-4)
    assert rows["Strata"]["strata_speed_over_this"]["median"] == 1


def test_step_speed_leaves_forms_out_of_stratas_step(run):
    found = run(
        "step_speed", "--sizes", json.dumps(SMALLEST), "--rounds", "1", "--seconds", "0.02",
        "--ablate", "--only", "tune_cpu", "written_out",
    )  # fmt: skip
    names = [row["name"] for row in found["sizes"][0]["contestants"]]
    assert names == ["Strata", "without tune_cpu", "without written_out"]


def test_muon_update_compares_with_optax_on_the_same_matrices_and_tells_its_share_of_a_step(run_here, monkeypatch, capsys):
    from benchmarks import muon_update as module

    alternated = module.alternated

    def planted_step(runners, *how):
        if "step" not in runners:
            return alternated(runners, *how)
        return {name: [Timed(seconds, 0.0, seconds)] for name, seconds in (("step", 0.4), ("update", 0.1))}

    monkeypatch.setattr(module, "alternated", planted_step)
    found = run_here("muon_update", "--shapes", "2x4x8", "--pairs", "2", "--seconds", "0.01", *changes())
    (ratios,) = found["sets"].values()
    assert ratios["Strata"]["over_optax"]["count"] == 2 and ratios["optax"]["over_optax"]["median"] == 1
    assert found["step"]["share"]["median"] == 0.25 and found["step"]["tokens"] == 32
    out = capsys.readouterr().out
    assert found["dtype"] == {"optax": "float32", "Strata": "float32"} and "optax float32, Strata float32" in out
    assert "Strata / optax" in out and "share of step time: the update 100.00 ms of 400.00 ms, 0.250" in out


@pytest.fixture
def planted(monkeypatch):
    """`planted(module, seconds)`: a call that returns a name takes the seconds given for it."""

    def plant(module, seconds):
        monkeypatch.setattr(module, "timed", lambda call, count: Timed(seconds[call()], 0.0, 2 * seconds[call()]))

    return plant


def test_layerwise_cost_weighs_measuring_steps_by_how_often_they_occur(run_here, planted, monkeypatch, capsys):
    from benchmarks import layerwise_cost as module

    def stepper(changes):
        name = dict(changes).get("optimizer.layerwise.name", "plain")
        interval = {"plain": 1, "llr": 100, "lanton": 10}[name]
        return lambda number: f"{name}{' due' if number % interval == 0 and interval > 1 else ''}", interval, None

    monkeypatch.setattr(module, "stepper", stepper)
    planted(module, {"plain": 1.0, "llr": 1.0, "llr due": 3.0, "lanton": 1.01, "lanton due": 1.31})
    found = run_here("layerwise_cost", "--pairs", "2")
    assert found["cost"]["llr"]["time"]["median"] == pytest.approx(0.02)
    assert found["cost"]["lanton"]["cpu"]["median"] == pytest.approx(0.04)
    assert "llr: every 100 steps it adds 2.0% of step time" in capsys.readouterr().out


def test_newton_schulz_steps_extrapolates_the_laws_and_weighs_work_at_one_loss(run_here, monkeypatch, capsys):
    from benchmarks import newton_schulz_steps as module

    def race(entries, *, seed, **how):
        assert "optimizer.direction.newton_schulz.accept" not in dict(entries["five"]) and how["steps"] == 80
        measured = dict(entries["measured"])
        assert measured["optimizer.direction.newton_schulz.accept"] == "0.5"
        assert measured["optimizer.direction.newton_schulz.choose_at"] == "8"
        taken = {"five": 40, "predicted": 50, "measured": 20}
        each = {name: {"steps": n, "seconds": n / 10, "cpu_seconds": n / 5, "final": 2.0} for name, n in taken.items()}
        return {"seed": seed, "loss": 2.5, "entries": each}, {name: name for name in entries}

    monkeypatch.setattr(module, "race", race)
    last = {"five": 100.0, "predicted": 60.0, "measured": 30.0}
    choose_at = {"measured": 8}  # a tenth of the steps
    monkeypatch.setattr(module, "work", lambda name: module.Work(200.0, last[name], choose_at.get(name, 1), {3: 7}))
    accept = ["--set", "optimizer.direction.newton_schulz.accept=0.5"]
    found = run_here("newton_schulz_steps", "--pairs", "0", "--steps", "80", "--seeds", "2", *accept)
    sizes = {row["size"]: row for row in found["table"]}
    assert {1e9, 300e9} <= sizes.keys() and sizes[300e9]["over_most"] < 1
    ratios = found["training"]["ratios"]["predicted"]
    assert ratios["flops"]["median"] == 0.6 and ratios["flops_to_loss"]["median"] == pytest.approx(0.75)
    assert ratios["seconds"]["median"] == 1.25 and ratios["seconds"]["count"] == 2
    measured = found["training"]["ratios"]["measured"]
    assert measured["flops"]["median"] == pytest.approx(0.3)
    assert measured["flops_to_loss"]["median"] == pytest.approx((7 * 200 + 13 * 30) / (40 * 100))
    assert "to the training loss of 2.5000, 2.5000" in capsys.readouterr().out


def test_drop_muon_weighs_cuts_by_their_probability_and_tells_the_time_to_one_loss(run_here, planted, monkeypatch, capsys):
    from benchmarks import drop_muon as module

    def race(entries, **how):
        assert dict(entries["Drop-Muon"])["optimizer.sampling.name"] == "drop_muon"
        assert not [path for path, _ in entries["Muon"] if "sampling" in path]
        each = {
            name: {"steps": n, "seconds": s, "cpu_seconds": s} for name, n, s in (("Muon", 50, 9.0), ("Drop-Muon", 60, 6.0))
        }
        return {"loss": 3.0, "entries": each}, {}

    facts = {"layers": 2, "cuts": [0, 1], "probabilities": [0.25, 0.75], "ceiling": 4 / 3, "ceiling_beside_head": 1.3}
    facts |= {"uniform_ceilings": {1: 1.0, 2: 4 / 3}, "flops_share": {"head": 0.1, "embedding": 0.0}}
    names = ("Muon", "cut 0", "cut 1")
    monkeypatch.setattr(module, "steppers", lambda changes: ({name: lambda name=name: name for name in names}, facts))
    monkeypatch.setattr(module, "race", race)
    planted(module, {"Muon": 1.2, "cut 0": 1.3, "cut 1": 0.9})
    found = run_here("drop_muon", "--pairs", "2", "--set", "optimizer.sampling.buckets=2")
    assert found["ratio"]["median"] == pytest.approx(1.2 / (0.25 * 1.3 + 0.75 * 0.9)) == found["cpu_ratio"]["median"]
    out = capsys.readouterr().out
    assert "90.0% of the ceiling of 1.333 for 2 buckets" in out
    assert "Drop-Muon takes 0.667" in out and "1.200 [1.200, 1.200] of its steps" in out


COMMANDS = {
    "muon_update": ["--shapes", "2x4x8", "--pairs", "2", "--seconds", "0.01"],
    "layerwise_cost": ["--pairs", "2", "--count", "1", "--set", "model.width=64"],  # llr: 50 singular values
    "newton_schulz_steps": ["--pairs", "2", "--count", "1", "--width", "8", "--layers", "2", "--steps", "4", "--segment", "2"],
    "drop_muon": ["--pairs", "2", "--count", "1", "--steps", "6", "--segment", "3", "--set", "optimizer.sampling.buckets=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_benchmarks_of_the_optimizer_run_as_they_are(run_here, name):
    found = run_here(name, *changes(), *COMMANDS[name])
    if name == "muon_update":
        assert 0 < found["step"]["share"]["median"]
    if name == "newton_schulz_steps":
        (one,) = found["training"]["races"]
        assert one["entries"].keys() == {"five", "predicted", "measured"} and one["entries"]["five"]["matrices"] == {"5": 14}
        assert found["training"]["ratios"]["predicted"]["flops"]["median"] < 1
    if name == "drop_muon":
        (one,) = found["races"]
        assert one["loss"] > 0 and all(own["seconds"] > 0 and own["steps"] <= 6 for own in one["entries"].values())
        assert (
            found["model"]["uniform_ceilings"] == {"1": 1.0, "2": pytest.approx(4 / 3)}
            and 0 < found["model"]["flops_share"]["head"] < 1
        )


def test_a_race_is_told_at_the_lowest_loss_that_all_reach():
    assert trailing([4.0, 2.0, 0.0, 6.0], 2) == [math.inf, 3.0, 1.0, 3.0]
    races = [
        {"entries": {"a": {"seconds": 3.0}, "b": {"seconds": 2.0}}},
        {"entries": {"a": {"seconds": 1.0}, "b": {"seconds": 2.0}}},
    ]
    assert over(races, "a", "b", "seconds")["median"] == 1.0


def test_a_worker_that_dies_is_an_error_with_its_last_words():
    command = [sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(7)"]
    with pytest.raises(RuntimeError, match="worker broken ended with code 7:\nno such thing"):
        Worker("broken", command)


def test_every_other_round_is_in_reversed_order():
    order = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def segment(self, steps):
            order.append((self.name, steps))
            return type("Segment", (), {"seconds": {"a": 0.1, "b": 0.3}[self.name]})

    found = alternate([Recorder("a"), Recorder("b")], rounds=3, seconds=0.6)
    assert order == [("a", 2), ("b", 2), ("a", 6), ("b", 2), ("b", 2), ("a", 6), ("a", 6), ("b", 2)]
    assert {name: len(segments) for name, segments in found.items()} == {"a": 3, "b": 3}
