"""The Python source on this machine as a corpus: real text that needs no network."""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from strata import DataError
from trainer.data.corpus import Corpus, Document, falls_in, pack
from trainer.data.options import PythonSource
from trainer.data.tokenizer import Tokenizer

SUFFIXES = (".py", ".txt", ".rst", ".md")
NOT_SOURCE = ("__pycache__", "site-packages", "dist-packages", "lib-dynload")
TESTS = ("test", "tests", "idle_test")
GENERATED = ("config-", "_sysconfigdata")
"""Beginnings of names that hold the settings of one particular build, with its paths."""


def roots(which: str) -> list[tuple[str, Path]]:
    """The directories to read as `(prefix of the relative path, directory)`.

    Raises:
      DataError: installed packages are asked for, and Python looks for none.
    """
    library = [("standard_library", Path(sysconfig.get_paths()["stdlib"]))]
    on_path = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    packages = [("site_packages", path) for path in dict.fromkeys(on_path)]
    if which != "standard_library" and not packages:
        raise DataError(f"python_source: which = {which!r} reads installed packages, and sys.path has no site-packages")
    return {"standard_library": library, "site_packages": packages, "all": library + packages}[which]


def list_files(
    directories: list[tuple[str, Path]], tests: bool, skipped: dict[str, int] | None = None
) -> list[tuple[str, Path]]:
    """Every source file as `(relative path, path)`, sorted by relative path.

    Args:
      directories: as from `roots`.
      tests: with the directories of tests.
      skipped: counts what is left out: `linked_directory`, whose files belong elsewhere, and `broken_link`.

    Raises:
      DataError: a directory is missing.
    """
    skipped = {} if skipped is None else skipped
    skipped.update(linked_directory=0, broken_link=0)
    found = []
    for prefix, directory in directories:
        if not directory.is_dir():
            raise DataError(f"python_source: {directory} is not a directory")
        found += [(f"{prefix}/{path.relative_to(directory).as_posix()}", path) for path in _walk(directory, tests, skipped)]
    return sorted(found)


def _walk(directory: Path, tests: bool, skipped: dict[str, int]) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.name in NOT_SOURCE or path.name.startswith(GENERATED) or (path.name in TESTS and not tests):
            continue
        if path.is_dir() and path.is_symlink():
            skipped["linked_directory"] += 1
        elif path.is_dir():
            yield from _walk(path, tests, skipped)
        elif path.suffix in SUFFIXES and path.is_file():
            yield path
        elif path.suffix in SUFFIXES and path.is_symlink():
            skipped["broken_link"] += 1


def documents(
    options: PythonSource,
    directories: list[tuple[str, Path]] | None = None,
    on_read: Callable[[int], None] = lambda size: None,
    skipped: dict[str, int] | None = None,
) -> Iterator[Document]:
    """Files as documents, sorted by relative path; of files with the same content only the first.

    Args:
      options: which files, and what fraction of them is held out (by a hash of the relative path).
      directories: as from `roots`, instead of those that `options.which` names.
      on_read: called with the bytes read.
      skipped: counts what is left out, as it is met: as `list_files` does, and the files `duplicate` and `not_utf8`.

    Raises:
      DataError: a file cannot be read.
    """
    skipped = {} if skipped is None else skipped
    skipped.update(duplicate=0, not_utf8=0)
    files = list_files(directories or roots(options.which), options.tests, skipped)
    chosen = _read(files, on_read, skipped)
    if options.max_bytes is not None:
        # A prefix of the sorted list would be a few packages from A to C; by hash it is a fair sample.
        # Another hash than the one that holds files out, or all the first ones would be held out.
        mixed = sorted(files, key=lambda item: hashlib.sha256(b"order " + item[0].encode()).digest())
        chosen = iter(sorted(_up_to(options.max_bytes, _read(mixed, on_read, skipped))))
    for name, data in chosen:
        yield Document(name, data, falls_in(name.encode(), options.held_out))


def _read(
    files: list[tuple[str, Path]], on_read: Callable[[int], None], skipped: dict[str, int]
) -> Iterator[tuple[str, bytes]]:
    seen = set()
    for name, path in files:
        try:
            data = path.read_bytes()
            data.decode()
        except UnicodeDecodeError:
            skipped["not_utf8"] += 1
            continue
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        on_read(len(data))
        digest = hashlib.sha256(data).digest()
        if data and digest in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(digest)
        yield name, data


def _up_to(limit: int, files: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    taken = 0
    for name, data in files:
        yield name, data
        taken += len(data)
        if taken >= limit:
            return


def read_corpus(options: PythonSource, tokenizer: Tokenizer) -> Corpus:
    """The corpus. Its fingerprint is over (relative path, side, size, SHA-256) of every file: Python versions differ in it."""
    skipped: dict[str, int] = {}
    description = {"kind": "python_source", "which": options.which, "python": platform.python_version()}
    files = documents(options, skipped=skipped)
    corpus = pack(files, tokenizer, f"python_source ({options.which})", description, named=True)
    corpus.description["skipped_files"] = skipped
    return corpus
