"""The ledger: only ever appended to, read back whole, and the same for every way to the same end."""

import json
import multiprocessing

import pytest

from strata import StrataError
from trainer.sweep.ledger import Ledger, by_run, unfinished


def write(directory, count, name):
    ledger = Ledger(directory)
    for index in range(count):
        ledger.append("start", run=f"{name}-{index}")


def test_rows_are_appended_and_read_back(tmp_path):
    ledger = Ledger(tmp_path / "new" / "place")
    assert ledger.rows() == []
    ledger.append("start", run="a")
    before = ledger.path.read_bytes()
    ledger.append("end", run="a", outcome="finished", step=3)
    assert ledger.path.read_bytes().startswith(before) and [row["event"] for row in ledger.rows()] == ["start", "end"]


def test_a_line_that_a_crash_cut_short_is_dropped_and_the_rest_stays(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("start", run="a")
    with open(ledger.path, "ab") as file:
        file.write(b'{"event": "end", "ti')
    assert len(ledger.rows()) == 1
    ledger.append("start", run="b")
    assert [row["run"] for row in ledger.rows()] == ["a", "b"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.path.write_text(f"{json.dumps(dict(event='start', time=0, run='a'))}\nrubbish\n" + "{}\n")
    with pytest.raises(StrataError, match="line 2 of"):
        ledger.rows()


@pytest.mark.parametrize(
    "row", [[], {"event": "start"}, {"event": "end", "run": "a"}, {"event": "plan", "rules": 3}, {"event": [], "run": "a"}]
)
def test_json_that_is_no_row_is_named_too(tmp_path, row):
    ledger = Ledger(tmp_path)
    ledger.append("start", run="a")
    with open(ledger.path, "a") as file:
        file.write(json.dumps(row if isinstance(row, list) else {"time": 0.5, **row}) + "\n")
    with pytest.raises(StrataError, match="line 2 of"):
        ledger.rows()


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=write, args=(tmp_path, 30, name)) for name in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert {row["run"] for row in Ledger(tmp_path).rows()} == {f"{name}-{index}" for name in "ab" for index in range(30)}


def test_the_content_by_run_does_not_depend_on_when_and_how_often(tmp_path):
    direct, winding = Ledger(tmp_path / "one"), Ledger(tmp_path / "two")
    end = dict(run="a", arm="x", seed=0, stage="compare", step=9)
    direct.append("start", run="a")
    direct.append("end", outcome="finished", exit=0, **end)
    winding.append("start", run="a")
    assert list(unfinished(winding.rows())) == ["a"]
    winding.append("end", outcome="lost", exit=None, **(end | {"step": 2}))
    winding.append("start", run="a")
    winding.append("end", outcome="finished", exit=0, **end)
    assert by_run(direct.rows()) == by_run(winding.rows()) and not unfinished(winding.rows())
