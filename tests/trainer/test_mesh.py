"""Every mesh computes the same run: parameters, losses, checkpoints. Eight virtual devices, in processes of their own."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import trainer
from strata import ConfigError
from trainer import loop
from trainer.checkpoint import Checkpointer
from trainer.metrics import read_metrics
from trainer.setup import Setup

ROOT = Path(__file__).resolve().parents[2]
AXES = ("data", "fsdp", "tensor")

Case = tuple[tuple[int, int, int], str, int]  # mesh, direction, accumulation

ONE = (1, 1, 1)
USUAL: list[Case] = [
    (ONE, "adamw", 1),
    ((8, 1, 1), "adamw", 1),
    ((1, 8, 1), "adamw", 1),
    ((1, 1, 8), "adamw", 1),
    ((2, 2, 2), "adamw", 1),
    ((-1, 1, 1), "adamw", 1),
    ((1, 2, 1), "adamw", 1),
    ((4, 2, 1), "adamw", 2),
    (ONE, "muon", 1),
    ((2, 1, 4), "muon", 1),
    ((2, 2, 2), "muon", 1),  # whose devices share out the matrices
]
LAYERED: list[Case] = [(ONE, "layered", 1), ((2, 2, 2), "layered", 2)]
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) <= 8]
EVERY: list[Case] = [(shape, direction, count) for direction in ("adamw", "muon") for count in (1, 2) for shape in SHAPES]
STEPS, SAVED = 6, 4
LAYERED_RECIPE = {  # every part of an optimizer that keeps something of its own for each layer
    "direction": {
        "name": "muon",
        "newton_schulz": {"name": "measured", "every": 1, "choose_at": 2, "candidates": ["jordan2", "jordan5"]},
    },
    "layerwise": {"name": "lanton", "interval": 1},
    "sampling": {"name": "drop_muon", "buckets": 2},
    "schedule": {"name": "wsd_s", "budgets": [SAVED, STEPS], "decay": 0.5, "decay_of": "cycle"},
}


def config(case: Case, steps: int = STEPS) -> dict[str, Any]:
    """A run whose every kind of axis divides by eight; a constant schedule, so that it can be extended."""
    mesh, direction, accumulation = case
    plain = {"direction": {"name": direction}, "schedule": {"name": "constant"}}
    return {
        "data": {"name": "bigram", "sequence_length": 16, "batch_size": 16, "vocabulary": 16, "validation_examples": 16},
        "model": {"width": 16, "layers": 2, "heads": 8, "ffn": {"hidden": 32}, "depth": {"unroll": False}},
        "optimizer": LAYERED_RECIPE if direction == "layered" else plain,
        "train": {"steps": steps, "accumulation": accumulation},
        "evaluate": {"every": 0},
        "checkpoint": {"every": 0},
        "log": {"every": 1},
        "mesh": dict(zip(AXES, mesh, strict=True)),
    }


def named(case: Case) -> str:
    mesh, direction, accumulation = case
    return f"{direction}-{accumulation}-{'x'.join(map(str, mesh))}"


# ---- what runs on eight devices


def bits(tree: Any) -> str:
    """A hash of every leaf's bytes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def held(tree: Any) -> dict[str, int]:
    """Bytes on each device by its id."""
    found: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            found[str(shard.device.id)] = found.get(str(shard.device.id), 0) + shard.data.nbytes
    return found


def observe(patched: dict[str, Any]) -> None:
    """Let every run leave in `patched` the bits of its first parameters and the layout of its last state."""
    build, end = Setup.initial_params, loop.conclude

    def initial_params(self: Setup) -> Any:
        params = build(self)
        patched["initial"] = bits(params)
        return params

    def conclude(run: Any, state: Any, *rest: Any) -> None:
        patched["final"] = bits(state["params"])
        patched.update({name: held(state[name]) for name in ("params", "optimizer")})
        end(run, state, *rest)

    Setup.initial_params, loop.conclude = initial_params, conclude


def run_cases(directory: Path, cases: list[Case]) -> None:
    """Train each case, write what was seen, and stop one run early for others to go on from."""
    seen: dict[str, Any] = {}
    observe(now := {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", lambda *args, **rest: None)  # the layout of a file is another claim
        for case in cases:
            now.clear()
            trainer.train(config(case), directory / named(case))
            seen[named(case)] = dict(now)
    stopped = {"eight": ((2, 2, 2), "adamw", 1), "split": ((1, 8, 1), "adamw", 1)} if cases is not LAYERED else {}
    for name, case in stopped.items():
        now.clear()
        trainer.train(config(case, SAVED), directory / name)
        seen[name] = dict(now)
    for steps in (SAVED, STEPS) if cases is LAYERED else ():  # to its first budget, and on from what was saved there
        now.clear()
        trainer.train(config(LAYERED[1], steps), directory / "resumed")
        seen["resumed"] = dict(now)
    (directory / "seen.json").write_text(json.dumps(seen))


def go_on_with_four(directory: Path) -> None:
    """What four devices make of the checkpoints that eight wrote."""
    assert jax.device_count() == 4
    seen = {"loaded": bits(trainer.load(directory / "eight").params)}
    observe(now := {})
    trainer.train(config(((1, 4, 1), "adamw", 1)), directory / "four")
    seen["final"] = now
    (directory / "four.json").write_text(json.dumps(seen))


def child(devices: int, *arguments: str, flags: str | None = None) -> None:
    flags = os.environ["XLA_FLAGS"] if flags is None else flags
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    what, work = sys.argv[1], Path(sys.argv[2])
    if what == "four":
        go_on_with_four(work)
    else:
        run_cases(work, {"usual": USUAL, "every": EVERY, "layered": LAYERED}[what])


# ---- what is claimed of it


def ran(directory: Path, which: str, flags: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Trains in a process of eight devices; gives the directory of the runs, and what was seen of each."""
    child(8, which, str(directory), flags=flags)
    return directory, json.loads((directory / "seen.json").read_text())


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The usual cases."""
    return ran(tmp_path_factory.mktemp("meshes"), "usual")


def curve(directory: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(directory / "metrics.jsonl") if row["split"] == "train"]


def check_curves(directory: Path, seen: dict[str, Any], cases: list[Case]) -> None:
    for mesh, direction, accumulation in cases:
        single = curve(directory / named((ONE, direction, 1)))
        assert len(single) == STEPS and single[-1] < single[0]
        found = curve(directory / named((mesh, direction, accumulation)))
        np.testing.assert_allclose(found, single, rtol=1e-5, err_msg=str((mesh, direction, accumulation)))
    assert len({seen[named(case)]["initial"] for case in cases}) == 1


def test_a_mesh_changes_neither_the_loss_curve_nor_one_bit_of_the_initial_parameters(usual):
    check_curves(*usual, USUAL)


@pytest.mark.slow
def test_a_layered_recipe_is_the_same_run_on_a_mesh_with_micro_batches_and_resumes_there_bit_for_bit(tmp_path):
    directory, seen = ran(tmp_path, "layered")
    check_curves(directory, seen, LAYERED)
    assert seen["resumed"]["final"] == seen[named(LAYERED[1])]["final"]
    assert curve(directory / "resumed") == curve(directory / named(LAYERED[1]))


@pytest.mark.slow
def test_no_shape_of_up_to_eight_devices_changes_the_run(tmp_path):
    check_curves(*ran(tmp_path, "every", flags=""), EVERY)


def test_held_out_loss_does_not_depend_on_the_mesh(usual):
    directory, _ = usual
    losses = {}
    for mesh, direction, accumulation in USUAL:
        row = read_metrics(directory / named((mesh, direction, accumulation)) / "metrics.jsonl")[-1]
        assert row["split"] == "val"
        losses.setdefault(direction, []).append(row["loss"])
    for found in losses.values():
        np.testing.assert_allclose(found, found[0], rtol=1e-5)


def test_a_mesh_of_ones_uses_one_device_and_an_open_axis_all(usual):
    _, seen = usual
    assert list(seen[named((ONE, "adamw", 1))]["params"]) == ["0"]
    assert len(seen[named(((-1, 1, 1), "adamw", 1))]["params"]) == 8
    assert len(seen[named(((1, 2, 1), "adamw", 1))]["params"]) == 2


@pytest.mark.parametrize("direction", ["adamw", "muon"])
@pytest.mark.parametrize("part", ["params", "optimizer"])
def test_parameters_and_optimizer_state_are_split_over_fsdp_and_tensor(usual, direction, part):
    _, seen = usual
    whole = seen[named((ONE, direction, 1))][part]["0"]
    split = {"adamw": [(1, 8, 1), (1, 1, 8), (2, 2, 2)], "muon": [(2, 1, 4)]}[direction]
    for mesh in split:
        shares = seen[named((mesh, direction, 1))][part]
        assert len(shares) == 8 and max(shares.values()) == min(shares.values())
        # Norm gains, and axes that a mesh does not name, are on every device.
        assert shares["0"] < whole / (mesh[1] * mesh[2]) * 1.35, mesh
    if direction == "adamw":
        assert set(seen[named(((8, 1, 1), "adamw", 1))][part].values()) == {whole}, "data-parallel devices hold everything"


def test_a_checkpoint_of_eight_devices_opens_on_one(usual):
    directory, seen = usual
    assert jax.device_count() == 1
    for name in ("eight", "split"):
        run = trainer.load(directory / name)
        assert run.step == SAVED and bits(run.params) == seen[name]["final"]
        assert any("mesh" in note for note in run.notes)


def test_training_goes_on_from_eight_devices_on_one_and_on_four(usual, tmp_path, capsys):
    directory, seen = usual
    whole = curve(directory / named((ONE, "adamw", 1)))
    shutil.copytree(directory / "split", directory / "four")
    child(4, "four", str(directory))
    four = json.loads((directory / "four.json").read_text())
    assert four["loaded"] == seen["eight"]["final"] and len(four["final"]["params"]) == 4
    np.testing.assert_allclose(curve(directory / "four"), whole, rtol=1e-5)
    assert curve(directory / "four")[:SAVED] == curve(directory / "split")

    trainer.train(config((ONE, "adamw", 1)), directory / "eight")
    np.testing.assert_allclose(curve(directory / "eight"), whole, rtol=1e-5)
    said = capsys.readouterr().err
    assert "mesh.data: 2 -> 1" in said and "not bit for bit" in said


@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 4, 1), (2, 2, 4), (-1, 2, 1)])
def test_a_mesh_that_needs_more_devices_than_there_are_is_one_sentence(mesh, tmp_path):
    with pytest.raises(ConfigError, match="mesh.*devices") as caught:
        trainer.train(config((mesh, "adamw", 1)), tmp_path / "run")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()
