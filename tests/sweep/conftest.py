"""Sweeps over a config that trains in well under a second, and runs that are acted by a script without JAX."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.sweep import Arm, Experiment, Scale
from trainer.sweep.display import Display
from trainer.sweep.launcher import Launcher
from trainer.sweep.place import Place
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import Source
from trainer.sweep.slots import Slot

ROOT = Path(__file__).resolve().parents[2]
ACTOR = Path(__file__).with_name("actor.py")

CONFIG = """
def get_config(arg=""):
    return dict(
        data=dict(name="bigram", sequence_length=8, batch_size=4, vocabulary=8, validation_examples=8),
        model=dict(width=8, layers=2, heads=1),
        optimizer=dict(direction=dict(name="adamw", learning_rate=1e-2), schedule=dict(name="cosine", warmup=1)),
        train=dict(steps=int(arg or 3)),
        evaluate=dict(every=1, batches=1),
        checkpoint=dict(every=1),
        log=dict(every=1),
    )
"""

EXPERIMENT = """
from trainer.sweep import *


def get_experiment():
    return Experiment(
        name="small",
        question="Which rate?",
        config="small.py",
        arms=[
            Arm("low", {"optimizer.direction.learning_rate": 1e-3}),
            Arm("high", {"optimizer.direction.learning_rate": 1e-1}),
        ],
        scales={"smoke": Scale(seeds=2, minutes=0.1)},
        claims=[Claim(statement="high is better", source="[made up]", arm="high", against="low", rule=Rule())],
    )
"""


RATE = "optimizer.direction.learning_rate"


class Sweep:
    """One experiment of two arms and two seeds, launched as often as a test likes."""

    def __init__(self, arms=None):
        arms = arms or [Arm("low", {RATE: 1e-3}), Arm("high", {RATE: 1e-1})]
        self.experiment = Experiment(name="acted", config="small.py:8", arms=arms, scales={"smoke": Scale(seeds=2)})
        self.place = Place("runs", "acted-smoke")
        self.output = io.StringIO()

    def plan(self):
        source = Source(self.experiment, Path("experiment.py"), "")
        return make_plan(source, "smoke", score=self.place.score(self.experiment.metric))

    def script(self, arm, seed, words):
        run = next(run for run in self.plan().runs if run.arm == arm and run.seed == seed)
        self.place.runs.mkdir(exist_ok=True)
        (self.place.runs / f"{run.directory}.script").write_text(words)
        return run

    def launch(self, slots=1, **rest):
        launcher = Launcher(self.place, [Slot(i) for i in range(slots)], Display(self.place, self.output), **rest)
        return launcher.run(self.plan(), self.plan)

    def ends(self):
        return [(row["arm"], row["seed"], row["outcome"]) for row in self.place.ledger.rows() if row["event"] == "end"]

    def starts(self):
        return [(row["arm"], row["seed"]) for row in self.place.ledger.rows() if row["event"] == "start"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory of a user's own with a config and an experiment in it; the test runs there."""
    (tmp_path / "small.py").write_text(CONFIG)
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def acted(place, monkeypatch):
    """The same, where launchers start `actor.py` in place of the trainer."""

    def command(self, run):
        config = self.path / "configs" / run.directory / "config.json"
        return [sys.executable, str(ACTOR), str(config), str(self.directory(run))]

    monkeypatch.setattr(Place, "command", command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return place


@pytest.fixture
def begin():
    """A function that starts a command of this repository; whatever it leaves running is killed after the test."""
    children = []

    def start(*arguments, module="trainer.sweep", cwd=".", **variables):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(cwd).resolve())])} | variables
        child = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


@pytest.fixture
def command(begin):
    """A function from arguments to exit code, standard output and standard error."""

    def run(*arguments, timeout=240, **rest):
        child = begin(*arguments, **rest)
        out, err = child.communicate(timeout=timeout)
        assert "Traceback" not in out + err, out + err
        return child.returncode, out, err

    return run


@pytest.fixture
def children():
    """A function from the number of a process to those of the processes that it has started."""

    def find(pid):
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(stat.parent.name))
        return found

    return find
