"""Medians, their intervals, and what counts as a quiet moment."""

import json
import random
import re

import pytest

from benchmarks import measure


def test_the_interval_holds_the_true_median_in_19_of_20_samples():
    drawn = random.Random(0)
    for count in (6, 7, 12, 25, 40):
        held = 0
        for _ in range(2000):
            low, high = measure.spread([drawn.expovariate(1.0) for _ in range(count)])["interval95"]
            held += low <= 0.693147 <= high
        assert held / 2000 >= 0.94


def test_the_interval_leaves_out_the_extremes_of_a_large_sample():
    low, high = measure.spread(list(range(101)))["interval95"]
    assert 35 <= low < 50 < high <= 65


def test_a_handful_of_values_gets_its_whole_range_as_interval():
    assert measure.spread([3.0, 1.0, 2.0])["interval95"] == [1.0, 3.0]
    assert measure.spread([2.0]) == {"median": 2.0, "quartiles": [2.0, 2.0], "interval95": [2.0, 2.0], "count": 1}
    with pytest.raises(ValueError, match="no values"):
        measure.spread([])


def test_disturbed_and_unrecorded_segments_are_not_quiet():
    assert measure.quiet_only([1.0, 2.0, 3.0], [0.0, 0.5, None]) == [1.0]


def test_the_result_names_the_machine_the_date_and_the_versions(tmp_path, capsys):
    path = measure.write_result("thing", {"value": 1}, tmp_path)
    found = json.loads(path.read_text())
    assert re.fullmatch(r"thing-[a-z0-9-]+\.json", path.name) and str(path) in capsys.readouterr().out
    assert found["benchmark"] == "thing" and found["value"] == 1
    assert {"device", "cpus", "packages", "date", "source", "load_average"} <= found["machine"].keys()
    assert found["machine"]["packages"]["jax"]
