"""What goes wrong outside: data, disks, files, paths. A clear sentence, the right exit code, nothing lost."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from strata import ConfigError, DataError, StrataError
from trainer import diff, loop
from trainer.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


def rows(directory: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "timing"} for row in read_metrics(directory / "metrics.jsonl")]


def same_run(one: Path, two: Path) -> bool:
    """Equal rows and equal last parameters, bit for bit."""
    first, second = trainer.load(one), trainer.load(two)
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), first.params, second.params)
    return rows(one) == rows(two) and first.step == second.step and all(jax.tree.leaves(equal))


def refused(kind: type[StrataError], config: dict, directory: Path) -> str:
    """The message of a run that is refused; it is one for people."""
    with pytest.raises(kind) as caught:
        trainer.train(config, directory)
    assert type(caught.value) is kind
    return str(caught.value)


class Stopped(Exception):
    """Stands for a process that is gone."""


@pytest.fixture
def before_saving(monkeypatch):
    """A function that has something happen once, right before the checkpoint of a step."""

    def arrange(step: int, happen) -> None:
        original = loop.Loop._save

        def save(self, state, at, *rest, **named):
            if at == step:
                monkeypatch.setattr(loop.Loop, "_save", original)
                self.checkpointer.wait()  # the one before it may still be on its way
                happen()
            return original(self, state, at, *rest, **named)

        monkeypatch.setattr(loop.Loop, "_save", save)

    return arrange


def gone() -> None:
    raise Stopped


@pytest.fixture
def whole(tiny, tmp_path):
    """An uninterrupted run; the compiled step is shared by all of them."""
    trainer.train(tiny(checkpoint__keep_latest=3), tmp_path / "whole")
    return tmp_path / "whole"


# ---- data


def text(directory: Path, *documents: bytes, **fields: object) -> dict:
    directory.mkdir(exist_ok=True)
    for number, document in enumerate(documents):
        (directory / f"{number}.txt").write_bytes(document)
    files = {"name": "text_files", "files": [str(directory / "*.txt")], "sequence_length": 16, "batch_size": 4}
    return files | {"split": "tail", "held_out": 0.3} | fields


def test_an_empty_corpus_is_named(tiny, tmp_path):
    said = refused(DataError, tiny(data=text(tmp_path / "texts", b"", b"")), tmp_path / "run")
    assert "holds no text to train on" in said and " empty)" in said and str(tmp_path / "texts") in said
    assert not (tmp_path / "run" / "config.json").exists(), "a run that could not begin keeps its directory"


def test_a_corpus_shorter_than_one_sequence_says_both_lengths(tiny, tmp_path):
    said = refused(DataError, tiny(data=text(tmp_path / "texts", b"short text")), tmp_path / "run")
    assert "8 tokens, fewer than one sequence of 16 + 1 (data.sequence_length)" in said


def test_shards_of_another_vocabulary_are_refused(tiny, tmp_path):
    from trainer.data.__main__ import main

    source = text(tmp_path / "texts", b"some words and some more words " * 40)["files"]
    assert main(["write", *source, "--split", "tail", "--out", str(tmp_path / "shards")]) == 0
    assert main(["tokenizer", *source, "--vocab_size", "300", "--out", str(tmp_path / "bpe.json")]) == 0
    data = {"name": "tokens", "directory": str(tmp_path / "shards"), "sequence_length": 16, "batch_size": 4}
    said = refused(DataError, tiny(data=data | {"tokenizer": str(tmp_path / "bpe.json")}), tmp_path / "run")
    assert "train-00000" in said and "bpe.json" in said and "written with 'bytes'" in said
    assert math.isfinite(trainer.train(tiny(data=data), tmp_path / "run").evaluation["bpb"])


def test_a_held_out_set_smaller_than_one_batch_is_scored_once_and_whole(tiny, tmp_path):
    config = tiny(train__steps=3, data__validation_examples=3)
    found = trainer.train(config, tmp_path / "run").evaluation
    assert found["tokens"] == 3 * 16
    run = trainer.load(tmp_path / "run")
    nats = 0.0
    for batch in run.setup.dataset.validation(1):
        chances = jax.nn.log_softmax(run.model(jnp.asarray(batch["tokens"])))
        nats -= float(np.take_along_axis(np.asarray(chances), batch["targets"][..., None], axis=-1).sum())
    assert nats / (3 * 16) == pytest.approx(found["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__sequence_length": 1},
        {"data__sequence_length": 65},
        {"data__batch_size": 1},
        {"model": {"width": 15, "heads": 3, "head_size": 6, "layers": 1, "ffn": {"hidden": 7}}},
        {"data__vocabulary": 13, "model__kv_heads": 1, "train__loss_chunk": 7},
    ],
    ids=["T=1", "T=65", "B=1", "odd width, one layer", "odd vocabulary, odd chunk"],
)
def test_odd_sizes_train_resume_and_end_like_uninterrupted_ones(tiny, tmp_path, before_saving, changes):
    config = tiny(**changes)
    trainer.train(config, tmp_path / "whole")
    first, *_, last = (row["loss"] for row in rows(tmp_path / "whole") if row["split"] == "train")
    vocabulary = changes.get("data__vocabulary", 12)
    assert first == pytest.approx(math.log(vocabulary), rel=1e-5) and math.isfinite(last) and last != first
    before_saving(6, gone)
    with pytest.raises(Stopped):
        trainer.train(config, tmp_path / "cut")
    trainer.train(config, tmp_path / "cut")
    assert same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_width_that_gives_odd_heads_is_refused_in_words(tiny, tmp_path):
    assert "even head size, not 15" in refused(ConfigError, tiny(model__width=15, model__heads=1), tmp_path / "run")


# ---- another package of our name


def foreign(tmp_path: Path, name: str) -> Path:
    """A directory that holds something of a user's own with one of our names."""
    place = tmp_path / "mine"
    place.mkdir()
    (place / "small.py").write_text("def get_config(arg=''):\n    return dict(data=dict(name='bigram'), train=dict(steps=1))\n")
    if name.endswith(".py"):
        (place / name).write_text("print('I should not run')\n")
    else:
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("print('I should not run')\n")
    return place


def python(place: Path, *arguments: str, path: list[Path] | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path or [ROOT]))}
    return subprocess.run([sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["models", "optim.py", "strata"])
@pytest.mark.parametrize("where", ["current directory", "PYTHONPATH"])
def test_another_package_of_our_name_first_on_the_path_is_named(tmp_path, name, where):
    place = foreign(tmp_path, name)
    if where == "PYTHONPATH":
        done = python(tmp_path, "-m", "trainer", "--config", "mine/small.py", "--validate", path=[place, ROOT])
    else:
        done = python(place, "-m", "trainer", "--config", "small.py", "--validate")
    package = name.removesuffix(".py")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith(f"error: another package called {package!r} comes first on the Python path")
    assert str(ROOT / package) in done.stderr and str(place / name) in done.stderr and "Traceback" not in done.stderr


def test_the_other_commands_and_the_python_interface_check_too(tmp_path):
    place = foreign(tmp_path, "models")
    for module, arguments in (("evaluate", ["--run", "x"]), ("generate", ["--run", "x"]), ("diff", ["x", "y"])):
        done = python(place, "-m", f"trainer.{module}", *arguments)
        assert done.returncode == 2 and "another package called 'models'" in done.stderr and "Traceback" not in done.stderr
    done = python(place, "-c", "import trainer\ntry:\n    trainer.train\nexcept ImportError as error:\n    print(error)")
    assert done.stdout.startswith("another package called 'models' comes first"), done.stderr


def test_a_folder_of_our_name_without_code_is_no_collision(tmp_path):
    place = foreign(tmp_path, "models")
    (place / "models" / "__init__.py").rename(place / "models" / "weights.bin")
    done = python(place, "-m", "trainer", "--config", "small.py", "--validate")
    assert done.returncode == 0, done.stderr


# ---- damaged run directories


def damage(directory: Path, how: str) -> None:
    """Spoil the largest file of a checkpoint."""
    path = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "bit flipped":
        data[len(data) // 2] ^= 4
    path.write_bytes(data) if how != "missing" else path.unlink()


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(tiny, tmp_path, whole, before_saving, capsys, how):
    config = tiny(checkpoint__keep_latest=3)
    before_saving(8, gone)
    with pytest.raises(Stopped):
        trainer.train(config, tmp_path / "cut")
    damage(tmp_path / "cut" / "checkpoints" / "6", how)
    capsys.readouterr()
    trainer.train(config, tmp_path / "cut")
    said = capsys.readouterr().err
    assert "checkpoints/6 is damaged and was not loaded" in said and "Going on from step 3, the next older good" in said
    assert "resuming   after step 3 of 8" in said
    assert same_run(tmp_path / "cut", whole)


def test_a_finished_run_with_a_damaged_checkpoint_opens_at_the_next_older_one_and_says_so(whole, capsys):
    damage(whole / "checkpoints" / "8", "bit flipped")
    assert trainer.load(whole).step == 6
    assert "checkpoints/8 is damaged" in capsys.readouterr().err
    with pytest.raises(StrataError, match=r"checkpoints/8 cannot be used: .* Good steps here: 3, 6\.") as caught:
        trainer.load(whole, 8)
    assert caught.value.exit_code == 1


def test_without_one_good_checkpoint_nothing_is_started_afresh(tiny, tmp_path, before_saving):
    before_saving(8, gone)
    with pytest.raises(Stopped):
        trainer.train(tiny(), tmp_path / "cut")
    for step in (3, 6):
        damage(tmp_path / "cut" / "checkpoints" / str(step), "truncated")
    before = (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    assert "No good checkpoint is left" in refused(StrataError, tiny(), tmp_path / "cut")
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[1]"])
def test_a_damaged_environment_json_is_named_by_the_comparison_of_two_runs(whole, tmp_path, content):
    shutil.copytree(whole, tmp_path / "other")
    assert diff.main([str(whole), str(tmp_path / "other")]) == 0
    (tmp_path / "other" / "environment.json").write_bytes(content)
    with pytest.raises(StrataError, match=r"other/environment\.json is damaged") as caught:
        diff.main([str(whole), str(tmp_path / "other")])
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"model": {"width": "wide"}}', b""])
def test_a_damaged_config_json_is_named(tiny, whole, content):
    (whole / "config.json").write_bytes(content)
    assert "config.json" in refused(ConfigError, tiny(), whole)
    with pytest.raises(ConfigError, match=r"config\.json"):
        trainer.load(whole)
    assert (whole / "config.json").read_bytes() == content


@pytest.mark.parametrize("content", [b'{"state": "fin', b"[]", b"{}"])
def test_a_damaged_status_json_is_named(tiny, whole, content):
    (whole / "status.json").write_bytes(content)
    assert "status.json is damaged" in refused(StrataError, tiny(), whole)


def test_missing_rows_of_metrics_are_noticed_and_nothing_is_overwritten(tiny, tmp_path, before_saving):
    before_saving(8, gone)
    with pytest.raises(Stopped):
        trainer.train(tiny(), tmp_path / "cut")
    metrics = tmp_path / "cut" / "metrics.jsonl"
    kept = metrics.read_bytes()
    metrics.unlink()
    assert "rows are missing" in refused(StrataError, tiny(), tmp_path / "cut")
    metrics.write_bytes(kept.replace(b'"step": 1,', b'"step": 1 ,', 1))
    assert "changed since the checkpoint" in refused(StrataError, tiny(), tmp_path / "cut")
    metrics.write_bytes(kept)
    trainer.train(tiny(), tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["state"] == "finished"


def test_another_sequence_length_does_not_resume(tiny, whole):
    said = refused(ConfigError, tiny(data__sequence_length=32), whole)
    assert "data.sequence_length: 16 -> 32" in said and str(whole) in said


# ---- disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 4096)


def test_a_disk_that_is_full_at_a_checkpoint_costs_nothing_that_was_saved(tiny, small_disk, whole, before_saving):
    before_saving(6, lambda: fill(small_disk))
    said = refused(StrataError, tiny(), small_disk / "run")
    assert "No space left on device" in said and str(small_disk / "run") in said and StrataError.exit_code == 1
    assert trainer.load(small_disk / "run").step == 3
    assert "No space left on device" in refused(StrataError, tiny(), small_disk / "run")  # still no space, still nothing lost
    assert trainer.load(small_disk / "run").step == 3
    (small_disk / "filler").unlink()
    trainer.train(tiny(checkpoint__keep_latest=3), small_disk / "run")
    assert same_run(small_disk / "run", whole)


def test_a_disk_that_fills_up_between_checkpoints_costs_nothing_that_was_saved(tiny, small_disk, tmp_path, monkeypatch):
    config = tiny(train__steps=50, checkpoint__every=20, checkpoint__keep_latest=3)
    trainer.train(config, tmp_path / "long")
    read = loop.Loop._read

    def full_at_21(self, pending, *rest, **more):
        if pending and pending[-1].step == 21:
            self.checkpointer.wait()
            fill(small_disk)  # a row or two still fit into the last block of their file
        return read(self, pending, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_read", full_at_21)
        said = refused(StrataError, config, small_disk / "run")
    assert "metrics.jsonl cannot be written: No space left on device" in said
    assert trainer.load(small_disk / "run").step == 20
    (small_disk / "filler").unlink()
    trainer.train(config, small_disk / "run")
    assert same_run(small_disk / "run", tmp_path / "long")


@contextlib.contextmanager
def unwritable(directory: Path):
    """Take away the right to write there; root gives up being root for that."""
    before, root = directory.stat().st_mode, os.geteuid() == 0
    directory.chmod(0o555)
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        directory.chmod(before)


def test_a_directory_that_becomes_unwritable_costs_nothing_that_was_saved(tiny, tmp_path, whole, before_saving):
    run = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        before_saving(6, lambda: stack.enter_context(unwritable(run / "checkpoints")))
        said = refused(StrataError, tiny(), run)
    assert "Permission denied" in said and str(run) in said
    assert trainer.load(run).step == 3
    trainer.train(tiny(checkpoint__keep_latest=3), run)
    assert same_run(run, whole)


def test_a_directory_that_cannot_be_made_is_named(tiny, tmp_path):
    with unwritable(tmp_path):
        said = refused(StrataError, tiny(), tmp_path / "run")
    assert "cannot be written: Permission denied" in said and not (tmp_path / "run").exists()
