"""Slots of a cluster's queue, with acted runs (`actor.py`) and submitit's cluster `local`, which makes processes of jobs."""

import contextlib
import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from strata import ConfigError, StrataError
from trainer.sweep import Arm, Experiment, LogUniform, Scale, Search
from trainer.sweep.display import Display
from trainer.sweep.launcher import Launcher
from trainer.sweep.ledger import by_run
from trainer.sweep.outcome import outcome
from trainer.sweep.place import Place
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import Source
from trainer.sweep.search import Study
from trainer.sweep.search_launcher import SearchLauncher
from trainer.sweep.slots import Slot

submitit = pytest.importorskip("submitit", reason="submitit is not installed (extra: sweep)")
from trainer.sweep import submitted  # noqa: E402

RATE = "optimizer.direction.learning_rate"


class Sweep:
    """One arm and two seeds."""

    def __init__(self, runs="runs"):
        self.experiment = Experiment(
            name="acted", config="small.py:8", arms=[Arm("only", {RATE: 1e-3})], scales={"smoke": Scale(seeds=2)}
        )
        self.place = Place(runs, "acted-smoke")
        self.output = io.StringIO()

    def plan(self):
        return make_plan(Source(self.experiment, Path("experiment.py"), ""), "smoke")

    def script(self, seed, words):
        run = next(run for run in self.plan().runs if run.seed == seed)
        self.place.runs.mkdir(exist_ok=True)
        (self.place.runs / f"{run.directory}.script").write_text(words)
        return run

    def slots(self, count=1):
        return submitted.make_submitted_slots(count, {"cluster": "local", "timeout_min": "5"}, self.place.path / "submitit")

    def launch(self, slots=None):
        launcher = Launcher(self.place, slots or self.slots(), Display(self.place, self.output))
        return launcher.run(self.plan(), self.plan)

    def rows(self, event):
        return [row for row in self.place.ledger.rows() if row["event"] == event]

    def began(self, run):
        """The actor has written what it does before it hangs."""
        return outcome(self.place.directory(run), 0).step > 0


@pytest.fixture
def sweep(acted):
    return Sweep()


def when(ready, act):
    """A thread that acts once; if that goes wrong it stops the launch, which would wait for ever."""

    def wait():
        deadline = time.monotonic() + 60
        try:
            while not ready():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            act()
        except BaseException:
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_jobs_end_with_the_ledger_of_processes(sweep):
    assert sweep.launch(sweep.slots(2)) == 0
    plain = Sweep("other")
    assert plain.launch([Slot(0)]) == 0
    assert by_run(sweep.place.ledger.rows()) == by_run(plain.place.ledger.rows())
    slots = [row["slot"] for row in sweep.rows("start")]
    assert {slot["cluster"] for slot in slots} == {"local"} and len({slot["job"] for slot in slots}) == 2
    run = sweep.plan().runs[0]
    names = {path.name for path in sweep.place.directory(run).iterdir()}
    assert names == {path.name for path in plain.place.directory(run).iterdir()}, "nothing of submitit's in a run directory"


def test_a_stopped_launcher_has_its_jobs_save_and_goes_on(sweep, children):
    run = sweep.script(0, "hang finish")

    def interrupt():  # as a terminal does: the launcher and whatever is in its group
        group = os.getpgrp()
        job = int(sweep.rows("start")[0]["slot"]["job"])
        for pid in [os.getpid(), *(pid for pid in [job, *children(job)] if os.getpgid(pid) == group)]:
            os.kill(pid, signal.SIGINT)

    thread = when(lambda: sweep.began(run), interrupt)
    assert sweep.launch() == 75
    thread.join()
    assert [row["outcome"] for row in sweep.rows("end")] == ["preempted"]
    assert sweep.launch() == 0
    assert [(row["seed"], row["outcome"]) for row in sweep.rows("end")] == [(0, "preempted"), (0, "finished"), (1, "finished")]


def test_a_job_that_is_out_of_time_saves_and_is_submitted_again_by_submitit(sweep, children):
    run = sweep.script(0, "hang finish")

    def warn():
        for pid in children(int(sweep.rows("start")[0]["slot"]["job"])):
            os.kill(pid, signal.SIGUSR2)

    thread = when(lambda: sweep.began(run), warn)
    assert sweep.launch() == 0
    thread.join()
    assert [(row["seed"], row["outcome"]) for row in sweep.rows("end")] == [(0, "finished"), (1, "finished")]
    assert len(sweep.rows("start")) == 2


def test_a_cancelled_job_saves_and_its_run_is_tried_again(sweep, children):
    run = sweep.script(0, "hang finish")

    def cancel():
        for pid in children(int(sweep.rows("start")[0]["slot"]["job"])):
            os.kill(pid, signal.SIGTERM)

    thread = when(lambda: sweep.began(run), cancel)
    assert sweep.launch() == 0
    thread.join()
    assert [(row["seed"], row["outcome"]) for row in sweep.rows("end")][:2] == [(0, "preempted"), (0, "finished")]


def test_a_job_that_is_killed_is_a_failed_attempt_with_the_reason(sweep, children, monkeypatch):
    monkeypatch.setattr(submitted, "QUEUE", 0.2)
    run = sweep.script(0, "deaf finish")

    def kill():
        job = int(sweep.rows("start")[0]["slot"]["job"])
        task = children(job)
        for pid in [job, *task, *(pid for one in task for pid in children(one))]:
            os.kill(pid, signal.SIGKILL)

    thread = when(lambda: sweep.began(run), kill)
    assert sweep.launch() == 0
    thread.join()
    first = sweep.rows("end")[0]
    assert (
        first["outcome"] == "failed" and first["again"] and "has left the queue without a word of its run" in first["message"]
    )
    assert sweep.rows("end")[1]["outcome"] == "finished"


def test_a_new_launcher_waits_for_the_jobs_of_one_that_was_killed(sweep):
    run = sweep.script(0, "crawl")
    slot = sweep.slots()[0]
    sweep.place.write_config(run)
    sweep.place.log(run).parent.mkdir(parents=True)
    job = slot.start(sweep.place.command(run), sweep.place.log(run))
    about = {"run": run.directory, "arm": run.arm, "seed": 0, "stage": run.stage, "attempt": 1, "host": os.uname().nodename}
    sweep.place.ledger.append("start", **about, **slot.describe(job))  # the job has not begun: only the queue knows of it
    assert sweep.launch() == 0
    assert "another process is at it" in sweep.output.getvalue()
    assert [row["seed"] for row in sweep.rows("start")] == [0, 1]
    assert [(row["seed"], row["outcome"]) for row in sweep.rows("end")] == [(0, "finished"), (1, "finished")]
    assert job.poll() == 0


class Queued:
    """A job that waits, and counts how often it was cancelled."""

    job_id = "7"

    def __init__(self):
        self.cancelled = 0

    def cancel(self, check):
        self.cancelled += 1


def test_a_job_that_has_not_begun_is_cancelled_at_once(tmp_path):
    queued = Queued()
    job = submitted.Job(queued, "slurm", tmp_path, tmp_path / "log")
    assert job.poll() is None
    job.terminate()
    assert queued.cancelled == 1 and job.poll() == 75
    assert submitted.Attempt(["false"], tmp_path / "log", tmp_path, tmp_path)() == 75, "if it begins all the same, it ends"


def test_a_job_that_does_not_end_when_it_is_killed_is_cancelled_once_and_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(submitted, "CANCELLED", 0.1)
    queued = Queued()
    (tmp_path / "began").touch()
    job = submitted.Job(queued, "slurm", tmp_path, tmp_path / "log")
    job.terminate()
    assert job.poll() is None and not queued.cancelled
    job.kill()
    job.kill()
    time.sleep(0.2)
    assert queued.cancelled == 1 and job.poll() == -signal.SIGKILL
    assert (tmp_path / "stop").exists(), "should the scheduler start it once more"


def test_a_scheduler_is_asked_seldom_and_believed_only_when_it_answers(monkeypatch):
    asked, answers = [], ["PENDING\n", StrataError("squeue failed: slurm_load_jobs error: Invalid job id specified")]

    def call(*command):
        asked.append(command)
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    monkeypatch.setattr("trainer.sweep.slurm.call", call)
    monkeypatch.setattr(submitted, "_answers", {})
    assert all(submitted.in_queue("slurm", "12", "run") for _ in range(5)) and len(asked) == 1
    monkeypatch.setattr(submitted, "QUEUE", 0.0)
    answers.pop(0)
    assert not submitted.in_queue("slurm", "12", "run")
    answers[0] = StrataError("squeue did not answer within two minutes")
    assert submitted.in_queue("slurm", "12", "run")


def test_a_new_job_of_a_run_ends_those_before_it(sweep):
    run = sweep.plan().runs[0]
    sweep.place.write_config(run)
    sweep.place.log(run).parent.mkdir(parents=True)
    earlier = sweep.place.path / "submitit" / run.directory / "earlier"
    earlier.mkdir(parents=True)
    job = sweep.slots()[0].start(sweep.place.command(run), sweep.place.log(run))
    assert (earlier / "stop").exists() and not (job.control / "stop").exists()
    job.kill()


def test_a_requeued_job_counts_as_waiting_again(tmp_path):
    (tmp_path / "began").touch()
    submitted.Attempt(["true"], tmp_path / "log", tmp_path, tmp_path).checkpoint()
    assert not (tmp_path / "began").exists()


def test_what_a_scheduler_refuses_is_said_in_its_words(sweep, monkeypatch):
    def refuse(*_):
        raise submitit.core.utils.FailedJobError("sbatch: error: invalid partition specified: gpuu")

    monkeypatch.setattr(submitted, "_submit", refuse)
    monkeypatch.setattr(submitted.time, "sleep", lambda seconds: None)
    with pytest.raises(StrataError, match="local refused the job of small-.*invalid partition specified: gpuu"):
        sweep.launch()


def test_a_search_hands_its_trials_to_a_cluster(acted):
    pytest.importorskip("optuna", reason="Optuna is not installed (extra: sweep)")
    search = Search(name="rates", config="small.py:4", space={RATE: LogUniform(1e-5, 1.0)}, trials=3, startup=3, prune=False)
    there = Place("runs", "rates-search")
    slots = submitted.make_submitted_slots(2, {"cluster": "local"}, there.path / "submitit")
    study = Study(search, there.path)
    assert SearchLauncher(there, slots, Display(there, io.StringIO())).search(search, study) == 0
    assert study.counts() == {"complete": 3}


def test_a_search_that_was_killed_waits_for_the_job_of_its_trial(acted, monkeypatch):
    pytest.importorskip("optuna", reason="Optuna is not installed (extra: sweep)")
    monkeypatch.setenv("ACTOR_WORD", "crawl")
    search = Search(name="rates", config="small.py:8", space={RATE: LogUniform(1e-5, 1.0)}, trials=2, startup=2, prune=False)
    there = Place("runs", "rates-search")
    slots = submitted.make_submitted_slots(1, {"cluster": "local"}, there.path / "submitit")
    output = io.StringIO()
    with pytest.raises(Killed):
        launcher = SearchLauncher(there, slots, Display(there, output))
        monkeypatch.setattr(launcher, "_watch", lambda entry: (_ for _ in ()).throw(Killed()))  # right after the first start
        monkeypatch.setattr(launcher, "_no_orphans", contextlib.nullcontext)
        launcher.search(search, Study(search, there.path))
    study = Study(search, there.path)
    assert SearchLauncher(there, slots, Display(there, output)).search(search, study) == 0
    assert "another process is at it" in output.getvalue()
    starts = [row["run"] for row in there.ledger.rows() if row["event"] == "start"]
    assert len(starts) == len(set(starts)) == 2 and study.counts()["complete"] == 2


class Killed(BaseException):
    """As `kill -9` of the launcher: nothing of it runs afterwards."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster": "lsf"}, "doesn't know any executor named lsf"),
        ({"cluster": "debug"}, "runs jobs within the launcher"),
        ({"cluster": "local", "timeout_min": "soon"}, "expected whole minutes"),
        ({"cluster": "slurm", "slurm_time": "1:00:00"}, "expected whole minutes"),
        ({"cluster": "slurm", "slurm_partition": "gpu"}, "--submitit.timeout_min=MINUTES is missing"),
        ({"cluster": "local", "mem_gb": "Infinity"}, "mem_gb"),
        ({"cluster": "local", "local_setup": "module load"}, "expected a list"),
        ({"cluster": "slurm", "slurm_additional_parameters": '{"ntasks": 4}'}, "--launcher slurm starts several"),
        ({"cluster": "local", "partitions": "gpu"}, "need to be prefixed by an executor name"),
        ({"cluster": "local", "slurm_partitions": "gpu"}, "Unknown argument 'partitions'"),
        ({"cluster": "local", "tasks_per_node": "2"}, "--launcher slurm starts several"),
        ({"cluster": "slurm", "slurm_ntasks_per_node": "4"}, "--launcher slurm starts several"),
    ],
)
def test_options_that_submitit_refuses_are_refused_before_anything_starts(tmp_path, monkeypatch, options, words):
    (tmp_path / "srun").touch(0o755)  # by which submitit knows a machine of Slurm's
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ConfigError) as error:
        submitted.make_submitted_slots(1, options, tmp_path / "submitit")
    assert words in str(error.value)
