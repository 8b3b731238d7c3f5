"""Two processes on one machine train as one does: the same rows, one run directory, one decision to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
def get_config(arg=""):
    return dict(
        data=dict(name="bigram", sequence_length=16, batch_size=8, vocabulary=12, validation_examples=10),
        model=dict(width=16, layers=2, heads=2),
        optimizer=dict(direction=dict(name="muon"), schedule=dict(name="cosine", warmup=2)),
        train=dict(steps=int(arg or 30)),
        evaluate=dict(every=10, batches=2),
        checkpoint=dict(every=10),
        log=dict(every=1),
    )
"""
SPLIT = "--config.mesh.data=2"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("processes")
    (place / "small.py").write_text(CONFIG)
    return place


def begin(place: Path, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "trainer", "--config", *map(str, arguments)]
    return subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin_two(place: Path, config: str, run: Path, *arguments: object) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joined = ["--workdir", run, "--coordinator", f"localhost:{port}", "--process_count", 2, *arguments]
    return [begin(place, config, *joined, "--process_index", index) for index in (0, 1)]


def ended(children: list[subprocess.Popen], code: int) -> list[tuple[str, str]]:
    """Standard output and error of each, once all have ended with `code`."""
    said = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [code] * len(children), "\n".join(err for _, err in said)
    assert not any("Traceback" in out + err for out, err in said)
    return said


def rows(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "timing"} for row in read_metrics(run / "metrics.jsonl")]


def agree(run: Path, other: Path) -> None:
    """The same rows in the same order, numbers to 1e-5."""
    one, two = rows(run), rows(other)
    assert [(row["step"], row["split"]) for row in one] == [(row["step"], row["split"]) for row in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a["loss"], a.get("learning_rate", 0)], [b["loss"], b.get("learning_rate", 0)], rtol=1e-5)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def alone(place):
    """The run of one process on one device."""
    ended([begin(place, "small.py", "--workdir", "alone")], 0)
    return place / "alone"


@pytest.fixture(scope="module")
def together(place):
    """The run of two processes, one device each, and what each of them said."""
    said = ended(begin_two(place, "small.py", place / "together", SPLIT), 0)
    return place / "together", said


def test_two_processes_give_the_rows_of_one(alone, together):
    agree(together[0], alone)


def test_a_replica_that_is_split_over_processes_reads_the_same_rows_in_both(place, alone):
    ended(begin_two(place, "small.py", place / "tensor", "--config.mesh.tensor=2"), 0)
    agree(place / "tensor", alone)


def test_only_the_first_process_writes_and_speaks(together):
    run, ((out, err), (silent, quiet)) = together
    assert "devices    2 x cpu (data 2 x fsdp 1 x tensor 1)" in err and "held-out data: loss" in out
    # The library of collectives greets on its own.
    assert all(line.startswith("[Gloo]") for line in silent.splitlines()) and "step" not in quiet
    assert status(run)["state"] == "finished"
    assert not list(run.glob("environment.resumed.jsonl")), "the second process started the run a second time"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 2 and environment["devices"]["count"] == 2


def test_a_signal_to_the_second_process_stops_both_and_both_go_on(place, alone):
    run = place / "stopped"
    children = begin_two(place, "small.py", run, SPLIT)
    metrics = run / "metrics.jsonl"
    while all(child.poll() is None for child in children) and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 4):
        time.sleep(0.001)
    children[1].send_signal(signal.SIGTERM)
    said = ended(children, 75)
    found = status(run)
    step = found["step"]
    assert found["state"] == "preempted" and 4 <= step < 30
    assert (run / "checkpoints" / str(step) / "manifest.json").is_file() and max(row["step"] for row in rows(run)) == step
    assert all("stopped by" in err for _, err in said) and "SIGTERM" in said[1][1]
    said = ended(begin_two(place, "small.py", run, SPLIT), 0)
    assert f"resuming   after step {step}" in said[0][1] and status(run)["state"] == "finished"
    agree(run, alone)


def test_one_process_goes_on_from_what_two_saved(place, alone, together):
    run = place / "shrunk"
    shutil.copytree(together[0], run)
    # Step 20 is what an interruption would have left.
    shutil.rmtree(run / "checkpoints" / "30")
    (run / "status.json").write_text(json.dumps({"state": "running", "step": 20, "message": "", "updated": ""}))
    _, err = ended([begin(place, "small.py", "--workdir", run)], 0)[0]
    assert "resuming   after step 20" in err and "mesh.data: 2 -> 1" in err
    agree(run, alone)


def test_a_mesh_that_leaves_out_a_process_is_refused_by_both(place, tmp_path):
    said = ended(begin_two(place, "small.py", tmp_path / "run"), 2)
    assert all("several processes must use all of them" in err for _, err in said)
