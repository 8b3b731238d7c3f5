"""Python source, files of text, and mixtures."""

import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from strata import ConfigError, DataError, lookup, resolve
from trainer.announce import data_line
from trainer.data import python_source
from trainer.data.options import MIXTURE_BLOCK, PythonSource
from trainer.data.text import quotas


def held_out_text(dataset) -> bytes:
    return dataset.raw_validation()


def training_text(dataset) -> bytes:
    return b"".join(dataset.tokenizer.decode_bytes(array) for array in dataset.examples._stream.arrays)


@pytest.fixture
def tree(tmp_path):
    """A small library of 60 modules, with what must be left out."""
    root = tmp_path / "lib"
    for i in range(60):
        path = root / f"package{i % 4}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"VALUE = {i}\n" * (i + 1))
    for name in ("test/a.py", "package0/tests/b.py", "__pycache__/c.py", "site-packages/d.py", "_sysconfigdata_x.py", "e.so"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"left out: {name}")
    (root / "copy.py").write_text((root / "package0/module0.py").read_text())
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (root / "README.rst").write_text("prose")
    return root


def read(tree, skipped=None, **options):
    return list(python_source.documents(PythonSource(**options), [("standard_library", tree)], skipped=skipped))


def test_python_source_takes_code_and_prose_once_and_counts_what_it_leaves_out(tree):
    skipped = {}
    names = [document.name.removeprefix("standard_library/") for document in read(tree, skipped)]
    kept = {f"package{i % 4}/module{i}.py" for i in range(1, 60)} | {"copy.py", "README.rst"}
    assert set(names) == kept and names == sorted(names)
    assert skipped == {"duplicate": 1, "not_utf8": 1, "linked_directory": 0, "broken_link": 0}
    assert {"standard_library/test/a.py", "standard_library/package0/tests/b.py"} <= {d.name for d in read(tree, tests=True)}


def test_links_that_python_source_does_not_follow_are_counted_where_the_run_says_what_it_reads(tree, build, monkeypatch):
    (tree / "linked").symlink_to(tree / "package0", target_is_directory=True)
    (tree / "circle").symlink_to(tree, target_is_directory=True)
    (tree / "tests").symlink_to(tree / "package1", target_is_directory=True)  # left out by its name
    (tree / "gone.py").symlink_to(tree / "nowhere.py")
    (tree / "same.md").symlink_to(tree / "README.rst")
    monkeypatch.setattr(python_source, "roots", lambda which: [("standard_library", tree)])
    facts = build("python_source", held_out=0.3).description
    assert facts["skipped_files"] == {"duplicate": 2, "not_utf8": 1, "linked_directory": 2, "broken_link": 1}
    assert facts["train"]["documents"] + facts["validation"]["documents"] == 61
    assert "skipped 2 duplicate, 1 not utf8, 2 linked directory, 1 broken link" in data_line(facts)


@pytest.fixture
def installed(tree, tmp_path, monkeypatch):
    """Python with the small library, and with two directories of packages on its path, one of them twice."""
    packages, system = tree / "site-packages", tmp_path / "dist-packages"
    (packages / "wheel").mkdir()
    (packages / "wheel" / "a.py").write_text("A = 1")
    system.mkdir()
    (system / "b.py").write_text("B = 2")
    path = [str(entry) for entry in (tmp_path, packages, tree, system, packages)]
    monkeypatch.setattr(python_source, "sys", SimpleNamespace(path=path))
    monkeypatch.setattr(python_source, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(tree)}))
    return {"site_packages/d.py", "site_packages/wheel/a.py", "site_packages/b.py"}


def test_python_source_reads_the_installed_packages_alone_or_with_the_library(installed, build):
    library = {document.name for document in python_source.documents(PythonSource())}
    assert len(library) == 61 and all(name.startswith("standard_library/") for name in library)
    for which, expected in (("site_packages", installed), ("all", library | installed)):
        names = [document.name for document in python_source.documents(PythonSource(which=which))]
        assert set(names) == expected and len(names) == len(expected)
        facts = build("python_source", which=which, held_out=0.5).description
        assert facts["train"]["documents"] + facts["validation"]["documents"] == len(expected)


@pytest.mark.parametrize("which", ["site_packages", "all"])
def test_installed_packages_that_are_nowhere_are_an_error(installed, build, which):
    python_source.sys.path.clear()
    with pytest.raises(DataError, match=f"which = '{which}' reads installed packages, and sys.path has no site-packages"):
        build("python_source", which=which)


def test_python_source_holds_out_by_path_alone(tree):
    before = {document.name: document.held_out for document in read(tree, held_out=0.3)}
    assert 0 < sum(before.values()) < 40
    (tree / "package0" / "new.py").write_text("added")
    (tree / "package1" / "module1.py").write_text("changed")
    after = {document.name: document.held_out for document in read(tree, held_out=0.3)}
    assert before.items() <= after.items()


def test_python_source_stops_at_max_bytes_with_a_sample_of_all_packages(tree):
    documents = read(tree, max_bytes=3000)
    sizes = [len(document.data) for document in documents]
    assert 3000 <= sum(sizes) < 3000 + 60 * len("VALUE = 59\n")
    assert len({document.name.split("/")[1] for document in documents if "package" in document.name}) == 4
    held_out = sum(document.held_out for document in read(tree, max_bytes=9000, held_out=0.5))
    assert 0.2 < held_out / len(read(tree, max_bytes=9000)) < 0.8


def test_the_standard_library_is_read_and_fingerprinted(build):
    dataset = build("python_source")
    facts = dataset.description
    assert facts["python"] == platform.python_version()
    assert facts["train"]["bytes"] > 5e6 and 0.01 < facts["validation"]["bytes"] / facts["train"]["bytes"] < 0.15
    assert facts["fingerprint"] == build("python_source", 5).description["fingerprint"]
    assert dataset.vocab_size == 257 and dataset.token_bytes.tolist() == [1] * 256 + [0]
    json.dumps(facts)


def test_held_out_documents_are_not_trained_on(build, corpus):
    dataset = build("text_files")
    texts = [path.read_bytes() for path in sorted(corpus.iterdir())]
    train, held_out = training_text(dataset), held_out_text(dataset)
    assert all((text in train) != (text in held_out) for text in texts)
    assert len(train) + len(held_out) == sum(map(len, texts))


def test_the_split_of_text_files_does_not_depend_on_where_they_are(build, corpus, tmp_path):
    first = build("text_files")
    moved = corpus.rename(tmp_path / "moved")
    second = build("text_files", files=[str(moved / "*.txt")])
    assert held_out_text(first) == held_out_text(second) and first.fingerprint == second.fingerprint


def test_the_tail_of_one_file_can_be_held_out(build, tmp_path):
    path = tmp_path / "book.md"
    path.write_text("é" * 1000)
    dataset = build("text_files", files=[str(path)], split="tail", held_out=0.1)
    assert training_text(dataset) + held_out_text(dataset) == path.read_bytes()
    assert held_out_text(dataset).decode() == "é" * 100


def test_validation_files_are_the_validation_set(build, corpus, tmp_path):
    (tmp_path / "validation.txt").write_text("only here")
    dataset = build("text_files", validation_files=[str(tmp_path / "validation.txt")])
    assert held_out_text(dataset) == b"only here"
    assert len(training_text(dataset)) == sum(path.stat().st_size for path in corpus.iterdir())
    with pytest.raises(DataError, match=r"00\.txt matches both files and validation_files"):
        build("text_files", validation_files=[str(corpus / "0*.txt")])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_jsonl_and_parquet_are_the_same_documents(build, tmp_path, suffix, prose):
    texts = [prose(i, 30) for i in range(50)] + [""]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"body": item, "id": i}) for i, item in enumerate(texts)) + "\n\n")
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra text)")
        import pyarrow

        parquet.write_table(pyarrow.table({"body": texts}), path)
    dataset = build("text_files", files=[str(path)], field="body")
    facts = dataset.description
    assert facts["train"]["documents"] + facts["validation"]["documents"] == 50 and facts["empty_documents"] == 1
    assert len(training_text(dataset)) + len(held_out_text(dataset)) == sum(len(item.encode()) for item in texts)
    with pytest.raises(DataError, match=f"rows{suffix}.* 'text'"):
        build("text_files", files=[str(path)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', r"a\.jsonl, line 2 has no text"),
        ("a.jsonl", b'{"text": "x"\n', r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y\\ud83d"}\n', r"a\.jsonl, line 2 has half a surrogate pair, \\ud83d"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a Parquet file"),
        ("a.csv", b"x", r"a\.csv is none of \.txt"),
        ("a.txt", b"", "holds no text to train on"),
        ("a.txt", b"one document", "none of them was held out"),
    ],
)
def test_bad_files_are_named(build, tmp_path, name, content, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra text)")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build("text_files", files=[str(tmp_path / name)])


def test_validation_files_without_text_are_named_and_only_hints_that_apply_are_given(build, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    for i in range(7):
        (tmp_path / f"empty{i}.txt").write_bytes(b"")
    (tmp_path / "none.jsonl").write_text("\n")
    for files in (["empty0.txt"], ["none.jsonl"], ["empty0.txt", "none.jsonl"]):
        names = [str(tmp_path / name) for name in files]
        with pytest.raises(DataError) as caught:
            build("text_files", files=[str(tmp_path / "a.txt")], validation_files=names)
        assert f"no text is in the validation files ({', '.join(names)})" in str(caught.value)
        assert "give" not in str(caught.value) and "split" not in str(caught.value)
    with pytest.raises(DataError, match=r"empty4\.txt and 2 more\)"):
        build("text_files", files=[str(tmp_path / "a.txt")], validation_files=[str(tmp_path / "empty*.txt")])
    with pytest.raises(DataError, match="give validation files, a larger held_out, or split='tail'$"):
        build("text_files", files=[str(tmp_path / "a.txt")])
    with pytest.raises(DataError, match="give validation files, a larger held_out$"):
        build("text_files", files=[str(tmp_path / "a.txt")], split="tail", held_out=0.01)


def test_text_of_a_parquet_file_that_is_not_utf8_is_named(build, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra text)")
    import pyarrow.parquet as parquet

    held = pyarrow.array([b"one", b"\xff\xfe"]).buffers()
    parquet.write_table(pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, held)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, rows 0 to 1: the column 'text' holds text that is not UTF-8"):
        build("text_files", files=[str(tmp_path / "a.parquet")])


def test_a_glob_without_match_is_an_error(build, tmp_path):
    with pytest.raises(DataError, match=r"no file matches .*none\*\.txt"):
        build("text_files", files=[str(tmp_path / "none*.txt")])
    assert DataError.exit_code == 4


def mixture(build, shards, corpus, **options):
    texts = {"name": "text_files", "files": [str(corpus / "*.txt")], "held_out": 0.2, "weight": 3}
    tokens = {"name": "tokens", "directory": str(shards), "weight": 1}
    return build("mixture", sources=[texts, tokens], **options)


def test_a_mixture_gives_every_source_its_share_of_each_block(build, shards, corpus):
    mixed = mixture(build, shards, corpus).examples
    assert mixed.quotas == [3072, 1024]
    for first in (0, 5 * MIXTURE_BLOCK):
        located = [mixed.locate(example) for example in range(first, first + MIXTURE_BLOCK)]
        assert np.bincount([source for source, _ in located]).tolist() == mixed.quotas


def test_each_source_of_a_mixture_is_read_in_its_own_order_without_a_gap(build, shards, corpus):
    dataset = mixture(build, shards, corpus)
    mixed, seen = dataset.examples, [0, 0]
    for example in range(2 * MIXTURE_BLOCK + 100):
        source, number = mixed.locate(example)
        assert number == seen[source]
        seen[source] += 1
        if example % 997 == 0:
            assert mixed.positions(example + 1) == seen
    iterator = dataset.train()
    next(iterator)
    assert sum(iterator.get_state()["sources"]) == iterator.get_state()["examples"] == 4


def test_a_mixture_is_validated_on_all_its_sources(build, shards, corpus):
    dataset = mixture(build, shards, corpus)
    parts = [build("text_files"), build("tokens", directory=str(shards))]
    assert dataset.raw_validation() == b"".join(part.raw_validation() for part in parts)
    assert dataset.validation_bytes == len(dataset.raw_validation())
    assert len(dataset.held_out) == sum(len(part.held_out) for part in parts)


def test_a_saved_position_does_not_fit_other_weights(build, shards, corpus):
    texts = {"name": "text_files", "files": [str(corpus / "*.txt")]}
    states = []
    for weight in (1, 2):
        sources = [texts | {"weight": weight}, {"name": "tokens", "directory": str(shards)}]
        states.append(build("mixture", sources=sources))
    with pytest.raises(DataError, match="belongs to other data"):
        states[1].train(start_state=states[0].train().get_state())


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [1e-3, 1], [0.2, 0.3, 0.5], [1] * 3000])
def test_quotas_sum_to_a_block_and_are_within_one_of_the_weights(weights):
    counts = np.array(quotas(weights))
    assert counts.sum() == MIXTURE_BLOCK and counts.min() >= 1
    assert np.abs(counts - np.array(weights) / sum(weights) * MIXTURE_BLOCK).max() <= 1


@pytest.mark.parametrize(
    ("name", "tree", "path"),
    [
        ("text_files", {}, "files"),
        ("text_files", {"files": ["x.txt"], "held_out": 0}, "held_out"),
        ("python_source", {"held_out": 1.0}, "held_out"),
        ("python_source", {"which": "standard_libary"}, "which"),
        ("tokens", {}, "directory"),
        ("mixture", {}, "sources"),
        ("mixture", {"sources": [{"name": "python_source"}, {"name": "python_source", "weight": 1e-5}]}, "sources.1.weight"),
        ("mixture", {"sources": [{"name": "python_source", "batch_size": 3}]}, "sources.0.batch_size"),
        ("bigram", {"vocabulary": 4, "successors": 5}, "successors"),
        ("bigram", {"vocabulary": 65_536}, "vocabulary"),
        ("recall", {"sequence_length": 30, "pairs": 8}, "pairs"),
        ("recall", {"vocabulary": 9, "pairs": 5}, "pairs"),
        ("text_files", {"files": ["x.txt"], "sequence_length": 0}, "sequence_length"),
    ],
)
def test_options_that_cannot_work_are_problems(name, tree, path):
    _, found = resolve(lookup("data", name), tree)
    assert [problem.path for problem in found.problems] == [path]


def test_every_default_that_needs_no_files_is_valid():
    for name in ("python_source", "bigram", "recall"):
        assert not resolve(lookup("data", name), {})[1].problems


def test_options_are_read_without_jax_or_numpy():
    program = "import sys, trainer.data.options; print([m for m in ('jax', 'numpy', 'tokenizers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_missing_optional_package_is_named_with_its_extra(build, corpus, monkeypatch, bpe):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"strata-lm\[text\]"):
        build("text_files", tokenizer=str(bpe))
