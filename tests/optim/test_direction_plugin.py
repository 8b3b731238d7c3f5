"""An optimizer of one's own is one file: options with a register line, a rule, and a transformation with its state."""

from __future__ import annotations

import importlib
import json
import sys

import jax
import numpy as np
import pytest

import optim
import trainer
from strata import ConfigError, registry

PLUGIN = '''
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim.options import ROLES
from optim.rules import Rule
from strata import option, options, register


@register("optimizer.direction", "signum_for_test", implementation="signum_for_test:rules")
@options
class Signum:
    """The sign of the momentum (Bernstein et al. 2018, arXiv:1802.04434)."""

    learning_rate: float = option(1e-2, "peak rate", least=0)
    momentum: float = option(0.9, "decay of the momentum", least=0, below=1)
    weight_decay: float = option(0.0, "decoupled, times the rate", least=0)


def rules(chosen, *, roles=ROLES, name="all"):
    direction = lambda parameters: scale_by_signum(chosen.momentum)
    decay = {"weight_decay": chosen.weight_decay, "decay_roles": ("matrix",)}
    return (Rule(name=name, roles=roles, direction=direction, learning_rate=chosen.learning_rate, **decay),)


class SignumState(NamedTuple):
    momentum: dict[str, jax.Array]  # by path, shaped as the parameters


def scale_by_signum(momentum):
    def init(params):
        return SignumState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        m = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, gradients)
        return jax.tree.map(jnp.sign, m), SignumState(m)

    return optax.GradientTransformation(init, update)
'''
CHOSEN = {"name": "signum_for_test", "learning_rate": 0.125, "momentum": 0.5, "weight_decay": 0.25}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The file, where Python finds it; what it registers is forgotten after the test."""
    kind = "optimizer.direction"
    monkeypatch.setitem(registry._components, kind, dict(registry._components[kind]))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "signum_for_test.py").write_text(PLUGIN)
    yield "signum_for_test"
    sys.modules.pop("signum_for_test", None)


def test_a_direction_of_ones_own_is_built_by_its_name_and_updates_by_its_equation(plugin, model, params, gradients):
    importlib.import_module(plugin)
    tx = optim.build({"direction": CHOSEN, "schedule": {"name": "constant"}, "clip_norm": None}, model)
    state, momentum = tx.init(params), jax.tree.map(np.zeros_like, params)
    for k in (1, 2):
        moved, state = tx.update(gradients(k), state, params)
        momentum = jax.tree.map(lambda m, g: 0.5 * m + 0.5 * np.asarray(g), momentum, gradients(k))
    expected = jax.tree.map(lambda m: -0.125 * np.sign(m), momentum)
    for name in ("query", "up", "down"):  # the matrices, which are decayed
        expected["blocks"][name] = expected["blocks"][name] - 0.125 * 0.25 * np.asarray(params["blocks"][name])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), moved, expected)
    kept = state.directions["all"]
    assert type(kept).__name__ == "SignumState" and set(kept.momentum) >= {"embedding", "blocks.query", "head"}


def test_a_direction_of_ones_own_can_be_the_rest_of_muon(plugin, model):
    importlib.import_module(plugin)
    rows = optim.assignment({"direction": {"name": "muon", "rest": CHOSEN}, "schedule": {"name": "constant"}}, model)
    assert {row.role for row in rows if row.rule == "matrix"} == {"matrix"}
    assert {row.learning_rate for row in rows if row.rule != "matrix"} == {0.125}


def test_a_run_with_the_plugin_trains_resumes_and_checks_its_options(plugin, tmp_path, capsys):
    config = {
        "plugins": [plugin],
        "data": {"name": "bigram", "sequence_length": 8, "batch_size": 2, "vocabulary": 8, "validation_examples": 2},
        "model": {"width": 8, "layers": 2, "heads": 1},
        "optimizer": {"direction": CHOSEN, "schedule": {"name": "constant"}},
        "train": {"steps": 1},
        "log": {"every": 1},
    }
    trainer.train(config, tmp_path / "run")
    trainer.train(config | {"train": {"steps": 2}}, tmp_path / "run")
    assert "resuming   after step 1 of 2" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows if row["split"] == "train"] == [0.125, 0.125]
    direction = json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]["direction"]
    assert direction == CHOSEN
    with pytest.raises(ConfigError, match=r"optimizer\.direction\.momentum"):
        trainer.train(config | {"optimizer": {"direction": CHOSEN | {"momentum": 1.0}}}, tmp_path / "other")
