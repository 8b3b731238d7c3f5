"""What a run needs and cannot reach: its checkpoints, its config, its console. It never begins anew, or under another config,
without a word; and nobody has to be watching."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from strata import ConfigError, StrataError
from trainer import loop
from trainer.metrics import read_metrics
from trainer.metrics.console import Console

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cut(tiny, tmp_path, monkeypatch):
    """A run of 8 steps that was killed after step 6 was saved."""
    with monkeypatch.context() as patch:
        original = loop.Loop._save

        def save(self, state, step, *rest, **named):
            if step == 8:
                self.checkpointer.wait()
                raise KeyboardInterrupt
            return original(self, state, step, *rest, **named)

        patch.setattr(loop.Loop, "_save", save)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(tiny(), tmp_path / "run")
    (tmp_path / "run" / "status.json").write_text(json.dumps({"state": "running", "step": 6, "message": ""}))
    return tmp_path / "run"


def move(checkpoints: Path) -> None:
    checkpoints.rename(checkpoints.with_name("elsewhere"))


def unmount(checkpoints: Path) -> None:
    move(checkpoints)
    checkpoints.symlink_to(checkpoints.with_name("nowhere"))


def empty(checkpoints: Path) -> None:
    move(checkpoints)
    checkpoints.mkdir()
    (checkpoints / "6").mkdir()


@pytest.mark.parametrize("lose", [move, unmount, empty])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tiny, cut, lose):
    lose(cut / "checkpoints")
    before = (cut / "metrics.jsonl").read_bytes()
    with pytest.raises(StrataError, match="says that step 6 was saved, and there is no checkpoint") as caught:
        trainer.train(tiny(), cut)
    assert type(caught.value) is StrataError and (cut / "metrics.jsonl").read_bytes() == before
    found = cut / "checkpoints"
    if found.is_symlink():
        found.unlink()
    elif found.exists():
        (found / "6").rmdir()
        found.rmdir()
    (cut / "elsewhere").rename(found)
    assert trainer.train(tiny(), cut).step == 8 and len(read_metrics(cut / "metrics.jsonl")) == 10


def test_without_its_config_json_a_run_still_knows_whose_it_is(tiny, cut):
    (cut / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"belongs to another config(.|\n)*learning_rate"):
        trainer.train(tiny(optimizer__direction={"name": "adamw", "learning_rate": 0.5}), cut)
    assert not (cut / "config.json").exists()
    assert trainer.train(tiny(), cut).step == 8 and (cut / "config.json").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [1], 5, {"state": "finished"}, {"state": "running", "step": "6"}])
def test_a_status_without_state_or_step_is_damaged(tiny, cut, content):
    (cut / "status.json").write_text(json.dumps(content))
    with pytest.raises(StrataError, match=r"status\.json is damaged"):
        trainer.train(tiny(), cut)


def test_a_teacher_that_is_not_there_claims_no_directory(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.teacher\.run"):
        trainer.train(tiny(train__teacher={"run": str(tmp_path / "teecher")}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


class Gone(io.StringIO):
    """A terminal after the connection was lost."""

    def write(self, text):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_that_is_gone_is_silent(terminal):
    with Console(2, file=Gone(), terminal=terminal, interval=0) as console:
        console.say("a word")
        for step in (1, 2):
            console.update({"step": step, "split": "train", "loss": 1.0})
        console.evaluation({"step": 2, "split": "val", "loss": 1.0})


@pytest.mark.parametrize("how", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_run_without_a_standard_error_trains_to_the_end(tiny, tmp_path, how):
    config = tmp_path / "small.py"
    config.write_text(f"def get_config():\n    return {tiny()!r}\n")
    line = f"exec {sys.executable} -m trainer --config {config} --workdir {tmp_path / 'run'} {how}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 10 and all(json.loads(row) for row in rows)


def test_a_sample_that_standard_output_cannot_show_is_shown_with_marks(tiny, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a line\n" * 99)
    text = {"name": "text_files", "files": [str(tmp_path / "*.txt")], "split": "tail", "sequence_length": 16, "batch_size": 2}
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    trainer.train(tiny(data=text, log__sample="é"), tmp_path / "run")
    out.flush()
    assert b"sample:\n?" in out.buffer.getvalue() and b"run again" in out.buffer.getvalue()


def test_a_trace_that_cannot_be_written_costs_the_run_nothing(tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    assert trainer.train(tiny(log__profile=(2, 3)), tmp_path / "run").step == 8
    assert capsys.readouterr().err.count("no profiler trace in") == 1


def test_a_directory_whose_name_is_not_utf_8_is_refused_before_anything_is_trained(tiny, tmp_path):
    with pytest.raises(StrataError, match="cannot be a run directory"):
        trainer.train(tiny(), tmp_path / os.fsdecode(b"w\xff"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        trainer.train(tiny(log__sample=os.fsdecode(b"\xff")), tmp_path / "run")
