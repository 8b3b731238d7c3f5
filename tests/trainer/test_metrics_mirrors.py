"""Mirrors can be rebuilt from metrics.jsonl, need no account, and are imported only when asked for."""

import builtins
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from strata import ConfigError, StrataError
from trainer.config import resolve_config, run_id
from trainer.metrics import MetricsWriter, read_metrics
from trainer.metrics import tensorboard_mirror as tensorboard
from trainer.metrics import wandb_mirror as wandb_mirror
from trainer.metrics.jsonl import scalars
from trainer.metrics.wandb_mirror import WandbMirror, resolve_mode


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "split": "train", "loss": 1 / step, "timing": {"step_seconds": 0.5, "mfu": None}})
        writer.write({"step": 3, "split": "val", "loss": 0.125})
    return path


def test_automatic_is_offline_without_an_account_and_online_with_one(no_account, monkeypatch):
    assert resolve_mode("auto") == "offline"
    (no_account / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert resolve_mode("auto") == "online"


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_a_named_mode_is_taken_as_it_is(no_account, mode):
    assert resolve_mode(mode) == mode


def test_online_without_an_account_is_refused_before_a_directory_is_claimed(no_account, tiny, monkeypatch):
    import trainer

    with pytest.raises(ConfigError, match=r"no W&B account for api\.wandb\.ai here: .* choose auto or offline"):
        trainer.train(tiny(log__wandb="online"), no_account / "run")
    assert not (no_account / "run" / "config.json").exists()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert resolve_mode("online") == "online"


def test_an_account_at_a_server_of_ones_own_is_found(no_account):
    (no_account / "netrc").write_text("machine wandb.example.org login user password secret\n")
    assert resolve_mode("auto") == "offline"
    settings = no_account / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert resolve_mode("auto") == resolve_mode("online") == "online"


def test_an_error_of_wandb_is_a_sentence(no_account, monkeypatch):
    recorder = Recorder(monkeypatch, no_account)

    def refused(**rest):
        raise RuntimeError("permission denied")

    recorder.init = refused
    with pytest.raises(StrataError, match=r"W&B did not start \(offline\): permission denied\. Nothing is lost"):
        WandbMirror(no_account, mode="offline", run_id="a", project="p")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'on' is not one of"):
        resolve_mode("on")


def test_disabled_imports_no_wandb():
    code = (
        "import sys; from trainer.metrics.wandb_mirror import WandbMirror\n"
        "m = WandbMirror('.', mode='disabled', run_id='a', project='p'); m.write({'step': 1, 'split': 'train'}); m.close()\n"
        "sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0


class Killed(BaseException):
    """Ends a run as nothing in it can catch."""


class Recorder:
    """Stands where wandb would, and keeps what it is told; `fails_at`: the step of training at which it raises `error` once."""

    def __init__(self, monkeypatch, directory, fails_at=None, error=RuntimeError):
        self.fails_at, self.error = fails_at, error
        self.logged, self.started, self.finished, self.summary, self.resumed = [], [], [], {}, False
        self.dir = str(directory / "wandb" / "run" / "files")
        self.url = "somewhere"
        monkeypatch.setitem(sys.modules, "wandb", self)

    def Settings(self, **rest):  # noqa: N802
        return rest

    def init(self, **rest):
        self.started.append(rest)
        return self

    def define_metric(self, *names, **rest):
        pass

    def log(self, values):
        if self.fails_at is not None and values.get("train/step") == self.fails_at:
            self.fails_at = None
            raise self.error("the connection is gone")
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished.append(exit_code)


def test_rows_are_sent_with_a_step_of_their_own_split(no_account, history, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    recorder = Recorder(monkeypatch, no_account)
    wandb_mirror.rebuild(history, no_account, mode="online", run_id="abc-s0", project="p", group="g")
    assert recorder.logged[0] == {"train/step": 1, "train/loss": 1.0, "timing/step_seconds": 0.5}
    assert recorder.logged[-1] == {"val/step": 3, "val/loss": 0.125}
    started = recorder.started[0]
    assert (started["id"], started["resume"], started["project"], started["group"]) == ("abc-s0", "allow", "p", "g")
    assert recorder.finished == [0]


def test_a_restart_online_does_not_send_a_step_twice(no_account, history, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    recorder = Recorder(monkeypatch, no_account)
    recorder.resumed, recorder.summary = True, {"train/step": 2}
    with WandbMirror(no_account, mode="online", run_id="abc-s0", project="p", history=history) as mirror:
        for row in read_metrics(history):
            mirror.write(row)
    assert [sorted(values)[-1] for values in recorder.logged] == ["train/step", "val/step"]
    assert [values.get("train/step") for values in recorder.logged] == [3, None]


def as_sent(metrics) -> list:
    return [{f"{row['split']}/step": row["step"], **scalars(row)} for row in read_metrics(metrics)]


@pytest.fixture(params=["offline", "online"])
def cut(request, no_account, tiny, monkeypatch):
    """A run that ended at step 5, two rows after its checkpoint: its config, where it is, W&B, and what W&B had by then."""
    import trainer

    if request.param == "online":
        monkeypatch.setenv("WANDB_API_KEY", "x")
    run, recorder = no_account / "run", Recorder(monkeypatch, no_account, fails_at=5, error=Killed)
    config = tiny(log__wandb=request.param, log__wandb_project="depth", log__wandb_group="sweep")
    with pytest.raises(Killed):
        trainer.train(config, run)
    before, recorder.logged = recorder.logged, []
    return config, run, recorder, before


def test_a_run_tells_wandb_its_rows_and_one_that_is_resumed_goes_on_under_its_id_and_tells_none_twice(cut):
    import trainer

    config, run, recorder, before = cut
    assert [row.get("train/step") for row in before] == [1, 2, 3, 4, None] and before == as_sent(run / "metrics.jsonl")[:5]
    # Online, W&B itself has what it was told, also of the step 4 that is trained again; offline it begins with nothing.
    recorder.resumed, recorder.summary = config["log"]["wandb"] == "online", {"train/step": 4, "val/step": 4}
    trainer.train(config, run)
    first, second = recorder.started
    assert first["group"] == "sweep"
    for given in ("id", "project", "group", "name", "dir", "mode"):
        assert first[given] == second[given]
    assert (first["project"], first["name"], first["dir"], first["mode"]) == ("depth", "run", str(run), config["log"]["wandb"])
    assert first["id"] == json.loads((run / "wandb.json").read_text())["id"]
    assert first["config"]["run_id"] == run_id(resolve_config(config)) and first["config"]["train"]["steps"] == 8
    whole = as_sent(run / "metrics.jsonl")
    assert [row.get("train/step") or row["val/step"] for row in whole] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert recorder.logged == (whole[5:] if recorder.resumed else whole)
    assert recorder.finished == [1, 0]


def test_a_run_writes_every_number_of_its_rows_to_tensorboard(tiny, tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    import trainer

    trainer.train(tiny(log__tensorboard=True), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    expected = [(row["step"], name, np.float32(value)) for row in rows for name, value in scalars(row).items()]
    assert len(rows) == 10 and scalars_in(tmp_path / "run" / "tensorboard") == expected


def test_a_full_disk_costs_tensorboard_its_rows_and_the_run_nothing(tiny, tmp_path, monkeypatch, capsys):
    record_writer = pytest.importorskip("tensorboardX.record_writer", reason="the extra tensorboard is not installed")
    import trainer

    monkeypatch.setattr(record_writer, "open_file", lambda path: open("/dev/full", "wb"))
    monkeypatch.setattr(tensorboard, "FLUSH", 0.0)
    trainer.train(tiny(log__tensorboard=True), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 10
    said = capsys.readouterr().err
    assert said.count("TensorBoardMirror failed") == 1 and "at step 1 and gets no more rows (OSError" in said


def test_a_directory_that_tensorboard_cannot_have_is_said_in_a_sentence(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    (tmp_path / tensorboard.DIRECTORY).write_text("")
    with pytest.raises(StrataError, match="tensorboard cannot be written: File exists"):
        tensorboard.TensorBoardMirror(tmp_path)


def test_a_mirror_that_fails_costs_the_run_nothing_and_is_told(no_account, tiny, monkeypatch, capsys):
    import trainer

    recorder = Recorder(monkeypatch, no_account, fails_at=5)
    trainer.train(tiny(log__wandb="offline"), no_account / "run")
    assert [row.get("train/step") for row in recorder.logged] == [1, 2, 3, 4, None] and recorder.finished == [1]
    assert [row["step"] for row in read_metrics(no_account / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    said = capsys.readouterr().err
    assert "rebuilds it from metrics.jsonl" in said
    assert said.count("WandbMirror failed at step 5 and gets no more rows (RuntimeError: the connection is gone)") == 1


def test_nor_does_one_that_cannot_be_closed(no_account, tiny, monkeypatch, capsys):
    import trainer

    recorder = Recorder(monkeypatch, no_account)
    monkeypatch.setattr(recorder, "finish", lambda exit_code: 1 / 0)
    trainer.train(tiny(log__wandb="offline"), no_account / "run")
    assert json.loads((no_account / "run" / "status.json").read_text())["state"] == "finished"
    assert "WandbMirror failed at its end (ZeroDivisionError" in capsys.readouterr().err


def test_a_run_that_failed_is_marked_as_failed(no_account, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    recorder = Recorder(monkeypatch, no_account)
    with pytest.raises(RuntimeError), WandbMirror(no_account, mode="online", run_id="a", project="p"):
        raise RuntimeError
    assert recorder.finished == [1]


def test_offline_needs_no_account_and_a_restart_leaves_one_complete_run(no_account, history):
    code = (
        "import sys; from trainer.metrics.wandb_mirror import WandbMirror\n"
        "m = WandbMirror(sys.argv[1], mode='auto', run_id='abc-s0', project='p', history=sys.argv[2] or None)\n"
        "m.write({'step': 4, 'split': 'train', 'loss': 0.25}); print(m.mode, m.url); m.close()"
    )
    sizes = []
    for past in ("", str(history), str(history)):
        command = [sys.executable, "-c", code, str(no_account), past]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "offline None\n"
        runs = list((no_account / "wandb").glob("offline-run-*-abc-s0"))
        assert len(runs) == 1
        data = (runs[0] / "run-abc-s0.wandb").read_bytes()
        sizes.append((data.count(b"train/loss"), data.count(b"val/loss")))
    assert sizes[0][1] == 0 and sizes[1][1] > 0 and sizes[2] == sizes[1] and sizes[1][0] > sizes[0][0]


def scalars_in(directory) -> list:
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    found = []
    for path in sorted(directory.glob("events*")):
        data, position = path.read_bytes(), 0
        while position < len(data):  # length (8), its checksum (4), event, checksum (4)
            length = int.from_bytes(data[position : position + 8], "little")
            event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            position += 16 + length
    return found


def test_tensorboard_holds_every_number_of_the_rows(tmp_path, history):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    tensorboard.rebuild(history, tmp_path)
    tensorboard.rebuild(history, tmp_path)  # a second time gives the same, not twice as much
    found = scalars_in(tmp_path / "tensorboard")
    assert (1, "train/loss", 1.0) in found and (3, "val/loss", 0.125) in found and (2, "timing/step_seconds", 0.5) in found
    assert len(found) == 3 * 2 + 1


def test_a_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"\.\[tensorboard\]"):
        tensorboard.TensorBoardMirror(tmp_path)
