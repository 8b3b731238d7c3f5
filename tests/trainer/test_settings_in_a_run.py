"""Settings of what a run leaves behind take effect in the run: traces, kept checkpoints, the config beside them."""

from __future__ import annotations

import contextlib
import json

import pytest

import trainer
from strata import to_tree
from trainer import config as configuration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


@pytest.fixture
def config(tiny):
    kept = {"every": 1, "keep_latest": 1, "keep_every": 3, "keep_best": 0}
    log = {"every": 2, "profile": [7, 9]}  # the run ends before the trace would
    return tiny(seed=5, train__accumulation=2, evaluate__every=0, checkpoint=kept, log=log)


@pytest.fixture
def run(config, folder):
    """The run that all tests look at."""
    if not (folder / "run").exists():
        with open(folder / "said", "w") as said, contextlib.redirect_stderr(said):
            trainer.train(config, folder / "run")
    return folder / "run"


def steps(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def test_every_third_checkpoint_is_kept_beside_the_latest(run):
    assert steps(run) == [3, 6, 8]


def test_a_checkpoint_holds_the_config_of_its_run(run, config):
    expected = json.loads(json.dumps(to_tree(configuration.resolve_config(config))))
    assert expected["seed"] == 5 and expected["train"]["accumulation"] == 2
    for step in steps(run):
        assert json.loads((run / "checkpoints" / str(step) / "host.json").read_text())["config"] == expected


def test_log_profile_leaves_one_trace_also_where_the_run_ends_first(run, folder):
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert "profiler trace of steps 7 to 8 in" in " ".join((folder / "said").read_text().split())
