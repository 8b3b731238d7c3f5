"""A run: what it writes, and that an interrupted one ends exactly as an uninterrupted one."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import trainer
from strata import ConfigError, DataError, StrataError
from trainer import loop
from trainer.data import python_source
from trainer.data.__main__ import main as data_command
from trainer.metrics import read_metrics


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


class Killed(Exception):
    """Stands for a process that is gone."""


def interrupt_after(monkeypatch, step):
    """Let training die right after it has dispatched `step`, without saving anything."""
    original = loop.Loop._read

    def read(self, pending, *rest, **more):
        if pending and pending[-1].step == step:
            raise Killed
        return original(self, pending, *rest, **more)

    monkeypatch.setattr(loop.Loop, "_read", read)


def test_a_run_writes_what_it_promises(tiny, tmp_path, capsys):
    result = trainer.train(tiny(), tmp_path / "run", origin={"config": "x", "name": "x", "overrides": []})
    run = tmp_path / "run"
    assert result.step == 8 and result.run_dir == run and 0 < result.evaluation["loss"] < math.log(12) + 0.1
    names = {"config.json", "overrides.json", "environment.json", "metrics.jsonl", "status.json", "checkpoints"}
    assert names <= {path.name for path in run.iterdir()}
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    found = read_metrics(run / "metrics.jsonl")
    train_rows = [row for row in found if row["split"] == "train"]
    assert [row["step"] for row in train_rows] == list(range(1, 9))
    assert [row["step"] for row in found if row["split"] == "val"] == [4, 8]
    for row in train_rows:
        assert {"loss", "objective", "grad_norm", "learning_rate", "timing"} <= set(row)
        assert {"tokens_per_second", "mfu", "step_seconds", "compile_seconds"} <= set(row["timing"])
    assert train_rows[0]["loss"] == pytest.approx(math.log(12), rel=1e-6)
    assert train_rows[0]["learning_rate"] == pytest.approx(3e-3 / 2)
    environment = json.loads((run / "environment.json").read_text())
    assert {"python", "packages", "devices", "source", "command_line"} <= set(environment)
    assert "run directory" in capsys.readouterr().out


def test_training_approaches_the_known_optimum(tiny, tmp_path):
    config = tiny(
        train__steps=150, evaluate__every=0, checkpoint__every=0, data__batch_size=16, optimizer__schedule__name="constant"
    )
    result = trainer.train(config, tmp_path / "run")
    optimum = loop.assemble(trainer.config.resolve_config(config)).dataset.optimum
    # The bound holds for the expectation; a sample of 8 x 16 tokens may lie a little below.
    assert optimum * 0.9 < result.evaluation["loss"] < optimum + 0.25


def test_two_runs_of_one_config_are_equal_bit_for_bit(tiny, tmp_path):
    trainer.train(tiny(), tmp_path / "a")
    trainer.train(tiny(), tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and same(final(tmp_path / "a"), final(tmp_path / "b"))


def test_the_seed_changes_parameters_and_data_and_each_alone(tiny, tmp_path):
    losses = {}
    for name, changes in {
        "base": {},
        "both": {"seed": 1},
        "init": {"seed": 1, "data__seed": 0},
        "data": {"data__seed": 1},
    }.items():
        trainer.train(tiny(train__steps=2, **changes), tmp_path / name)
        losses[name] = [row["loss"] for row in rows(tmp_path / name) if row["split"] == "train"][-1]
    assert len(set(losses.values())) == 4


def test_the_data_seed_orders_the_data_and_the_seed_draws_the_parameters_and_both_without_it(tiny, tmp_path):
    found = {}
    for seed, data_seed in ((0, None), (0, 1), (1, None), (1, 0)):
        config = with_source(tiny(seed=seed), "text", tmp_path / "texts")
        config["data"]["seed"] = data_seed
        setup = loop.assemble(trainer.config.resolve_config(config))
        order = setup.dataset.examples.read(range(20))["tokens"].tolist()
        found[seed, data_seed] = jax.device_get(setup.initial_params()), order
    (params, order), (others, another) = found[0, None], found[1, None]
    assert order != another and not same(params, others)
    assert found[0, 1][1] == another and same(found[0, 1][0], params)
    assert found[1, 0][1] == order and same(found[1, 0][0], others)


SOURCES = {
    "bigram": {},
    "recall": {"data": {"name": "recall", "sequence_length": 16, "batch_size": 4, "vocabulary": 17, "pairs": 4}},
    "text": {"data": {"name": "text_files", "sequence_length": 16, "batch_size": 4, "held_out": 0.5}},
    "mixture": {"data": {"name": "mixture", "sequence_length": 16, "batch_size": 4}},
}


def with_source(config, name, directory):
    config = config | SOURCES[name]
    if name in ("text", "mixture"):
        files = {"files": [f"{texts(directory)}/*.txt"], "split": "tail", "held_out": 0.3}
        if name == "text":
            config["data"] = config["data"] | files
        else:
            config["data"] = config["data"] | {"sources": [{"name": "text_files", "weight": w} | files for w in (3, 1)]}
    return config


def texts(directory):
    directory.mkdir(exist_ok=True)
    for i in range(6):
        (directory / f"{i}.txt").write_text("".join(chr(97 + (i * j * j) % 26) for j in range(90)))
    return directory


def pairs(directions=("adamw", "muon")):
    """Every source and every direction by default, every pair of them with `-m slow`."""
    for i, source in enumerate(sorted(SOURCES)):
        for j, direction in enumerate(directions):
            yield pytest.param(source, direction, marks=() if i % 2 == j else pytest.mark.slow)


def assert_cuts_leave_no_trace(config, directory, monkeypatch, steps):
    trainer.train(config, directory / "whole")
    for step in steps:
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            with pytest.raises(Killed):
                trainer.train(config, directory / f"cut{step}")
        trainer.train(config, directory / f"cut{step}")
        assert rows(directory / f"cut{step}") == rows(directory / "whole")
        assert same(final(directory / f"cut{step}"), final(directory / "whole"))


@pytest.mark.parametrize(("source", "direction"), list(pairs()))
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(tiny, tmp_path, monkeypatch, source, direction):
    config = with_source(tiny(optimizer__direction={"name": direction}), source, tmp_path / "texts")
    # before the first checkpoint, between two, after the last
    assert_cuts_leave_no_trace(config, tmp_path, monkeypatch, (1, 5, 7))


@pytest.mark.parametrize(
    ("source", "direction"), [("python_source", "sgd"), ("tokens", "lmo"), ("bigram", "normuon"), ("recall", "optax")]
)
def test_so_does_one_with_any_other_source_and_direction(tiny, tmp_path, monkeypatch, source, direction):
    config = tiny(optimizer__direction={"name": direction})
    if source == "python_source":
        monkeypatch.setattr(python_source, "roots", lambda which: [("standard_library", texts(tmp_path / "texts"))])
        config["data"] = {"name": source, "sequence_length": 16, "batch_size": 4, "held_out": 0.4}
    elif source == "tokens":
        where, shards = texts(tmp_path / "texts"), str(tmp_path / "shards")
        assert data_command(["write", f"{where}/*.txt", "--split", "tail", "--held_out", "0.3", "--out", shards]) == 0
        config["data"] = {"name": source, "sequence_length": 16, "batch_size": 4, "directory": shards}
    else:
        config = with_source(config, source, tmp_path / "texts")
    assert_cuts_leave_no_trace(config, tmp_path, monkeypatch, (5,))


def test_a_run_that_is_interrupted_again_and_again_still_ends_the_same(tiny, tmp_path, monkeypatch):
    trainer.train(tiny(), tmp_path / "whole")
    for step in (2, 5, 5, 8):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            with pytest.raises(Killed):
                trainer.train(tiny(), tmp_path / "cut")
    trainer.train(tiny(), tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and same(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_starting_a_finished_run_again_changes_nothing(tiny, tmp_path, capsys):
    trainer.train(tiny(), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = trainer.train(tiny(), tmp_path / "run")
    assert "finished at step 8: nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before and result.evaluation["loss"] > 0


def test_another_config_is_refused_with_every_difference(tiny, tmp_path):
    trainer.train(tiny(), tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        trainer.train(tiny(model__width=32, seed=4, log__every=2), tmp_path / "run")
    assert "model.width: 16 -> 32" in str(caught.value) and "seed: 0 -> 4" in str(caught.value)
    assert "log.every" not in str(caught.value)


def test_raising_steps_extends_a_run_only_where_no_schedule_depends_on_them(tiny, tmp_path):
    constant = {"optimizer__schedule": {"name": "constant"}}
    trainer.train(tiny(train__steps=5, **constant), tmp_path / "run")
    trainer.train(tiny(train__steps=8, **constant), tmp_path / "run")
    trainer.train(tiny(train__steps=8, **constant), tmp_path / "whole")
    extended = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert extended == [row for row in rows(tmp_path / "whole") if row["split"] == "train"]
    assert same(final(tmp_path / "run"), final(tmp_path / "whole"))
    with pytest.raises(ConfigError, match="not shortened"):
        trainer.train(tiny(train__steps=6, **constant), tmp_path / "run")
    trainer.train(tiny(train__steps=4), tmp_path / "cosine")
    with pytest.raises(ConfigError, match="cosine schedule depends on train.steps"):
        trainer.train(tiny(train__steps=8), tmp_path / "cosine")


def test_an_extended_run_keeps_what_was_evaluated_at_its_end_however_often_it_is_interrupted(tiny, tmp_path, monkeypatch):
    constant = {"optimizer__schedule": {"name": "constant"}}
    trainer.train(tiny(train__steps=4, **constant), tmp_path / "run")
    ended = rows(tmp_path / "run")[-1]
    assert (ended["step"], ended["split"]) == (4, "val")
    for _ in range(2):  # before the first checkpoint of what is new
        with monkeypatch.context() as patch:
            interrupt_after(patch, 6)
            with pytest.raises(Killed):
                trainer.train(tiny(train__steps=9, **constant), tmp_path / "run")
    trainer.train(tiny(train__steps=9, **constant), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if row["split"] == "val"] == [4, 8, 9]
    assert ended in found and [row["step"] for row in found if row["split"] == "train"] == list(range(1, 10))


def test_an_execution_key_may_change_and_is_announced(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Killed):
            trainer.train(tiny(), tmp_path / "run")
    trainer.train(tiny(train__remat="full"), tmp_path / "run")
    assert 'train.remat: "none" -> "full": the run goes on, but not bit for bit' in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["remat"] == "full"


def test_init_from_starts_with_the_weights_of_another_run(tiny, tmp_path):
    trainer.train(tiny(), tmp_path / "donor")
    config = tiny(train__steps=1, optimizer__schedule={"name": "constant"}, init_from__run=str(tmp_path / "donor"))
    trainer.train(config, tmp_path / "heir")
    first = next(row for row in rows(tmp_path / "heir") if row["split"] == "train")
    assert first["loss"] < math.log(12) - 0.05
    with pytest.raises(StrataError, match="does not fit"):
        trainer.train(config | {"model": {"width": 32, "layers": 2, "heads": 2}}, tmp_path / "misfit")
    with pytest.raises(ConfigError, match="does not exist"):
        trainer.train(tiny(init_from__run=str(tmp_path / "none")), tmp_path / "orphan")


def test_load_gives_any_step(tiny, tmp_path):
    trainer.train(tiny(checkpoint__keep_latest=3), tmp_path / "run")
    assert trainer.load(tmp_path / "run").step == 8 and trainer.load(tmp_path / "run", 3).step == 3
    assert not same(trainer.load(tmp_path / "run", 3).params, final(tmp_path / "run"))
    assert trainer.load(tmp_path / "run", np.int64(3)).step == 3
    for step in (4, "4", "3", 3.0, -1, True, "newest"):
        with pytest.raises(
            ConfigError, match=rf"no checkpoint (named )?{step!r}\. Good steps here: 3, 6, 8; names: best, latest\."
        ):
            trainer.load(tmp_path / "run", step)


def test_no_transfer_in_the_loop_is_implicit(tiny, tmp_path):
    with jax.transfer_guard("disallow"):
        trainer.train(tiny(evaluate__every=0, checkpoint__every=0, log__sample_tokens=0), tmp_path / "run")
    assert (tmp_path / "run" / "status.json").exists()


def test_accumulation_changes_nothing_but_rounding(tiny, tmp_path):
    for count in (1, 2, 4):  # the last row is of 4 of the 8 held-out sequences
        trainer.train(tiny(train__accumulation=count, train__steps=3, evaluate__final_batches=1), tmp_path / str(count))
    losses = [[row["loss"] for row in rows(tmp_path / str(count))] for count in (1, 2, 4)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)
    assert {rows(tmp_path / str(count))[-1]["tokens"] for count in (1, 2, 4)} == {4 * 16}


def test_bfloat16_trains_with_float32_parameters(tiny, tmp_path):
    result = trainer.train(tiny(train__precision="bfloat16"), tmp_path / "run")
    assert math.isfinite(result.evaluation["loss"])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(final(tmp_path / "run")))


def test_two_runs_cannot_share_a_directory(tiny, tmp_path):
    from trainer.run_directory import RunDirectory

    with RunDirectory(tmp_path / "run"), pytest.raises(StrataError, match="in use"):
        trainer.train(tiny(), tmp_path / "run")


def test_the_best_checkpoint_never_costs_the_latest(tiny, tmp_path):
    config = tiny(evaluate__every=2, checkpoint__every=2, checkpoint__keep_latest=1, checkpoint__keep_best=1)
    trainer.train(config | {"optimizer": {"direction": {"learning_rate": 3.0}}}, tmp_path / "run")
    best = min((row["loss"], row["step"]) for row in rows(tmp_path / "run") if row["split"] == "val" and row["step"] < 8)
    assert trainer.load(tmp_path / "run").step == 8
    assert trainer.load(tmp_path / "run", "best").step in (best[1], 8)


def test_a_donors_step_is_fixed_by_the_first_start(tiny, tmp_path, monkeypatch):
    constant = {"optimizer__schedule": {"name": "constant"}, "checkpoint__keep_latest": 9}
    trainer.train(tiny(train__steps=4, **constant), tmp_path / "donor")
    heir = tiny(train__steps=3, init_from__run=str(tmp_path / "donor"), **constant)
    trainer.train(heir, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Killed):
            trainer.train(heir, tmp_path / "cut")
    trainer.train(tiny(train__steps=8, **constant), tmp_path / "donor")
    trainer.train(heir, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_run_says_when_its_data_is_not_what_it_was_trained_on(tiny, tmp_path):
    config = with_source(tiny(), "text", tmp_path / "texts")
    trainer.train(config, tmp_path / "run")
    assert trainer.load(tmp_path / "run").data_notes() == []
    (tmp_path / "texts" / "0.txt").write_text("another text of another length " * 9)
    assert "not what the run was trained on" in trainer.load(tmp_path / "run").data_notes()[0]
    trainer.train(config | {"train": {"steps": 4}, "optimizer": {"schedule": {"name": "constant"}}}, tmp_path / "other")
    (tmp_path / "texts" / "0.txt").write_text("a third text " * 30)
    with pytest.raises(DataError, match="belongs to other data"):
        trainer.train(config | {"train": {"steps": 9}, "optimizer": {"schedule": {"name": "constant"}}}, tmp_path / "other")
