"""Adaptive search with acted runs: it finds a planted optimum, stops bad trials, and goes on where it was killed."""

import io
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from strata import ConfigError, StrataError
from trainer.sweep import Among, LogUniform, Metric, Search, Uniform, Whole
from trainer.sweep.display import Display
from trainer.sweep.outcome import outcome
from trainer.sweep.place import Place
from trainer.sweep.reading import read
from trainer.sweep.search import INVALID, Study, check
from trainer.sweep.search_launcher import SearchLauncher, check_points, plan_of
from trainer.sweep.slots import Slot

RATE = "optimizer.direction.learning_rate"


@pytest.fixture
def optuna():
    """Skips, with the reason, where Optuna is not installed."""
    return pytest.importorskip("optuna", reason="Optuna is not installed (extra: sweep)")


@pytest.fixture
def launch(acted):
    """A function from a search to its exit code and study; the acted loss is lowest at a rate of 1e-3."""

    def run(search, slots=1, **rest):
        there = Place("runs", f"{search.name}-search")
        output = io.StringIO()
        launcher = SearchLauncher(there, [Slot(i) for i in range(slots)], Display(there, output), **rest)
        study = Study(search, there.path)
        code = launcher.search(search, study)
        return code, study, there, output.getvalue()

    return run


def search(**changes):
    given = dict(name="rates", config="small.py:20", space={RATE: LogUniform(1e-5, 1.0)}, trials=8, startup=3, prune=False)
    return Search(**{**given, **changes})


def test_its_config_is_read_once_so_that_every_trial_is_of_the_same(place):
    wanted = search()
    first, second = (plan_of(wanted, [{RATE: rate}], Path("search.py")).runs[0] for rate in (0.1, 0.2))
    file = Path("small.py")
    file.write_text(file.read_text().replace("def get_config", "def gone"))
    assert plan_of(wanted, [{RATE: 0.2}], Path("search.py")).runs[0].config == second.config != first.config
    with pytest.raises(ConfigError, match="get_config"):
        plan_of(search(), [{RATE: 0.2}], Path("search.py"))


def test_it_finds_the_planted_optimum_and_leaves_a_sweep_that_can_be_reported(optuna, launch):
    code, study, there, _ = launch(search(trials=12), slots=2)
    assert code == 0 and study.counts() == {"complete": 12}
    point, best = study.best()
    assert 2e-4 < point[RATE] < 5e-3 and best < 0.8
    source = read(str(there.path / "experiment.py"))
    assert len(source.experiment.arms) == 12 and (there.path / "plan.json").is_file()
    assert all(outcome(path, 20).state == "finished" for path in Path("runs").glob("small-*") if path.is_dir())


def test_trials_at_one_point_share_its_run_although_it_is_under_way(optuna, launch):
    code, study, there, output = launch(search(space={"model.layers": Whole(1, 2)}, trials=6), slots=3)
    assert code == 0 and study.counts() == {"complete": 6}
    starts = [row["run"] for row in there.ledger.rows() if row["event"] == "start"]
    assert len(starts) == len(set(starts)) == 2 and "which is under way" in output and len(study.points()) <= 6


def test_a_journal_that_was_cut_short_loses_its_last_line_and_a_damaged_one_is_named(optuna, launch):
    code, study, there, _ = launch(search(trials=3))
    assert code == 0 and study.counts() == {"complete": 3}
    journal = there.path / "optuna.journal"
    journal.write_bytes(journal.read_bytes()[:-30])
    code, study, _, _ = launch(search(trials=4))
    assert code == 0 and study.counts()["complete"] >= 3
    for content in (b"garbage\n", b"[1]\n", journal.read_bytes().replace(b'"op_code"', b'"oops"', 1)):
        journal.write_bytes(content)
        with pytest.raises(StrataError, match=r"optuna\.journal cannot be read"):
            launch(search(trials=4))


def test_a_bad_trial_is_stopped_by_its_curve(optuna, launch, monkeypatch):
    monkeypatch.setenv("ACTOR_WORD", "crawl")
    code, study, there, output = launch(search(config="small.py:12", prune=True, trials=7, startup=2), slots=2)
    counts = study.counts()
    assert code == 0 and counts["pruned"] >= 1 and sum(counts.values()) == 7 and "pruned learning_rate=" in output
    ended = [row["outcome"] for row in there.ledger.rows() if row["event"] == "end"]
    assert ended.count("preempted") == counts["pruned"] and ended.count("finished") == counts["complete"]


def test_a_search_that_was_stopped_goes_on_with_the_trial_that_was_under_way(optuna, launch, monkeypatch):
    monkeypatch.setenv("ACTOR_WORD", "hang")
    ledger = Place("runs", "rates-search").ledger

    def stop():
        deadline = time.monotonic() + 20
        while not Path("runs/times.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code, _, _, _ = launch(search(trials=3))
    thread.join()
    assert code == 75
    monkeypatch.setenv("ACTOR_WORD", "finish")
    code, study, _, _ = launch(search(trials=3))
    runs = [row["run"] for row in ledger.rows() if row["event"] == "start"]
    assert code == 0 and runs[0] == runs[1] and len(set(runs)) == 3
    assert study.counts() == {"fail": 1, "complete": 3}
    code, study, _, _ = launch(search(trials=3))
    assert code == 0 and study.counts() == {"fail": 1, "complete": 3}


def test_a_point_that_is_no_config_is_a_failed_trial_that_was_not_spent(optuna, launch):
    found = search(space={"model.heads": Among([1, 3]), "model.width": Among([8, 12])}, trials=3)
    check_points(found, Path("search.py"))  # three heads go with a width of 12
    code, study, _, output = launch(found)
    assert code == 0 and study.counts()["complete"] == 3
    assert ("is no valid config" in output) == (study.counts().get("fail", 0) > 0)


def test_points_that_are_no_config_are_not_counted_and_end_the_search_all_the_same(optuna, tmp_path):
    study = Study(search(trials=2), tmp_path)
    for _ in range(2 * INVALID):
        number, _ = study.ask()
        study.refuse(number)
    assert study.ask() is None
    study = Study(search(trials=3), tmp_path)
    number, _ = study.ask()
    study.tell(number, 1.0)
    assert study.counts() == {"fail": 2 * INVALID, "complete": 1} and study.ask() is not None


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"model.layerz": Whole(1, 2)}, ["did you mean model.layers"]),
        ({RATE: Uniform(-1.0, 1.0)}, ["learning_rate = -1.0"]),
        ({"model.layers": Whole(0, 2), "model.norm.name": Among(["rmsnorm", "rmsnrom"])}, ["model.layers = 0", "rmsnrom"]),
        ({"model.heads": Among([1, 3])}, ["model.heads = 3"]),
    ],
)
def test_a_space_with_a_value_that_goes_with_nothing_is_refused_before_there_is_a_study(place, command, space, words):
    text = (
        f"from trainer.sweep import *\n\ndef get_search():\n    return Search(name='s', config='small.py', space={space!r})\n"
    )
    (place / "search.py").write_text(text)
    code, _, err = command("search", "search.py")
    assert code == 2 and all(word in err for word in words), err
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(space={"model.layers": Among([1, 2, 3])}),
            'another space model.layers: {"kind": "Among", "choices": [1, 2]} there',
        ),
        (dict(space={RATE: Uniform(0.1, 1.0)}), f"space {RATE}: null there"),
        (dict(metric=Metric("accuracy", lower_is_better=False)), "another metric"),
        (dict(changes={RATE: 0.5}), "another changes"),
    ],
)
def test_a_study_of_another_space_or_metric_is_refused_by_name(optuna, tmp_path, changes, words):
    first = dict(space={"model.layers": Among([1, 2])})
    study = Study(search(**first), tmp_path)
    study.tell(study.ask()[0], 1.0)
    assert Study(search(**first, trials=99), tmp_path).ask() is not None
    with pytest.raises(ConfigError, match=re.escape(words)):
        Study(search(**{**first, **changes}), tmp_path)


def test_every_kind_of_space_gives_a_config(place):
    point = {RATE: 0.5, "model.layers": 3, "model.norm.name": "layer_norm"}
    run = plan_of(search(), [point], place / "experiment.py").runs[0]
    assert '"layers": 3' in run.config and '"layer_norm"' in run.config and run.seed == 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(space={}), "has no space"),
        (dict(space={RATE: Uniform(1.0, 1.0)}), "expected low below high"),
        (dict(space={RATE: LogUniform(0.0, 1.0)}), "both above 0"),
        (dict(space={"model.layers": Whole(4, 2)}), "expected low below high"),
        (dict(space={RATE: Among([])}), "there are no choices"),
        (dict(metric=Metric(kind="steps_to", target=1.0)), "kind value"),
        (dict(trials=0), "at least one trial"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        check(search(**changes))


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'strata-lm\[sweep\]'"):
        Study(search(), tmp_path)


def test_a_search_takes_no_axes_and_needs_its_own_kind_of_file(place, command):
    code, _, err = command("search", "small.py", "--sweep.seed=1")
    assert code == 2 and "a search takes no seed" in err
    code, _, err = command("search", "small.py")
    assert code == 2 and "defines no function get_search()" in err
