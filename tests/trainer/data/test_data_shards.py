"""Token shards: format, damage, writing that can be killed, and the command line."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from strata import DataError
from trainer.data import python_source
from trainer.data import shards as format
from trainer.data.__main__ import main
from trainer.data.tokenizer import load_tokenizer
from trainer.data.write import write_shards


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_shards_hold_the_text_that_was_written(build, shards):
    written, read = build("text_files"), build("tokens", directory=str(shards))
    assert len(list(shards.glob("train-*.tokens"))) > 3
    assert read.raw_validation() == written.raw_validation()
    tokens = np.concatenate(read.examples._stream.arrays)
    assert np.array_equal(tokens, np.concatenate(written.examples._stream.arrays))
    assert all(isinstance(array, np.memmap) for array in read.examples._stream.arrays)
    for side in ("train", "validation"):
        assert read.description[side] == written.description[side]


def test_equal_streams_of_text_and_shards_give_equal_batches(build, shards):
    assert all(
        np.array_equal(next(build("tokens", directory=str(shards)).train())[name], array)
        for name, array in next(build("text_files").train()).items()
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot read the token shard"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "longer than it should be"),
        (lambda path: flip(path, 700), "damaged: its tokens"),
        (lambda path: flip(path, 20), "header of the token shard"),
        (lambda path: flip(path, 0), "is not a token shard"),
        (lambda path: shutil.copy(path.with_name("train-00000.tokens"), path), "is not the token shard that"),
    ],
    ids=["missing", "truncated", "short", "empty", "long", "flipped", "header", "magic", "swapped"],
)
def test_a_damaged_shard_is_an_error_that_names_it(build, shards, damage, message):
    path = shards / "train-00002.tokens"
    damage(path)
    with pytest.raises(DataError, match=message) as error:
        build("tokens", directory=str(shards))
    assert str(path) in str(error.value) and error.value.exit_code == 4
    assert main(["verify", str(shards)]) == 4


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_without_verification_only_header_and_size_are_checked(build, shards):
    flip(shards / "train-00002.tokens", 700)
    next(build("tokens", directory=str(shards), verify=False).train())
    (shards / "train-00001.tokens").write_bytes((shards / "train-00001.tokens").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00001\.tokens is truncated"):
        build("tokens", directory=str(shards), verify=False)


def test_another_vocabulary_than_that_of_the_shards_is_an_error(build, shards, bpe):
    with pytest.raises(DataError, match=r"vocabulary of .*train-00000\.tokens .* written with 'bytes'"):
        build("tokens", directory=str(shards), tokenizer=str(bpe))


def test_a_directory_without_an_index_is_an_error(build, shards, tmp_path):
    (shards / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        build("tokens", directory=str(shards))
    (shards / "index.json").unlink()
    with pytest.raises(DataError, match=r"there is no .*index\.json"):
        build("tokens", directory=str(shards))
    (shards / "progress.json").write_text("{}")
    with pytest.raises(DataError, match="not finished"):
        build("tokens", directory=str(shards))


def test_large_vocabularies_take_four_bytes_a_token(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.vocab_size = 70_000
    header = format.write_shard(tmp_path / "a.tokens", np.array([1, 69_999]), tokenizer)
    assert header == format.verify(tmp_path / "a.tokens") and header.itemsize == 4
    assert format.map_tokens(tmp_path / "a.tokens", header).tolist() == [1, 69_999]


def test_what_the_writer_of_shards_leaves_out_is_in_the_index_and_said(tmp_path, monkeypatch, build, capsys, prose):
    for i in range(20):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / f"{i:02d}.py").write_text(prose(i // 2, 20))
    (tmp_path / "lib" / "latin.py").write_bytes(b"\xe9")
    (tmp_path / "lib" / "linked").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setattr(python_source, "roots", lambda which: [("standard_library", tmp_path / "lib")])
    out = tmp_path / "out"
    assert main(["write", "--out", str(out), "--held_out", "0.4", "python_source"]) == 0
    assert "skipped 10 duplicate, 1 not utf8, 1 linked directory" in capsys.readouterr().out
    expected = {"linked_directory": 1, "broken_link": 0, "duplicate": 10, "not_utf8": 1}
    assert build("tokens", directory=str(out)).description["skipped_files"] == expected


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_writing_that_is_killed_after_any_shard_ends_with_the_same_bytes(corpus, bpe, tmp_path, prose, name):
    from trainer.data import text_files
    from trainer.data.options import TextFiles

    (corpus / "long.txt").write_text(prose(0, 1500))  # begins in one shard and ends several shards later
    options = TextFiles(files=(str(corpus / "*.txt"),), held_out=0.3)
    tokenizer = load_tokenizer("bytes" if name == "bytes" else str(bpe))
    settings = dict(shard_tokens=700, settings={}, description={"kind": "text_files"})

    def write(out, on_shard):
        return write_shards(text_files.documents(options), tokenizer, out, on_shard=on_shard, **settings)

    names = []
    write(tmp_path / "straight", names.append)
    assert len(names) > 4

    def kill(name):
        raise Killed

    for _ in range(2 * len(names)):  # one shard a start, then killed
        try:
            write(tmp_path / "killed", kill)
            break
        except Killed:
            (tmp_path / "killed" / "train-99999.tokens.partial").write_bytes(b"half")
    (tmp_path / "killed" / "train-99999.tokens.partial").unlink()
    assert files(tmp_path / "straight") == files(tmp_path / "killed")


def test_a_real_kill_and_a_second_start_give_the_same_bytes(shards, corpus, tmp_path):
    out = tmp_path / "again"
    arguments = ["write", "--out", str(out), "--shard_tokens", "1000", "--held_out", "0.2", str(corpus / "*.txt")]
    program = (
        "import os, sys, signal\n"
        "from trainer.data import shards\n"
        "whole, count = shards.replace_durably, 0\n"
        "def replace(path, *pieces):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 6:\n"
        "        path.with_name(path.name + '.partial').write_bytes(pieces[0])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    whole(path, *pieces)\n"
        "shards.replace_durably = replace\n"
        "from trainer.data.__main__ import main\n"
        f"main({arguments!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert (out / "progress.json").exists() and not (out / "index.json").exists()
    assert main(arguments) == 0
    for leftover in out.glob("*.partial"):
        leftover.unlink()
    assert files(out) == files(shards)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "in progress"])
@pytest.mark.parametrize(
    ("damaged", "side"),
    [(["train-00000"], "train"), (["train-00003", "train-00005"], "train"), (["validation-00001"], "validation")],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_shards_that_are_missing_or_damaged_are_written_again(corpus, tmp_path, finished, damaged, side):
    from trainer.data import text_files
    from trainer.data.options import TextFiles

    options = TextFiles(files=(str(corpus / "*.txt"),), held_out=0.3)

    def write(on_shard=lambda name: None):
        said = []
        write_shards(
            text_files.documents(options),
            load_tokenizer("bytes"),
            tmp_path / "out",
            shard_tokens=700,
            settings={},
            description={"kind": "text_files"},
            on_shard=on_shard,
            say=said.append,
        )
        return said

    names = []
    assert write(names.append) == []
    whole = files(tmp_path / "out")
    assert write() == [f"{tmp_path / 'out'} is finished already"]
    if not finished:
        shutil.rmtree(tmp_path / "out")

        def kill(name):
            if name == names[-1]:
                raise Killed

        with pytest.raises(Killed):
            write(kill)
    first, *others = (tmp_path / "out" / f"{name}.tokens" for name in damaged)
    first.unlink()
    for path in others:
        flip(path, 300)
    again = []

    def kill_at_once(name):
        again.append(name)
        raise Killed

    with pytest.raises(Killed):
        write(kill_at_once)
    assert not (tmp_path / "out" / "index.json").exists()
    assert write(again.append) == []
    assert files(tmp_path / "out") == whole
    assert again == [name for name in names if name.startswith(side) and name >= first.name]


def test_the_command_says_which_shard_it_writes_again(shards, corpus, capsys):
    before = files(shards)
    (shards / "train-00002.tokens").unlink()
    assert main(["write", "--out", str(shards), "--shard_tokens", "1000", "--held_out", "0.2", str(corpus / "*.txt")]) == 0
    said = capsys.readouterr().err
    assert "train-00002.tokens: No such file or directory; the train shards are written again from there on" in said
    assert "finished already" not in said and files(shards) == before


@pytest.mark.parametrize("state", ["[]", "{", '{"settings": 1}'])
def test_progress_that_cannot_be_read_is_named(shards, corpus, capsys, state):
    (shards / "index.json").unlink()
    (shards / "progress.json").write_text(state)
    assert main(["write", "--out", str(shards), "--shard_tokens", "1000", "--held_out", "0.2", str(corpus / "*.txt")]) == 4
    assert "progress.json" in capsys.readouterr().err


def test_writing_again_with_other_settings_is_refused(shards, corpus, capsys):
    before = files(shards)
    assert main(["write", "--out", str(shards), "--shard_tokens", "999", str(corpus / "*.txt")]) == 4
    assert "belongs to other work" in capsys.readouterr().err
    assert main(["write", "--out", str(shards), "--shard_tokens", "1000", "--held_out", "0.2", str(corpus / "*.txt")]) == 0
    assert files(shards) == before


def test_the_command_line_trains_a_tokenizer_writes_shards_and_reads_them(build, corpus, tmp_path, capsys):
    model, out = tmp_path / "bpe.json", tmp_path / "bpe-shards"
    assert main(["tokenizer", "--vocab_size", "300", "--out", str(model), str(corpus / "*.txt")]) == 0
    assert main(["write", "--tokenizer", str(model), "--out", str(out), str(corpus / "*.txt"), "--held_out", "0.2"]) == 0
    assert main(["inspect", str(out)]) == 0 and main(["verify", str(out / "train-00000.tokens")]) == 0
    printed = capsys.readouterr().out
    assert "300 ids" in printed and "checksum ok" in printed
    dataset = build("tokens", directory=str(out), tokenizer=str(model))
    assert dataset.vocab_size == 300
    assert dataset.raw_validation() == build("text_files").raw_validation()
    assert dataset.validation_bytes == len(dataset.raw_validation())
    assert json.loads((out / "index.json").read_text())["description"]["bytes_exact"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["write", "--out", "{tmp}/o", "{tmp}/none*.txt"], 4, "no file matches"),
        (["write", "--out", "{tmp}/o", "--held_out", "2", "{corpus}/*.txt"], 2, "held_out"),
        (["write", "--out", "{tmp}/o", "python_source:everything"], 2, "which"),
        (["write", "--out", "{tmp}/o", "--shard_tokens", "0", "{corpus}/*.txt"], 2, "at least 1 token"),
        (["write", "--out", "{tmp}/o", "--tokenizer", "{tmp}/no.json", "{corpus}/*.txt"], 4, "no tokenizer file"),
        (["tokenizer", "--out", "{tmp}/t.json", "--vocab_size", "100", "{corpus}/*.txt"], 2, "too small"),
        (["tokenizer", "--out", "{tmp}/t.json", "--vocab_size", "300", "--max_bytes", "-5", "{corpus}/*.txt"], 2, "1 or more"),
        (["tokenizer", "--out", "{tmp}/t.json", "--vocab_size", "300", "--max_bytes", "0", "{corpus}/*.txt"], 2, "1 or more"),
        (["tokenizer", "--out", "{tmp}/t.json", "--vocab_size", "300", "{corpus}/empty.md"], 4, "empty.md holds no text"),
        (["inspect", "{tmp}/nothing"], 4, "there is no"),
        (["verify", "{corpus}/00.txt"], 4, "not a token shard|truncated"),
    ],
)
def test_mistakes_on_the_command_line_end_with_a_sentence(corpus, tmp_path, capsys, arguments, code, message):
    (corpus / "empty.md").write_text("")
    filled = [argument.format(tmp=tmp_path, corpus=corpus) for argument in arguments]
    assert main(filled) == code
    printed = capsys.readouterr().err
    assert re.search(message, printed) and "Traceback" not in printed
    assert not (tmp_path / "t.json").exists()


def test_a_vocabulary_that_the_text_cannot_fill_is_said(corpus, tmp_path, capsys):
    command = ["tokenizer", "--out", str(tmp_path / "t.json"), str(corpus / "*.txt"), "--vocab_size"]
    assert main([*command, "260"]) == 0 and capsys.readouterr().err == ""
    assert main([*command, "70000"]) == 0
    assert re.search(r"no more merges than these \d+ ids; 70,000 were asked for", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["write", "--out", "{tmp}/o", "{corpus}/*.txt"], 75, "the same command goes on from here"),
        (["tokenizer", "--out", "{tmp}/t.json", "--vocab_size", "300", "{corpus}/*.txt"], 130, "nothing was written"),
    ],
)
def test_what_was_interrupted_goes_on_only_where_it_was_saved(corpus, tmp_path, capsys, monkeypatch, arguments, code, words):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.data.text_files.documents", interrupted)
    assert main([argument.format(tmp=tmp_path, corpus=corpus) for argument in arguments]) == code
    assert words in capsys.readouterr().err


def test_the_module_runs_and_unknown_commands_exit_2():
    result = subprocess.run([sys.executable, "-m", "trainer.data", "wrong"], capture_output=True, text=True)
    assert result.returncode == 2 and "invalid choice" in result.stderr
