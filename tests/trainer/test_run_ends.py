"""How runs end before their end: signals, saves that fail, numbers that are not finite. And that they go on from there."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import optim
import trainer
from strata import Diverged, Preempted, StrataError
from trainer import loop, manifest, signals
from trainer.checkpoint import Checkpointer
from trainer.metrics import read_metrics
from trainer.run_directory import RunDirectory


def rows(directory):
    """Rows without what may differ between two runs."""
    return [
        {key: value for key, value in row.items() if key != "timing"} for row in read_metrics(Path(directory) / "metrics.jsonl")
    ]


def final(directory):
    """Parameters at the last step."""
    return trainer.load(directory).params


def same(one, two):
    """Whether two pytrees are equal bit for bit."""
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, two)
    return all(jax.tree.leaves(equal))


def status(directory):
    """State and step of `status.json`."""
    found = json.loads((directory / "status.json").read_text())
    return found["state"], found["step"]


class Killed(Exception):
    """Stands for a process that is gone."""


def after_step(monkeypatch, step, happen):
    """Let something happen to the loop right after it has dispatched `step`."""
    original = loop.Loop._read

    def read(self, pending, *rest, **more):
        if pending and pending[-1].step == step:
            happen(self)
        return original(self, pending, *rest, **more)

    monkeypatch.setattr(loop.Loop, "_read", read)


def kill(running):
    raise Killed


def stop(running):
    running.stop.received = "SIGTERM"


def without_space(monkeypatch, *steps):
    """Let the disk be full when the manifest of some steps is to be written; returns the steps that were tried."""
    original, tried = manifest.write_manifest, []

    def write(directory, *, step, **rest):
        tried.append(step)
        if step in steps:
            raise OSError(28, "No space left on device", str(directory))
        return original(directory, step=step, **rest)

    monkeypatch.setattr(manifest, "write_manifest", write)
    return tried


def test_a_failed_run_says_why_in_its_status(tiny, tmp_path, monkeypatch):
    after_step(monkeypatch, 5, kill)
    with pytest.raises(Killed):
        trainer.train(tiny(), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "Killed" in status["message"]


def test_a_signal_saves_and_a_second_start_goes_on(tiny, tmp_path, monkeypatch):
    trainer.train(tiny(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        after_step(patch, 4, stop)
        with pytest.raises(Preempted, match="SIGTERM") as caught:
            trainer.train(tiny(), tmp_path / "cut")
    assert caught.value.exit_code == 75
    status = json.loads((tmp_path / "cut" / "status.json").read_text())
    assert status["state"] == "preempted" and status["step"] in (4, 5)
    trainer.train(tiny(), tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and same(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_a_signal_during_the_last_evaluation_ends_the_run_as_one_that_goes_on(tiny, tmp_path, monkeypatch):
    trainer.train(tiny(), tmp_path / "whole")
    original = loop.Loop._evaluate

    def evaluate(self, state, step, *rest):
        if step == 8:
            stop(self)
        return original(self, state, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_evaluate", evaluate)
        with pytest.raises(Preempted, match="SIGTERM after saving step 8"):
            trainer.train(tiny(), tmp_path / "cut")
    assert status(tmp_path / "cut") == ("preempted", 8)
    trainer.train(tiny(), tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and status(tmp_path / "cut") == ("finished", 8)


def test_a_save_that_fails_is_made_up_for_at_once_and_the_run_goes_on(tiny, tmp_path, monkeypatch, capsys):
    trainer.train(tiny(), tmp_path / "whole")
    before, original = [], loop.Loop._save

    def save(self, *rest, **more):
        original(self, *rest, **more)
        if self.checkpointer._thread is not None:
            self.checkpointer._thread.join()  # so that its failure is there to be seen after the next step

    def note_and_stop(running):
        before.append(status(tmp_path / "cut"))
        stop(running)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_save", save)
        after_step(patch, 5, note_and_stop)
        tried = without_space(patch, 3)
        with pytest.raises(Preempted):
            trainer.train(tiny(), tmp_path / "cut")
    assert tried[:2] == [3, 4] and before == [("running", 4)]
    said = capsys.readouterr().err
    assert "step 3 could not be written" in said and "No space left" in said and "step 4 is saved instead" in said
    state, step = status(tmp_path / "cut")
    assert state == "preempted" and step == tried[-1] == trainer.load(tmp_path / "cut").step
    trainer.train(tiny(), tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and same(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_two_saves_that_fail_in_a_row_stop_the_run_at_a_step_that_is_there(tiny, tmp_path, monkeypatch):
    without_space(monkeypatch, 6, 7, 8, 9)
    with pytest.raises(StrataError, match=r"step [789] could not be written .*No space left") as caught:
        trainer.train(tiny(train__steps=9), tmp_path / "run")
    assert caught.value.exit_code == 1
    assert status(tmp_path / "run") == ("failed", 3) and trainer.load(tmp_path / "run").step == 3


def test_stopping_signals_set_a_flag_and_are_given_back():
    import os
    import signal

    before = signal.getsignal(signal.SIGUSR1)
    with signals.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("where", ["before the last evaluation", "after it"])
def test_a_run_that_dies_after_its_last_step_finishes_on_the_next_start(tiny, tmp_path, monkeypatch, where):
    trainer.train(tiny(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        name = "_evaluate" if where == "before the last evaluation" else "_finished"
        original = getattr(loop.Loop, name)

        def die(self, state, step, *rest):
            if step == 8:
                raise Killed
            return original(self, state, step, *rest)

        patch.setattr(loop.Loop, name, die)
        with pytest.raises(Killed):
            trainer.train(tiny(), tmp_path / "cut")
    assert trainer.load(tmp_path / "cut").step == 8
    result = trainer.train(tiny(), tmp_path / "cut")
    assert result.evaluation["loss"] > 0 and rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_what_fails_after_the_end_does_not_make_the_run_a_failed_one(tiny, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no more paper")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "conclude", broken)
        assert trainer.train(tiny(), tmp_path / "run").step == 8
    assert (
        "the run is finished and saved; what is said at the end could not be (OSError: no more paper)"
        in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert trainer.train(tiny(), tmp_path / "run").step == 8


POISON = 5


def poison(monkeypatch, steps=(POISON,)):
    """Make the weights of some steps' batches infinite, which makes loss and gradient non-finite."""
    from trainer.data.dataset import TrainIterator

    original = TrainIterator.__next__
    seen = {"step": 0}

    def following(self):
        seen["step"] += 1
        batch = original(self)
        return batch | {"weights": batch["weights"] * np.float32("inf")} if seen["step"] in steps else batch

    monkeypatch.setattr(TrainIterator, "__next__", following)


def test_a_non_finite_loss_stops_the_run_and_saves_the_state_before_it(tiny, tmp_path, monkeypatch):
    trainer.train(tiny(checkpoint__every=1, checkpoint__keep_latest=9), tmp_path / "whole")
    with monkeypatch.context() as patch:
        poison(patch)
        with pytest.raises(Diverged, match=f"step {POISON} is not finite") as caught:
            trainer.train(tiny(), tmp_path / "run")
    assert caught.value.exit_code == 3
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert report["step"] == POISON and report["examples"] == [16, 20]
    run = trainer.load(tmp_path / "run")
    assert run.step == POISON - 1 and same(run.params, trainer.load(tmp_path / "whole", POISON - 1).params)
    trainer.train(tiny(), tmp_path / "run")  # the cause is gone: it goes on from there, exactly
    assert same(final(tmp_path / "run"), final(tmp_path / "whole"))


def test_the_step_that_halted_is_found_among_several_that_are_read_together(tiny, tmp_path, monkeypatch):
    poison(monkeypatch)
    with pytest.raises(Diverged, match=f"step {POISON} is not finite"):
        trainer.train(tiny(log__every=100, evaluate__every=0, checkpoint__every=0), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert report["step"] == POISON and report["examples"] == [16, 20] and trainer.load(tmp_path / "run").step == POISON - 1


def test_skip_counts_and_leaves_parameters_alone(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch)
        trainer.train(tiny(train__nonfinite="skip", checkpoint__every=1, checkpoint__keep_latest=9), tmp_path / "run")
    found = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert [row["skipped"] for row in found] == [0] * 4 + [1] * 4
    assert same(trainer.load(tmp_path / "run", 4).params, trainer.load(tmp_path / "run", 5).params)
    assert all(math.isfinite(row["loss"]) for row in found if row["step"] != POISON)


def test_skip_is_capped(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, steps=(3, 4, 5, 6))
    with pytest.raises(Diverged, match="3 updates were skipped, and train.skip_limit is 2"):
        trainer.train(tiny(train__nonfinite="skip", train__skip_limit=2), tmp_path / "run")


def test_an_older_failure_does_not_hide_a_divergence(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpointer, "failed", False)  # nobody has seen it yet
    without_space(monkeypatch, 3)
    poison(monkeypatch)
    with pytest.raises(Diverged, match=f"loss of step {POISON} is not finite .* saved as step 4"):
        trainer.train(tiny(), tmp_path / "run")
    assert status(tmp_path / "run") == ("failed", 4) and trainer.load(tmp_path / "run").step == 4


def test_a_divergence_without_room_to_save_it_says_both(tiny, tmp_path, monkeypatch):
    original = RunDirectory.write_json

    def full(self, name, value):
        if name == "nonfinite.json":
            raise StrataError(f"{name} could not be written: No space left on device")
        original(self, name, value)

    without_space(monkeypatch, 4)
    monkeypatch.setattr(RunDirectory, "write_json", full)
    poison(monkeypatch)
    with pytest.raises(Diverged) as caught:
        trainer.train(tiny(), tmp_path / "run")
    assert "is not saved (the checkpoint of step 4" in str(caught.value) and "the details are lost" in str(caught.value)
    assert trainer.load(tmp_path / "run").step == 3


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_an_update_that_is_not_finite_is_blamed_itself_and_never_saved(tiny, tmp_path, monkeypatch, nonfinite):
    """The rate of the fifth step is infinite; loss and gradient are not."""
    original = optim.rates

    def rates(option, steps):
        found = original(option, steps)
        return lambda step: {name: np.float32(np.inf if step == POISON else x) for name, x in found(step).items()}

    monkeypatch.setattr(loop.optim, "rates", rates)
    with pytest.raises(Diverged, match=f"the update of step {POISON} is not finite.*no state with it is saved"):
        trainer.train(tiny(train__nonfinite=nonfinite), tmp_path / "run")
    run = trainer.load(tmp_path / "run")
    assert run.step == 3 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.params))
    assert json.loads((tmp_path / "run" / "nonfinite.json").read_text())["what"] == "update"


def test_a_last_update_after_which_nothing_is_finite_ends_the_run_as_diverged(tiny, tmp_path):
    config = tiny(
        train__steps=1, optimizer={"direction": {"name": "adamw", "learning_rate": 1e30}, "schedule": {"name": "constant"}}
    )
    for _ in range(2):  # as often as it is started
        with pytest.raises(Diverged, match="the held-out loss after the last step, 1, is not finite"):
            trainer.train(config, tmp_path / "run")
        assert status(tmp_path / "run") == ("failed", 1)
        assert [row["split"] for row in rows(tmp_path / "run")] == ["train", "val"]
