"""Depth diagnostics in a run: they touch no bit of training, are resumed, the same on every mesh, registered and named."""

import copy
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import trainer
from strata import ConfigError, registry
from trainer import config as configuration
from trainer import diff, loop
from trainer.diagnostics.measure import Diagnosis
from trainer.diagnostics.options import KIND, Diagnostics, diagnostic
from trainer.diagnostics.pictures import leaves
from trainer.metrics import read_metrics
from trainer.metrics.jsonl import scalars
from trainer.setup import assemble

EVERY = tuple(Diagnostics().chosen)

# ---- in a run


def rows(directory, splits):
    found = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "timing"} for row in found if row["split"] in splits]


def same(one, two):
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, two)
    return all(jax.tree.leaves(equal))


class Killed(Exception):
    pass


def test_training_is_bit_identical_with_and_without_and_a_resumed_run_has_the_same_rows(tiny, tmp_path, monkeypatch, capsys):
    config = tiny(optimizer__direction={"name": "muon"}, diagnostics__every=2, train__steps=7)
    trainer.train(config | {"diagnostics": {"every": 0}}, tmp_path / "without")
    trainer.train(config, tmp_path / "with")
    assert rows(tmp_path / "with", ("train", "val")) == rows(tmp_path / "without", ("train", "val"))
    assert same(trainer.load(tmp_path / "with").params, trainer.load(tmp_path / "without").params)
    found = rows(tmp_path / "with", ("diagnostics",))
    assert [row["step"] for row in found] == [2, 4, 6] and rows(tmp_path / "without", ("diagnostics",)) == []
    assert set(found[0]) == {"step", "split", *EVERY} - {"loop_change", "multipliers", "newton_schulz"}

    read, killed = loop.Loop._read, []

    def read_until(self, pending, *rest, **more):
        if pending and pending[-1].step == 5 and not killed:
            killed.append(True)
            raise Killed
        return read(self, pending, *rest, **more)

    monkeypatch.setattr(loop.Loop, "_read", read_until)
    with pytest.raises(Killed):
        trainer.train(config, tmp_path / "resumed")
    trainer.train(config, tmp_path / "resumed")
    every = ("train", "val", "diagnostics")
    assert rows(tmp_path / "resumed", every) == rows(tmp_path / "with", every)

    # Strict JSON of numbers, null and lists; the mirrors get only the numbers that stand alone; `diff` can show it.
    for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        if row["split"] == "diagnostics":
            assert '"NaN"' not in line and '"Infinity"' not in line
            names = set(scalars(row)) - {f"timing/diagnostics/{name}" for name in row["timing"]}
            assert names == {
                "diagnostics/cosine/effective_depth", "diagnostics/logit_lens/effective_depth",
                "diagnostics/gradient_norm/variation", "diagnostics/stream/growth",
            }  # fmt: skip
    capsys.readouterr()
    assert diff.main([str(tmp_path / "with"), str(tmp_path / "without")]) == 0
    assert "diagnostics.contribution" in capsys.readouterr().out


def test_a_diagnostic_is_one_function_and_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(registry._components, KIND, dict(registry._components[KIND]))
    (tmp_path / "gains_plugin.py").write_text(
        "import jax.numpy as jnp\n"
        "from trainer.diagnostics.options import diagnostic\n"
        'diagnostic("norm_gain", "gains_plugin:norm_gain")\n\n\n'
        "def norm_gain(trace):\n"
        '    gains = {path: w for path, w in trace.weights.items() if "norm" in path and path.startswith("blocks.")}\n'
        "    return trace.per_layer({path: jnp.mean(w, axis=-1) for path, w in gains.items()})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = configuration.resolve_config(tiny(plugins=["gains_plugin"], diagnostics__names=["norm_gain"]))
    setup = assemble(config)
    state = {"params": setup.initial_params(), "optimizer": ()}
    row = Diagnosis(setup).row(state)
    assert row["norm_gain"]["placement.mixer_norm.scale"] == [1.0, 1.0]


def test_diagnostics_are_those_of_the_float32_model_whatever_the_run_computes_with(tiny):
    graphs = [
        Diagnosis(assemble(configuration.resolve_config(tiny(**fields))))._graph
        for fields in ({}, {"train__precision": "bfloat16", "train__remat": "full", "model__depth": {"unroll": True}},
                       {"model__mixer": {"name": "attention", "implementation": "xla"}})
    ]  # fmt: skip
    assert graphs[0] == graphs[1] == graphs[2]


MESHES = """
import json, sys
import jax
from trainer import config as configuration
from trainer.diagnostics.measure import Diagnosis
from trainer.setup import assemble

rows = []
for mesh in ({}, {"data": 2, "tensor": 2}, {"fsdp": 2, "data": 2}):
    setup = assemble(configuration.resolve_config(json.loads(sys.argv[1]) | {"mesh": mesh}))
    with jax.set_mesh(setup.mesh):
        rows.append(Diagnosis(setup).row(setup.initial_state(setup.initial_params())))
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_every_mesh_measures_the_same(tiny, root):
    config = tiny(model__output_init="normal", model__head_std=0.3, diagnostics__sequences=3)  # 3 do not divide over a mesh
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", MESHES, json.dumps(config)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = json.loads(done.stdout.splitlines()[-1])
    for other in others:
        for (path, a), (_, b) in zip(*(leaves(row) for row in (one, other)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6, err_msg=".".join(path))


# ---- the config


def test_an_unknown_name_is_refused_with_the_known_ones(tiny):
    with pytest.raises(ConfigError) as error:
        configuration.resolve_config(tiny(diagnostics__names=["stream", "angular"]))
    assert "diagnostics.names" in str(error.value) and "did you mean angular_distance" in str(error.value)
    assert all(name in str(error.value) for name in EVERY)
    with pytest.raises(ConfigError, match="diagnostics.every = 0 turns them off"):
        configuration.resolve_config(tiny(diagnostics__names=[]))


def test_diagnostics_change_no_run_id_and_no_resume(tiny):
    plain_config = configuration.resolve_config(tiny())
    tree = copy.deepcopy(tiny()) | {"diagnostics": {"every": 3, "names": ["stream"], "sequences": 2, "skip_positions": 0}}
    other = configuration.resolve_config(tree)
    assert configuration.run_id(plain_config) == configuration.run_id(other)
    assert {difference.key for difference in configuration.compare(plain_config, other)} == {"cosmetic"}


def test_a_registered_name_is_taken_once(monkeypatch):
    monkeypatch.setitem(registry._components, KIND, dict(registry._components[KIND]))
    diagnostic("fresh", "somewhere:fresh")
    assert "fresh" in Diagnostics().chosen and Diagnostics(names=("stream", "stream")).chosen == ("stream",)
