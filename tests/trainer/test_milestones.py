"""Checkpoints that the schedule names: saved at their step, never deleted, found by name, and a start for every other run."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import trainer
from strata import ConfigError, DataError
from trainer import config as configuration
from trainer import evaluate, loop, runs
from trainer.checkpoint import Checkpointer
from trainer.metrics import read_metrics
from trainer.setup import assemble

DECAY = {"warmup": 1, "decay": 0.25, "shape": "inverse", "final": 0.1}
BUDGETS = {"name": "wsd_s", "budgets": [4, 8, 12], **DECAY, "decay_of": "cycle"}
NAMES = {3: "stable4", 4: "budget4", 7: "stable8", 8: "budget8", 11: "stable12", 12: "budget12"}
MUON = {"direction": {"name": "muon"}}


@pytest.fixture
def config(tiny):
    """A run whose only checkpoints are the named ones, by its schedule and length."""

    def of(schedule, steps, **more):
        only = {"every": 0, "keep_latest": 1, "keep_best": 0}
        return tiny(optimizer=MUON | {"schedule": schedule}, train__steps=steps, evaluate__every=0, checkpoint=only, **more)

    return of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("milestones")


@pytest.fixture
def whole(config, folder):
    """The run to the last budget, uninterrupted."""
    if not (folder / "whole").exists():
        trainer.train(config(BUDGETS, 12), folder / "whole")
    return folder / "whole"


def rows(directory, split=None):
    found = read_metrics(Path(directory) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "timing"} for row in found if split in (None, row["split"])]


def saved(directory, step):
    """Every array of a checkpoint by path, as bytes, and where the data stood."""
    setup = assemble(configuration.load(str(directory / "config.json")).config)
    checkpointer = Checkpointer(directory / "checkpoints")
    restored = checkpointer.restore(setup.abstract_state(), step)
    checkpointer.close()
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves} | {"data": restored.host["data"]}


def test_named_checkpoints_stay_and_are_found_by_name(whole, capsys):
    checkpointer = Checkpointer(whole / "checkpoints")
    assert checkpointer.steps() == list(NAMES)
    found = {}
    for word in ("budget4", "4", "budget8", "latest"):
        assert evaluate.main(["--run", str(whole), "--step", word]) == 0
        found[word] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["budget4"] == found["4"] and [found[w]["step"] for w in ("budget4", "budget8", "latest")] == [4, 8, 12]
    names = r"Good steps here: .*12; names: best, latest, .*budget4 \(step 4\), .*\(step 12\)\.$"
    with pytest.raises(ConfigError, match=rf"named 'budget5'\. {names}"):
        evaluate.main(["--run", str(whole), "--step", "budget5"])


def test_the_first_budget_is_a_stand_alone_wsd_run_bit_for_bit(config, whole, tmp_path, capsys):
    trainer.train(config({"name": "wsd", **DECAY}, 4) | {"evaluate": {"every": 3, "batches": 1}}, tmp_path / "alone")
    row = next(row for row in rows(tmp_path / "alone", "val") if row["step"] == 3)
    assert f"by name      stable (step 3, loss {row['loss']:.4f}): --step takes a name" in capsys.readouterr().out
    assert saved(tmp_path / "alone", 4) == saved(whole, 4)


def test_a_run_that_is_killed_goes_on_from_the_named_checkpoint_before(config, whole, tmp_path, monkeypatch):
    original = loop.Loop._read
    for step, last in ((5, 4), (8, 7)):

        def read(self, pending, *rest, **more):
            if pending and pending[-1].step == step:  # noqa: B023 - called within this pass
                raise KeyboardInterrupt
            return original(self, pending, *rest, **more)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_read", read)
            with pytest.raises(KeyboardInterrupt):
                trainer.train(config(BUDGETS, 12), tmp_path / "run")
        assert Checkpointer(tmp_path / "run" / "checkpoints").latest() == last
    trainer.train(config(BUDGETS, 12), tmp_path / "run")
    assert rows(tmp_path / "run") == rows(whole) and saved(tmp_path / "run", 12) == saved(whole, 12)


def test_another_run_starts_from_a_named_checkpoint(config, whole):
    setup = assemble(configuration.resolve_config(config({"name": "constant"}, 1)))
    params, step = runs.params_for(setup, whole, 4)  # what `init_from` loads
    assert step == 4
    trained = trainer.load(whole, "budget4").params
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True))


def test_another_length_branches_off_the_stable_checkpoint_bit_for_bit(config, tmp_path):
    """With a fixed decay of two updates, 4 and 8 steps share the first two."""
    short, long = ({"name": "wsd", **DECAY, "decay": 2 / steps} for steps in (4, 8))
    trainer.train(config(short, 4), tmp_path / "short")
    trainer.train(config(long, 8), tmp_path / "long")
    branch = {"run": str(tmp_path / "short"), "step": 2, "take": "all"}
    trainer.train(config(long, 8, init_from=branch), tmp_path / "branch")
    after = [row for row in rows(tmp_path / "long") if row["step"] > 2]
    assert after and rows(tmp_path / "branch") == after
    assert saved(tmp_path / "branch", 8) == saved(tmp_path / "long", 8)


def test_a_branch_that_is_killed_before_its_first_checkpoint_begins_again_there(config, tmp_path, monkeypatch):
    constant, keep = {"name": "constant"}, {"checkpoint": {"every": 0, "keep_latest": 9}}
    trainer.train(config(constant, 3) | keep, tmp_path / "donor")
    branch = config(constant, 6, init_from={"run": str(tmp_path / "donor"), "take": "all"})
    trainer.train(branch, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(branch, tmp_path / "cut")
    trainer.train(config(constant, 9) | keep, tmp_path / "donor")  # has gone on meanwhile
    trainer.train(branch, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and min(row["step"] for row in rows(tmp_path / "cut")) == 4
    assert saved(tmp_path / "cut", 6) == saved(tmp_path / "whole", 6)


def test_a_branch_may_go_on_with_other_data_from_its_beginning(config, tmp_path):
    trainer.train(config({"name": "constant"}, 3), tmp_path / "donor")
    donor = {"run": str(tmp_path / "donor")}
    other = {"data__seed": 7}
    with pytest.raises(DataError, match="belongs to other data"):
        trainer.train(config({"name": "constant"}, 5, init_from=donor | {"take": "all"}, **other), tmp_path / "all")
    trainer.train(config({"name": "constant"}, 5, init_from=donor | {"take": "optimizer"}, **other), tmp_path / "branch")
    assert [row["step"] for row in rows(tmp_path / "branch", "train")] == [4, 5]
    assert Checkpointer(tmp_path / "branch" / "checkpoints").steps() == [5]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"init_from": {"take": "all"}}, "there is no run to branch off"),
        ({"init_from": {"run": "DONOR", "take": "all", "convert": {"name": "looped"}}}, "is that of the other model"),
        ({"init_from": {"run": "DONOR", "take": "all", "step": 5}}, "would branch off here, but ends at train.steps = 5"),
        ({"init_from": {"run": "DONOR", "take": "all"}, "train": {"steps": 3}}, "it is at step 3, and this run ends at"),
        ({"init_from": {"run": "DONOR", "take": "all", "step": 2}}, "Good steps here: 3"),
        (
            {"init_from": {"run": "DONOR", "take": "all"}, "optimizer": {"direction": {"name": "adamw"}}},
            "does not fit this run",
        ),
        ({"init_from": {"run": "none", "take": "all"}}, "does not exist"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_with_the_reason(config, folder, tmp_path, changes, message):
    if not (folder / "donor").exists():
        trainer.train(config({"name": "constant"}, 3), folder / "donor")
    wanted = config({"name": "constant"}, 5) | json.loads(json.dumps(changes).replace("DONOR", str(folder / "donor")))
    with pytest.raises(ConfigError, match=message):
        trainer.train(wanted, tmp_path / "run")
