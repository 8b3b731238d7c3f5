"""Depth strategies in a whole run: losses of exits, regularised sweeps, a teacher, conversion, and how they are reported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import optim
import trainer
from strata import ConfigError, StrataError
from trainer import config as configuration
from trainer import convert, evaluate, generate
from trainer.checkpoint import Checkpointer
from trainer.metrics import read_metrics
from trainer.setup import assemble
from trainer.step import initial_state, train_step

LOOPS = {"name": "recursive", "loops": 2}
SNLP = {"name": "layer_parallel", "layers": 2, "forward": "sequential", "regularizer": 0.5, "stride": 1}


def rows(directory, split):
    return [row for row in read_metrics(Path(directory) / "metrics.jsonl") if row["split"] == split]


def without_timing(directory):
    return [{k: v for k, v in row.items() if k != "timing"} for row in read_metrics(Path(directory) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A finished sequential run of four layers."""
    directory = tmp_path_factory.mktemp("donor") / "run"
    config = {
        "data": {"name": "bigram", "sequence_length": 16, "batch_size": 4, "vocabulary": 12, "validation_examples": 8},
        "model": {"width": 16, "layers": 4, "heads": 2},
        "optimizer": {"direction": {"name": "muon"}, "schedule": {"name": "constant"}},
        "train": {"steps": 12},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 0},
    }
    trainer.train(config, directory)
    return directory


@pytest.mark.parametrize(
    ("exits", "whole"), [("none", 1.0), ("aggressive", 1.1), ("weighted", 1.0)], ids=["none", "aggressive", "weighted"]
)
def test_exit_losses_are_weighed_and_reported(tiny, tmp_path, exits, whole):
    trainer.train(tiny(model__depth=LOOPS | {"exits": exits}, train__steps=2), tmp_path)
    first = rows(tmp_path, "train")[0]
    # A head of zeros makes every loss ln(vocabulary), whatever the loop.
    assert first["loss"] == pytest.approx(math.log(12), rel=1e-5)
    assert first["objective"] == pytest.approx(whole * first["loss"], rel=1e-5)
    last = rows(tmp_path, "val")[-1]
    assert ("loss/loop1" in last) == (exits != "none") and "loss/loop2" not in last
    if exits == "none":
        assert last["loss"] > 0


def test_an_exit_is_what_its_own_evaluation_says(tiny, tmp_path, capsys):
    trainer.train(tiny(model__depth=LOOPS | {"exits": "aggressive", "rank": 2}, train__steps=4), tmp_path)
    capsys.readouterr()
    evaluate.main(["--run", str(tmp_path)])
    both = json.loads(capsys.readouterr().out.splitlines()[-1])
    evaluate.main(["--run", str(tmp_path), "--depth", '{"name": "recursive", "exit": 1}'])
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert one["loss"] == pytest.approx(both["loss/loop1"], rel=1e-6) and "loss/loop1" not in one
    with pytest.raises(ConfigError, match="the model runs its blocks in 2 loops"):
        evaluate.main(["--run", str(tmp_path), "--depth", '{"name": "recursive", "loops": 3}'])


def test_the_regulariser_ramps_from_zero_and_the_sweep_is_reported(tiny, tmp_path):
    trainer.train(tiny(model__depth=SNLP | {"ramp": 1.0}, model__output_init="normal", train__steps=4), tmp_path)
    found = rows(tmp_path, "train")
    extra = [row["objective"] - row["loss"] for row in found]
    assert extra[0] == pytest.approx(0, abs=1e-6) and min(extra[1:]) > 1e-4
    last = rows(tmp_path, "val")[-1]
    assert last["loss/parallel"] > 0 and last["loss/parallel"] != last["loss"]


def test_without_weight_the_regularised_run_is_the_plain_run_bit_for_bit(tiny, tmp_path):
    trainer.train(tiny(train__steps=3), tmp_path / "plain")
    trainer.train(tiny(model__depth=SNLP | {"regularizer": 0.0}, train__steps=3), tmp_path / "zero")
    one, two = (jax.tree.leaves(trainer.load(tmp_path / name).params) for name in ("plain", "zero"))
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one, two, strict=True))
    assert [row["loss"] for row in rows(tmp_path / "plain", "train")] == [
        row["loss"] for row in rows(tmp_path / "zero", "train")
    ]


def test_a_ramp_over_the_run_forbids_extending_it(tiny, tmp_path):
    config = tiny(model__depth=SNLP, optimizer__schedule={"name": "constant"}, train__steps=2)
    trainer.train(config, tmp_path)
    with pytest.raises(ConfigError, match="the layer_parallel depth strategy depends on train.steps"):
        trainer.train(tiny(model__depth=SNLP, optimizer__schedule={"name": "constant"}, train__steps=3), tmp_path)


def test_a_full_rank_conversion_evaluates_like_its_donor_and_trains_on(donor, tmp_path, capsys):
    out = tmp_path / "looped"
    convert.main(["--run", str(donor), "--out", str(out), "--loops", "2", "--rank", "16", "--config.train.steps=3"])
    lost = json.loads(capsys.readouterr().out.splitlines()[-1])["lost"]
    assert max(lost.values()) < 1e-6
    found = []
    for run in (donor, out):
        evaluate.main(["--run", str(run)])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[1]["step"] == 0 and found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    result = trainer.train(json.loads((out / "config.json").read_text()), out)
    assert result.step == 3 and rows(out, "train")[-1]["step"] == 3
    straight = tmp_path / "again"
    convert.main(["--run", str(donor), "--out", str(straight), "--loops", "2", "--rank", "16", "--config.train.steps=3"])
    trainer.train(json.loads((straight / "config.json").read_text()), straight)
    assert without_timing(out) == without_timing(straight)


def test_a_run_can_convert_its_donor_itself(donor, tmp_path):
    convert.main(["--run", str(donor), "--out", str(tmp_path / "two"), "--loops", "2", "--rank", "4", "--config.train.steps=3"])
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    trainer.train(config, tmp_path / "two")
    config["init_from"] = {"run": str(donor), "convert": {"name": "looped", "initial": "average"}}
    trainer.train(config, tmp_path / "one")
    assert without_timing(tmp_path / "one") == without_timing(tmp_path / "two")
    for changes, sentence in [
        ({"init_from": {"convert": {"name": "looped"}}}, "there is no run to convert"),
        ({"model": config["model"] | {"depth": {"name": "sequential"}}}, "model.depth runs every block once"),
        ({"model": config["model"] | {"width": 32}}, "model.width is 16 in the donor and 32"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            trainer.train(config | changes, tmp_path / "wrong")


def test_a_conversion_that_is_cut_short_leaves_nothing_that_trains_from_random_weights(donor, tmp_path, monkeypatch):
    out, arguments = tmp_path / "out", ["--run", str(donor), "--out", str(tmp_path / "out"), "--loops", "2"]

    def full(*_, **__):
        raise StrataError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", full)
        with pytest.raises(StrataError, match="No space left"):
            convert.main(arguments)
    assert not (out / "config.json").exists()
    convert.main(arguments)
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match="holds a run already"):  # its checkpoint is another's
        convert.main(arguments)


def test_conversion_refuses_with_the_reason_and_leaves_nothing(donor, tmp_path):
    def converted(*arguments):
        convert.main(["--run", str(donor), "--out", str(tmp_path / "out"), *arguments])

    for arguments, sentence in [
        (("--loops", "3"), "3 loops do not divide 4 layers"),
        (("--loops", "2", "--rank", "99"), "no matrix of the blocks has rank 99"),
        (("--loops", "2", "--config.model.width=32"), "model.width is 16 in the donor and 32"),
        (("--loops", "2", "--lops=3"), "unknown argument '--lops=3'"),
        (("--to", "lopped"), "registered are looped"),
        (("--to", '{"name": "lopped"}'), "registered are looped"),
        (("--to", '{"name": "looped", "initial": "first"}'), "--to.initial"),
        (
            ("--initial", "average", "--to", '{"name": "looped", "initial": "lower"}'),
            "--initial is average, and --to has .*'lower'",
        ),
        (("--adapters", "zero", "--to", '{"name": "looped", "adapters": "svd"}'), "--adapters is zero, and --to has .*'svd'"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            converted(*arguments)
        assert not (tmp_path / "out").exists()
    for seed in ("-1", "x", str(2**31)):
        with pytest.raises(SystemExit) as exit:
            converted("--seed", seed)
        assert exit.value.code == 2 and not (tmp_path / "out").exists()
    converted("--loops", "2", "--initial", "lower", "--to", '{"name": "looped", "initial": "lower"}')
    with pytest.raises(ConfigError, match="holds a run already"):
        converted("--loops", "2")


def test_a_teacher_adds_its_divergence_and_must_have_the_same_vocabulary(donor, tiny, tmp_path):
    def config(**changes):
        return tiny(model__layers=4, train__steps=2, data__validation_examples=8, **changes)

    trainer.train(config(), tmp_path / "alone")
    trainer.train(config(train__teacher={"run": str(donor), "weight": 2.0}), tmp_path / "taught")
    alone, taught = (rows(tmp_path / name, "train")[0] for name in ("alone", "taught"))
    assert taught["loss"] == alone["loss"]
    # The student starts uniform: its divergence from the teacher is ln(vocabulary) - the teacher's entropy.
    setup = assemble(configuration.resolve_config(config()))
    batch = next(iter(setup.dataset.train(**setup.share(4))))
    logits = trainer.load(donor).model(batch["tokens"], segment_ids=batch["segment_ids"])
    entropy = -np.sum(np.exp(jax.nn.log_softmax(logits)) * jax.nn.log_softmax(logits), -1)
    expected = math.log(12) - np.average(entropy, weights=batch["weights"])
    assert taught["objective"] - taught["loss"] == pytest.approx(2.0 * expected, rel=1e-4)
    with pytest.raises(ConfigError, match="token ids and this model"):
        trainer.train(config(train__teacher={"run": str(donor)}, data__vocabulary=20), tmp_path / "other")
    with pytest.raises(ConfigError, match="train.teacher.run"):
        trainer.train(config(train__teacher={"run": str(tmp_path / "nothing")}), tmp_path / "none")


def test_text_is_generated_in_every_way_and_drafts_are_counted(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "text" / f"{name}.txt").write_text("to be or not to be, that is the question. " * 40)
    config = {
        "data": {
            "name": "text_files",
            "files": [str(tmp_path / "text" / "*.txt")],
            "split": "tail",
            "sequence_length": 32,
            "batch_size": 2,
        },
        "model": {"width": 16, "layers": 4, "heads": 2, "depth": LOOPS | {"exits": "aggressive"}},
        "train": {"steps": 2},
        "evaluate": {"every": 0, "batches": 1, "final_batches": 1},
        "log": {"sample_tokens": 0},
    }
    trainer.train(config, tmp_path / "run")
    capsys.readouterr()
    ways = ['{"name": "recursive", "exit": 1}', '{"name": "recursive", "confidence": 0.5}', '{"name": "sequential"}']
    common = ["--run", str(tmp_path / "run"), "--prompt", "to be", "--tokens", "5"]
    for way in ways:
        assert generate.main([*common, "--depth", way]) == 0
    assert generate.main([*common, "--draft", '{"name": "layer_parallel", "layers": 2}', "--draft_tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("to be") >= 4 and "drafted tokens accepted" in captured.err


def test_layers_below_the_cut_are_frozen_and_the_cut_is_reported(tiny, tmp_path):
    drop = {"direction": {"name": "muon"}, "schedule": {"name": "constant"}, "sampling": {"name": "drop_muon", "buckets": 2}}
    config = tiny(optimizer=drop, train__steps=6, checkpoint={"every": 1, "keep_latest": 6})
    trainer.train(config, tmp_path)
    cuts = [row["cut"] for row in rows(tmp_path, "train")]
    assert set(cuts) == {0, 1}
    # Rows count from step 1, so this is the step before the frozen one: the last, for zero outputs and a zero head
    # leave the first steps without a gradient.
    first = max(i for i, cut in enumerate(cuts) if cut)
    assert first > 1
    before, after = (trainer.load(tmp_path, step=step).params for step in (first, first + 1))
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), before, after)
    assert same["embedding"]["table"] and not same["head_kernel"]
    kernel = ("blocks", "block0", "mixer", "query", "kernel")
    for name in kernel:
        before, after = before[name], after[name]
    assert np.array_equal(before[0], after[0]) and not np.array_equal(before[1], after[1])


def test_noise_by_two_halves_of_a_batch_trains_and_needs_an_even_one(tiny, tmp_path):
    noisy = {
        "direction": {"name": "muon"},
        "schedule": {"name": "constant"},
        "layerwise": {"name": "lanton", "estimator": "independent", "interval": 1},
    }
    trainer.train(tiny(optimizer=noisy, train__steps=2), tmp_path / "noisy")
    plain = {name: part for name, part in noisy.items() if name != "layerwise"}
    trainer.train(tiny(optimizer=plain, train__steps=2), tmp_path / "plain")
    one, two = (rows(tmp_path / name, "train") for name in ("noisy", "plain"))
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-5)
    with pytest.raises(ConfigError, match="give an even number"):
        trainer.train(tiny(optimizer=noisy, data__batch_size=3), tmp_path / "odd")


@pytest.mark.parametrize("depth", [{}, {"name": "recursive", "loops": 2}, {"name": "layer_parallel", "layers": 2}])
def test_the_norm_that_is_logged_is_of_the_layers_that_move(tiny, depth):
    """A frozen block that loops use again has a gradient too, which neither moves nor clips anything."""
    sgd = {"direction": {"name": "sgd", "momentum": 0.0}, "sampling": {"name": "drop_muon", "buckets": 2}, "clip_norm": None}
    changes = {"model__depth": depth} if depth else {}
    setup = assemble(configuration.resolve_config(tiny(optimizer=sgd, model__layers=4, **changes)))
    # Away from the start, where the blocks' last projections are zero.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), setup.initial_params())
    state = initial_state(params, setup.transformation())
    batch = next(setup.dataset.train(**setup.share(setup.config.data.batch_size)))
    rates = {"all": np.float32(0.125)}
    with jax.set_mesh(setup.mesh):
        step = jax.jit(train_step(setup.graph, setup.transformation(), setup.config.train, None, cut=setup.cuts.first[-1]))
        after, metrics = step(state, batch, rates)
    applied = jax.tree.map(lambda new, old: (new - old) / -0.125, after["params"], params)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optim.global_norm(applied)), rel=1e-4)
