"""The worked example in CONTRIBUTING.md runs as it stands."""

import json
import os
import re
import subprocess
import sys

import pytest


@pytest.fixture
def example(root, tmp_path):
    """The Python blocks of CONTRIBUTING.md, written where a user would put them."""
    for name in ("my_norm", "my_growth"):
        code = re.search(rf"```python\n# {name}\.py\n(.*?)```", (root / "CONTRIBUTING.md").read_text(), re.S).group(1)
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "small.py").write_text(
        "def get_config(arg=''):\n"
        "    return dict(plugins=['my_norm'], data=dict(name='bigram', sequence_length=8, batch_size=2, vocabulary=8),\n"
        "                model=dict(width=8, layers=2, heads=1, norm=dict(name='seednorm')), train=dict(steps=3),\n"
        "                optimizer=dict(schedule=dict(name='constant')))\n"
    )
    return tmp_path


@pytest.fixture
def command(root, example):
    """`command(module, *arguments)` run where the user's files are."""

    def run(module, *arguments):
        environment = os.environ | {"PYTHONPATH": f"{example}:{root}"}
        words = [sys.executable, "-m", module, *arguments]
        return subprocess.run(words, cwd=example, env=environment, capture_output=True, text=True)

    return run


def test_the_worked_examples_run_by_their_own_names_and_are_checked_like_any_part(example, command):
    done = command("trainer", "--config", "small.py", "--workdir", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((example / "run" / "config.json").read_text())["model"]["norm"] == {
        "alpha": 1.0,
        "epsilon": 1e-6,
        "name": "seednorm",
    }
    wrong = command("trainer", "--config", "small.py", "--config.model.norm.alpha=0", "--config.model.norm.bate=1")
    assert wrong.returncode == 2 and "model.norm.alpha" in wrong.stderr and "model.norm.bate" in wrong.stderr
    plugins = '--config.plugins=["my_norm", "my_growth"]'
    grow = ("trainer.convert", "--run", "run", "--out", "deep", "--to", "repeated", plugins)
    wrong = command(*grow, "--config.model.layers=3")
    assert wrong.returncode == 2 and "2 layers do not divide 3" in wrong.stderr
    wrong = command(*grow, "--loops", "2")
    assert wrong.returncode == 2 and "--loops belong to the conversion looped" in wrong.stderr
    done = command(*grow, "--config.model.layers=4")
    assert done.returncode == 0, done.stderr
    done = command("trainer", "--config", "deep/config.json", "--workdir", "deep")
    assert done.returncode == 0 and "step 3/3" in done.stderr, done.stderr
