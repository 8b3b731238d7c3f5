"""The benchmark of linear attention: its floors are those of the reference's model, and it runs on a CPU."""

from __future__ import annotations

import json

import pytest

from benchmarks import linear_attention


@pytest.mark.parametrize(
    "op,forward,backward",
    [
        ("simple_gla", (0.54, 0.052), (0.94, 0.120)),
        ("gla", (0.81, 0.052), (1.48, 0.120)),
        ("kda", (0.81, 0.094), (1.48, 0.241)),
    ],
)
def test_floors_are_gigabytes_and_teraflops_of_the_published_model(op, forward, backward):
    shape = linear_attention.GPU_SHAPES[0]
    one = linear_attention.floors(op, shape, "bfloat16", "forward")
    both = linear_attention.floors(op, shape, "bfloat16", "forward+backward")
    for found, expected in ((one, forward), ([y - x for x, y in zip(one, both, strict=True)], backward)):
        assert found[0] / 1e9 == pytest.approx(expected[0], rel=0.02) and found[1] / 1e12 == pytest.approx(
            expected[1], rel=0.02
        )


def test_a_small_run_on_a_cpu_times_what_serves_there(tmp_path):
    size = ["--batch", "1", "--length", "8", "--heads", "1", "--size", "4", "--rounds", "1", "--seconds", "0.01"]
    linear_attention.main(["--ops", "linear_attention", "--dtype", "bfloat16", "--out", str(tmp_path), *size])
    (path,) = tmp_path.glob("linear_attention-jax-*.json")
    (result,) = json.loads(path.read_text())["ops"]
    assert list(result["forward"]) == ["xla", "recurrence"] and result["shape"] == [1, 8, 1, 4]
    assert result["forward+backward"]["xla"]["program_bytes"] > 0 and set(result["by_length"]) == {"T = 8", "T = 32"}


def test_times_stand_over_those_of_peers_as_well():
    runs = {name: (lambda x: x, ()) for name in ("xla", "mosaic_gpu", "fla")}
    rows = linear_attention.race(runs, rounds=2, seconds=0.001, patience=0.0)
    assert rows["fla"]["time_over_fla"]["median"] == 1 and rows["mosaic_gpu"]["time_over_fla"]["count"] == 2
    assert "time_over_jla" not in rows["xla"]
