"""The local launcher, with runs that are acted (`actor.py`): order, slots, retries, stopping, and starting again."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from strata import ConfigError
from tests.sweep.conftest import RATE, Sweep
from trainer.metrics import read_metrics
from trainer.sweep import Arm, Claim, Experiment, Rule, RunOf, Tuning, axis
from trainer.sweep.display import Display, status_lines
from trainer.sweep.launcher import Launcher
from trainer.sweep.ledger import by_run
from trainer.sweep.outcome import outcome
from trainer.sweep.place import Place
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import Source
from trainer.sweep.slots import Slot, make_slots


@pytest.fixture
def sweep(acted):
    return Sweep()


@contextlib.contextmanager
def soon(action, when):
    """Does something from another thread as soon as a condition holds."""

    def wait():
        deadline = time.monotonic() + 20
        while not when() and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def test_every_run_is_started_once_and_starting_again_runs_nothing(sweep):
    assert sweep.launch() == 0
    assert sweep.starts() == [("low", 0), ("high", 0), ("low", 1), ("high", 1)]
    assert {outcome for _, _, outcome in sweep.ends()} == {"finished"}
    before = sweep.place.ledger.path.read_bytes()
    assert sweep.launch() == 0
    new = sweep.place.ledger.path.read_bytes().removeprefix(before).splitlines()
    assert [json.loads(line)["event"] for line in new] == ["plan"]


def test_a_run_that_was_finished_without_the_sweep_is_not_run_again_and_is_in_the_ledger(sweep):
    assert sweep.launch() == 0
    content = by_run(sweep.place.ledger.rows())
    sweep.place.ledger.path.unlink()
    assert sweep.launch() == 0 and sweep.starts() == [] and by_run(sweep.place.ledger.rows()) == content


def test_a_crash_is_tried_again_from_where_it_was(sweep):
    sweep.script("low", 0, "crash finish")
    assert sweep.launch() == 0
    assert sweep.ends()[:2] == [("low", 0, "failed"), ("low", 0, "finished")]
    rows = [row for row in sweep.place.ledger.rows() if row["event"] == "end"]
    assert rows[0]["again"] and rows[0]["message"] == "it broke" and rows[0]["step"] == 4


def test_a_run_that_gets_no_further_is_tried_a_bounded_number_of_times_and_counts_as_failed(sweep):
    run = sweep.script("low", 0, "data")
    assert sweep.launch(retries=2) == 1  # damaged data: a second try cannot help
    assert sweep.starts().count(("low", 0)) == 1 and sweep.ends()[0] == ("low", 0, "failed")
    found = sweep.place.outcome(run)
    assert found.state == "failed" and found.message == "the data is damaged"
    assert "1 failed, 3 finished" in status_lines(sweep.place, sweep.plan())[-1]
    (sweep.place.runs / f"{run.directory}.script").unlink()
    assert sweep.launch() == 0 and sweep.place.outcome(run).state == "finished"


def test_retries_end(sweep):
    sweep.script("low", 0, "crash crash crash crash crash crash crash crash crash")
    # 8 steps: attempts reach 4, 6, 7, 8, and from then on get no further.
    assert sweep.launch(retries=1) == 1
    assert sweep.starts().count(("low", 0)) == 6


def test_a_run_that_is_killed_is_named_and_goes_on(sweep):
    sweep.script("high", 1, "die finish")
    assert sweep.launch() == 0
    first = next(
        row for row in sweep.place.ledger.rows() if row["event"] == "end" and row["arm"] == "high" and row["seed"] == 1
    )
    assert first["message"] == "killed by SIGKILL" and first["exit"] == -9 and sweep.ends()[-1] == ("high", 1, "finished")


def test_a_diverged_run_is_an_outcome_and_is_not_run_again(sweep):
    run = sweep.script("high", 0, "diverge")
    assert sweep.launch() == 0 and ("high", 0, "diverged") in sweep.ends()
    assert sweep.launch() == 0 and sweep.starts().count(("high", 0)) == 1
    assert sweep.place.outcome(run).state == "diverged"


def test_a_run_past_its_time_is_told_to_save_and_goes_on(sweep):
    sweep.script("low", 0, "hang finish")
    assert sweep.launch(timeout=1.0) == 0
    first = next(row for row in sweep.place.ledger.rows() if row["event"] == "end")
    assert first["message"] == "ran out of time" and first["exit"] == 75 and sweep.ends()[1] == ("low", 0, "finished")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_runs_save_and_the_same_command_goes_on(sweep, number):
    run = sweep.script("low", 0, "hang finish")
    with soon(lambda: os.kill(os.getpid(), number), lambda: len(_lines(sweep)) == 1):
        assert sweep.launch() == 75
    assert sweep.place.outcome(run).state == "preempted" and len(sweep.starts()) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sweep.launch() == 0 and {outcome for _, _, outcome in sweep.ends()[1:]} == {"finished"}


def test_a_second_signal_kills_a_run_that_does_not_listen(sweep):
    run = sweep.script("low", 0, "deaf finish")

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    with soon(twice, lambda: len(_lines(sweep)) == 1):
        assert sweep.launch() == 75
    end = [row for row in sweep.place.ledger.rows() if row["event"] == "end"]
    assert [row["exit"] for row in end] == [-signal.SIGKILL] and sweep.place.outcome(run).state != "running"
    assert sweep.launch() == 0


def test_one_that_does_not_listen_is_killed_after_a_while(sweep, monkeypatch):
    monkeypatch.setattr("trainer.sweep.launcher.GRACE", 0.3)
    sweep.script("low", 0, "deaf")
    assert sweep.launch(stop_after=1.5) == 75
    assert next(row for row in sweep.place.ledger.rows() if row["event"] == "end")["exit"] == -signal.SIGKILL


def test_status_tells_how_far_a_run_is_its_loss_and_what_is_left(sweep):
    run = sweep.script("low", 0, "hang finish")
    shown = []

    def look():
        shown.extend(status_lines(sweep.place, sweep.plan()))
        os.kill(os.getpid(), signal.SIGINT)

    with soon(look, lambda: len(_lines(sweep)) == 1):
        sweep.launch()
    words = next(line for line in shown if line.startswith("running"))
    assert run.title in words and "step 4/8 (50%)" in words and "0.2500" in words and "0 s left" in words


def test_stop_after_ends_it_in_the_same_way(sweep):
    sweep.script("low", 0, "hang finish")
    assert sweep.launch(stop_after=1.5) == 75 and sweep.ends() == [("low", 0, "preempted")]


def test_a_part_of_the_arms_is_started_and_the_plan_stays_whole(sweep):
    source = Source(sweep.experiment, Path("experiment.py"), "")
    launcher = Launcher(sweep.place, [Slot(0)], Display(sweep.place, sweep.output))
    assert launcher.run(make_plan(source, "smoke", only=["high"]), sweep.plan) == 0
    assert sweep.starts() == [("high", 0), ("high", 1)]
    kept = json.loads((sweep.place.path / "plan.json").read_text())
    assert [run["arm"] for run in kept["runs"]] == ["low", "high", "low", "high"]


def test_a_time_limit_that_passes_after_the_last_run_stops_nothing(sweep):
    assert sweep.launch(stop_after=60) == 0
    assert sweep.launch(stop_after=1e-9) == 0


def test_runs_that_another_process_is_at_are_waited_for_and_not_started_twice(sweep):
    run = sweep.script("low", 0, "hang")
    sweep.place.write_config(run)
    other = subprocess.Popen(sweep.place.command(run))
    while not _lines(sweep):
        time.sleep(0.02)
    (sweep.place.runs / f"{run.directory}.script").write_text("finish")
    with soon(other.terminate, lambda: "another process" in sweep.output.getvalue()):
        assert sweep.launch() == 0
    other.wait()
    assert sweep.starts().count(("low", 0)) == 1 and sweep.starts()[0] == ("low", 0)  # after the other one had saved


def test_a_start_without_an_end_is_closed_and_the_content_by_run_is_that_of_a_quiet_sweep(sweep):
    run = sweep.plan().runs[0]
    sweep.place.ledger.append("start", run=run.directory, arm=run.arm, seed=0, stage="compare", pid=2**22 + 1, host="elsewhere")
    assert sweep.launch() == 0
    assert sweep.ends()[0] == ("low", 0, "lost")
    disturbed = by_run(sweep.place.ledger.rows())
    quiet = Sweep()
    quiet.place = Place("other", "acted-smoke")
    assert quiet.launch() == 0 and by_run(quiet.place.ledger.rows()) == disturbed


def test_runs_of_one_program_start_one_after_the_other_until_it_is_compiled(acted):
    arms = [Arm("only", {RATE: 1e-3})]
    sweep = Sweep(arms)
    run = sweep.script("only", 0, "slow")
    assert sweep.launch(slots=2) == 0
    starts = [row["time"] for row in sweep.place.ledger.rows() if row["event"] == "start"]
    compiled = read_metrics(sweep.place.directory(run) / "metrics.jsonl")[0]["timing"]["time"]
    assert starts[1] > compiled > starts[0] + 0.3


def test_two_slots_run_two_arms_at_once_on_processors_of_their_own(sweep):
    sweep.script("low", 0, "hang finish")
    sweep.script("high", 0, "hang finish")
    cpus = sorted(os.sched_getaffinity(0))
    slots, _ = make_slots(2, gpus=()) if len(cpus) > 1 else ([Slot(0, (cpus[0],)), Slot(1, (cpus[0],))], [])
    launcher = Launcher(sweep.place, slots, Display(sweep.place, sweep.output))
    with soon(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: len(_lines(sweep)) == 2):
        assert launcher.run(sweep.plan(), sweep.plan) == 75
    assert sweep.starts() == [("low", 0), ("high", 0)]
    assert {tuple(line["cpus"]) for line in _lines(sweep)} == {slot.cpus for slot in slots}


def test_a_tuned_arm_is_compared_with_the_point_that_its_tuning_runs_chose(acted):
    arms = [Arm("tuned", tune=Tuning(space=axis(RATE, [1e-3, 1e-2]), seeds=[100])), Arm("fixed", {RATE: 1e-4})]
    sweep = Sweep(arms)
    assert sweep.launch() == 0
    assert sweep.starts() == [("tuned", 100), ("tuned", 100), ("fixed", 0), ("fixed", 1), ("tuned", 0), ("tuned", 1)]
    assert sweep.plan().choices[0].chosen == "learning_rate=0.001" and sweep.plan().later == 0


def test_a_tuning_run_that_failed_for_good_is_not_chosen_and_does_not_hold_up_the_comparison(acted):
    arms = [Arm("tuned", tune=Tuning(space=axis(RATE, [1e-3, 1e-2]), seeds=[100])), Arm("fixed", {RATE: 1e-4})]
    sweep = Sweep(arms)
    best = next(run for run in sweep.plan().runs if run.point == "learning_rate=0.001")
    sweep.place.runs.mkdir()
    (sweep.place.runs / f"{best.directory}.script").write_text("data")
    assert sweep.launch() == 1
    assert sweep.starts() == [("tuned", 100), ("tuned", 100), ("fixed", 0), ("fixed", 1), ("tuned", 0), ("tuned", 1)]
    choice = sweep.plan().choices[0]
    assert choice.chosen == "learning_rate=0.01" and choice.means["learning_rate=0.001"] is None
    (sweep.place.runs / f"{best.directory}.script").unlink()  # the cause is gone: it is tried again, and is the better point
    before = len(sweep.starts())
    assert sweep.launch() == 0 and sweep.plan().choices[0].chosen == "learning_rate=0.001"
    assert sweep.starts()[before:] == [("tuned", 100), ("tuned", 0), ("tuned", 1)]


def test_where_every_point_of_a_tuning_failed_nothing_is_chosen(acted):
    sweep = Sweep([Arm("tuned", tune=Tuning(space=axis(RATE, [1e-3]), seeds=[100])), Arm("fixed", {RATE: 1e-4})])
    run = next(run for run in sweep.plan().runs if run.stage == "tune")
    sweep.place.runs.mkdir()
    (sweep.place.runs / f"{run.directory}.script").write_text("data")
    assert sweep.launch() == 1 and "nothing could be chosen for tuned" in sweep.output.getvalue()
    assert sweep.starts() == [("tuned", 100), ("fixed", 0), ("fixed", 1)]


def test_the_rules_are_in_the_ledger_before_the_first_run(sweep):
    claim = Claim(statement="s", source="x", arm="high", against="low", rule=Rule())
    sweep.experiment = Experiment(**{**vars(sweep.experiment), "claims": [claim]})
    assert sweep.launch() == 0
    first = sweep.place.ledger.rows()[0]
    assert first["event"] == "plan" and first["rules"][0]["statement"] == "s" and "alpha 0.05" in first["rules"][0]["rule"]


# ---- slots


def test_slots_are_of_one_size_and_what_is_left_stays_free(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    slots, notes = make_slots(3, gpus=())
    assert [slot.cpus for slot in slots] == [(0, 1), (2, 3), (4, 5)] and "1 of 7" in notes[0]
    assert make_slots(1, gpus=())[0][0].cpus is None
    with pytest.raises(ConfigError, match="there are 7 processors"):
        make_slots(8, gpus=())


def test_gpus_are_given_out_whole():
    slots, _ = make_slots(2, devices=2, gpus=("4", "5", "6", "7"))
    assert [slot.variables() for slot in slots] == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert make_slots(1, devices=-1, gpus=("0", "1"))[0][0].gpus == ("0", "1")
    with pytest.raises(ConfigError, match="there are 2 here"):
        make_slots(3, gpus=("0", "1"))
    with pytest.raises(ConfigError, match="there are 2 here"):
        make_slots(2, devices=2, gpus=("0", "1"))
    with pytest.raises(ConfigError, match="mesh of 4 devices"):
        make_slots(1, devices=4, gpus=())


def test_small_runs_share_a_gpu_and_its_memory_evenly():
    slots, notes = make_slots(4, gpus=("0", "1"))
    assert [slot.gpus for slot in slots] == [("0",), ("1",), ("0",), ("1",)] and "2 runs share a GPU" in notes[0]
    assert {slot.variables()["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in slots} == {"0.450"}


def _lines(sweep):
    try:
        return [json.loads(line) for line in (sweep.place.runs / "times.jsonl").read_text().splitlines()]
    except OSError:
        return []


# ---- runs that another sweep has in its plan, too


@pytest.fixture
def other(acted):
    """A function that has another process train a run of a sweep from now on."""

    def start(sweep, run):
        sweep.place.write_config(run)
        directory = sweep.place.directory(run)
        child = subprocess.Popen(sweep.place.command(run), env=os.environ | {"ACTOR_WORD": "crawl"})
        while outcome(directory, run.steps).state != "running":
            time.sleep(0.02)
        return child

    return start


def test_a_run_that_another_sweep_begins_meanwhile_is_waited_for_and_not_failed(other, monkeypatch):
    sweep = students()
    begun = []
    fill = Launcher._fill

    def late(self, waiting):
        if not begun:  # after it was seen that nobody is at it
            begun.append(other(sweep, next(run for run in sweep.plan().runs if run.arm == "donor" and run.seed == 0)))
        fill(self, waiting)

    monkeypatch.setattr(Launcher, "_fill", late)
    assert sweep.launch(slots=2) == 0 and begun[0].wait(30) == 0
    assert ("donor", 0) not in sweep.starts() and {end for *_, end in sweep.ends()} == {"finished"}
    assert "another process is at it" in sweep.output.getvalue()


def test_nor_is_one_that_another_sweep_was_faster_to_lock(other, monkeypatch):
    sweep = Sweep()
    begun = []
    start = Launcher._start

    def late(self, run, slot):
        if not begun:
            begun.append(other(sweep, run))
        start(self, run, slot)

    monkeypatch.setattr(Launcher, "_start", late)
    assert sweep.launch(retries=0) == 0 and begun[0].wait(30) == 0
    ends = [end for *_, end in sweep.ends()]
    assert ends.count("finished") == 4 and "failed" not in ends


# ---- runs that start from other runs


def students():
    """A donor for each seed, named last, and an arm that needs it."""
    return Sweep([Arm("student", {"train.teacher.run": RunOf("donor"), RATE: 1e-3}), Arm("donor", {RATE: 1e-2})])


def test_a_run_waits_for_the_one_that_it_starts_from_although_a_slot_is_free(acted):
    sweep = students()
    for seed in (0, 1):
        sweep.script("donor", seed, "slow")
    assert sweep.launch(slots=2) == 0
    seen = [(row["event"], row["arm"], row["seed"]) for row in sweep.place.ledger.rows() if row["event"] != "plan"]
    for seed in (0, 1):
        assert seen.index(("end", "donor", seed)) < seen.index(("start", "student", seed))
    before = len(sweep.starts())
    assert sweep.launch() == 0 and len(sweep.starts()) == before


def test_where_the_donor_is_lost_the_run_fails_without_being_started(acted):
    sweep = students()
    sweep.script("donor", 0, "diverge")
    assert sweep.launch(slots=2) == 1
    assert ("student", 0) not in sweep.starts() and ("student", 1) in sweep.starts()
    row = next(
        row for row in sweep.place.ledger.rows() if row["event"] == "end" and (row["arm"], row["seed"]) == ("student", 0)
    )
    assert row["outcome"] == "failed" and "is diverged" in row["message"]
    assert sweep.launch() == 1 and ("student", 0) not in sweep.starts()


def test_a_tuned_arm_that_starts_from_a_tuned_one_is_run_to_the_end_and_once(acted):
    tune = Tuning(space=axis(RATE, [1e-3, 1e-2]), seeds=[100])
    student = Arm("student", {"train.teacher.run": RunOf("donor"), "model.layers": 1}, tune=tune)
    sweep = Sweep([student, Arm("donor", tune=tune)])
    assert sweep.launch(slots=2) == 0
    starts = sweep.starts()
    assert len(starts) == len(set(sweep.plan().distinct)) == 8 and {outcome for *_, outcome in sweep.ends()} == {"finished"}
    assert max(i for i, start in enumerate(starts) if start == ("donor", 100)) < starts.index(("student", 100))
    assert sweep.launch(slots=2) == 0 and sweep.starts() == starts
