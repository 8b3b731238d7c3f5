"""Every benchmark runs at a tiny size and writes what it measured."""

import json
import subprocess
import sys

import pytest

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
