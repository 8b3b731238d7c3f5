"""Run directories with planted numbers, without training anything."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from trainer.metrics.jsonl import MetricsWriter
from trainer.report.analysis import analyse
from trainer.report.cli import main
from trainer.report.reading import of_plan
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, Scale
from trainer.sweep.place import Place
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import Source, read

ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"jax": "0.10.2", "numpy": "2.4.6"},
    "devices": {"platform": "cpu", "kind": "cpu", "count": 1},
    "cpus": 2,
    "source": {"revision": "a" * 40, "diff": "", "untracked": []},
}

FILE = '''
"""A planted experiment."""
from trainer.sweep import *


def get_experiment():
    return Experiment(
        name="planted",
        question="Is b better than a?",
        config="small.py",
        arms=[Arm("a"), Arm("b", {"optimizer.direction.learning_rate": 0.5}, control="nothing <b>bold</b>")],
        scales={"smoke": Scale(seeds=5, note="planted numbers")},
        claims=[
            Claim(
                statement="b beats a & more",
                source="arXiv:0000.00000 [made up]",
                arm="b",
                against="a",
                rule=Rule(effect=0.5),
                paper_effect=0.4,
                paper_setting="1 B parameters, 20 B tokens",
            )
        ],
    )
'''

CONFIG = """
def get_config(arg=""):
    return dict(
        data=dict(name="bigram", sequence_length=8, batch_size=4, vocabulary=8, validation_examples=8),
        model=dict(width=8, layers=2, heads=1),
        optimizer=dict(direction=dict(name="adamw", learning_rate=1e-2), schedule=dict(name="cosine", warmup=1)),
        train=dict(steps=10),
    )
"""


def experiment(**changes):
    """Two arms, five seeds, one claim."""
    claim = Claim(statement="b beats a", source="[made up]", arm="b", against="a", rule=Rule(effect=0.5), paper_effect=0.4)
    given = dict(
        name="planted",
        config="small.py",
        arms=[Arm("a"), Arm("b", {"optimizer.direction.learning_rate": 0.5})],
        scales={"smoke": Scale(seeds=5)},
        claims=[claim],
        metric=Metric("loss", unit="nats"),
    )
    return Experiment(**{**given, **changes})


class Planted:
    """The directory of runs of an experiment whose runs are written, not made."""

    better = {"a": [2.0, 2.1, 1.9, 2.05, 1.95], "b": [1.0, 1.2, 0.9, 1.0, 0.97]}
    """Final losses by arm and seed: b is better by far."""

    def __init__(self, root: Path):
        (root / "small.py").write_text(CONFIG)
        (root / "planted.py").write_text(FILE)
        self.root = root
        self.place = Place(root / "runs", "planted-smoke")

    def plan(self, found: Experiment | None = None, scale: str = "smoke"):
        """Of an experiment; without one that of the file."""
        source = Source(found, Path("planted.py"), "") if found else read("planted.py")
        return make_plan(source, scale, score=self.place.score(source.experiment.metric), runs_at=self.place.runs)

    def write(self, run, losses, *, state="finished", environment=None, message="", arrays=False):
        """A run directory with one val and one train row a step."""
        directory = self.place.directory(run)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(run.config)
        (directory / "environment.json").write_text(json.dumps(environment or ENVIRONMENT))
        with MetricsWriter(directory / "metrics.jsonl") as metrics:
            metrics.truncate(0)
            for step, loss in enumerate(losses, start=1):
                layers = {"grad_norm_by_layer": [loss, 2 * loss, None]} if arrays else {}
                metrics.write({"step": step, "split": "train", "loss": loss, **layers, "timing": {"step_seconds": 0.5}})
                metrics.write({"step": step, "split": "val", "loss": loss, "accuracy": 1 / (1 + abs(loss))})
        step = run.steps if state == "finished" else len(losses)
        (directory / "status.json").write_text(json.dumps({"state": state, "step": step, "message": message}))
        return directory

    def write_all(self, finals, found=None, **rest):
        """Every run of a plan ends at `finals[arm][seed]`, from 4.0 on."""
        plan = self.plan(found)
        for run in plan.runs:
            end = finals[run.arm][run.seed]
            self.write(run, [4.0, (4.0 + end) / 2, end], **rest)
        self.place.write_plan(plan)
        return plan

    def report(self, plan):
        """Of the runs of a plan that were written so far."""
        return analyse(of_plan(plan, self.place))


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """See `Planted`; the test runs in its directory."""
    monkeypatch.chdir(tmp_path)
    return Planted(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of the planted experiment, with curves and numbers over layers; made once for all tests of a file."""
    root, drawn = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    with contextlib.chdir(root):
        planted = Planted(root)
        plan = planted.plan()
        for run in plan.runs:
            end = (2.0 if run.arm == "a" else 1.5) + drawn.normal(0, 0.05)
            planted.write(run, [4.0 * 0.8**k + end for k in range(10)], arrays=True)
        planted.place.write_plan(plan)
        assert main(["planted.py", "--scale", "smoke", "--out", "out"]) == 0
    return root / "out"


@pytest.fixture
def make_experiment():
    """`experiment`."""
    return experiment
