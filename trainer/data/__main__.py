"""Tokenizers and token shards from the command line.

    python -m trainer.data tokenizer --vocab_size 8192 --out tokenizer.json SOURCE...
    python -m trainer.data write --tokenizer tokenizer.json --out DIR SOURCE...
    python -m trainer.data inspect DIR_OR_SHARD...
    python -m trainer.data verify DIR_OR_SHARD...

A SOURCE is a glob of .txt, .md, .jsonl and .parquet files, or python_source, python_source:site_packages or
python_source:all. Writing shards can be interrupted; the same command goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import strata
from strata import ConfigError, DataError, StrataError
from trainer.data import python_source, shards, text_files
from trainer.data.corpus import Document, skip_words
from trainer.data.options import PythonSource, TextFiles
from trainer.data.tokenizer import SEPARATORS, load_tokenizer, train_bpe
from trainer.data.tokens import open_shard, read_index
from trainer.data.write import write_shards


@dataclasses.dataclass(frozen=True)
class Source:
    """The documents that the command line names.

    Attributes:
      description: JSON-able; the kind and the options.
      files: every file with its size and time of change, which tell whether earlier work is of the same files.
      documents: all documents in order; calls its argument with the bytes of file read so far.
      skipped: files that were left out by reason, counted as `documents` is read; empty for a kind that leaves none out.
    """

    description: dict[str, Any]
    files: list[tuple[str, int, int]]
    documents: Callable[[Callable[[int], None]], Iterator[Document]]
    skipped: dict[str, int]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size, _ in self.files)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a wrong command line, 4 for missing or damaged data, 75 for shards that
    were interrupted and can be gone on with."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("tokenizer", help="train a byte-level BPE and write it as a tokenizer.json")
    train.add_argument("--vocab_size", type=int, required=True, help="ids in all: 256 bytes, a separator, and the merges")
    train.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    train.add_argument("--max_bytes", type=int, help="train on this many bytes of text, from the beginning")
    train.set_defaults(run=train_tokenizer)
    write = commands.add_parser("write", help="write token shards and their index")
    write.add_argument("--tokenizer", default="bytes", help="bytes, or a tokenizer.json (default: bytes)")
    write.add_argument("--out", type=Path, required=True, help="the directory to write")
    write.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard (default: 100,000,000)")
    write.set_defaults(run=write_directory)
    for command in (train, write):
        command.add_argument("source", nargs="+", metavar="SOURCE", help="globs, or python_source[:which]")
        command.add_argument("--validation_files", nargs="*", default=[], help="globs of validation files")
        command.add_argument("--held_out", type=float, default=0.05, help="fraction held out otherwise (default: 0.05)")
        command.add_argument("--split", default="documents", help="documents or tail: what is held out (default: documents)")
        command.add_argument("--field", default="text", help="field or column that holds the text (default: text)")
    for name, run, text in (
        ("inspect", inspect, "say what directories and shards hold, from their headers"),
        ("verify", verify, "read every shard and compare it with its checksum"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", nargs="+", type=Path, metavar="DIR_OR_SHARD")
        command.set_defaults(run=run)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except StrataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if chosen.run is write_directory:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 75
        print("stopped; nothing was written, and the same command begins again", file=sys.stderr)
        return 130
    return 0


def find_source(chosen: argparse.Namespace) -> Source:
    """The source of a command line. Raises ConfigError for options that cannot be, DataError for missing files."""
    first, _, which = chosen.source[0].partition(":")
    if first == "python_source" and len(chosen.source) == 1:
        if chosen.validation_files:
            raise ConfigError("--validation_files goes with globs of files; python_source holds files out by their path")
        options = _resolved(PythonSource, {"which": which or "standard_library", "held_out": chosen.held_out})
        skipped: dict[str, int] = {}
        files = [path for _, path in python_source.list_files(python_source.roots(options.which), options.tests)]
        return Source(
            {"kind": "python_source", "python": platform.python_version(), **strata.to_tree(options)},
            _stamps(files),
            lambda on_read: python_source.documents(options, on_read=on_read, skipped=skipped),
            skipped,
        )
    tree = {name: getattr(chosen, name) for name in ("validation_files", "held_out", "split", "field")}
    options = _resolved(TextFiles, tree | {"files": chosen.source})
    files = text_files.matching(options.files, "SOURCE")
    if options.validation_files:
        files += text_files.matching(options.validation_files, "--validation_files")
    return Source(
        {"kind": "text_files", **strata.to_tree(options)},
        _stamps(files),
        lambda on_read: text_files.documents(options, on_read),
        {},
    )


def _resolved(cls: type, tree: dict[str, Any]) -> Any:
    options, found = strata.resolve(cls, tree)
    if found.problems:
        raise ConfigError(found.problems, "the command line")
    return options


def _stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    stats = [(str(path), path.stat()) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over bytes of input; plain lines every ten seconds where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    if sys.stderr.isatty():
        columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda size: bar.advance(task, size)
        return
    done, said = 0, time.monotonic()

    def plain(size: int) -> None:
        nonlocal done, said
        done += size
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{title}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr)

    yield plain


def train_tokenizer(chosen: argparse.Namespace) -> None:
    """`tokenizer`: train a BPE on the training documents."""
    if chosen.vocab_size < 257:
        raise ConfigError(f"--vocab_size {chosen.vocab_size} is too small: 256 bytes and a separator are 257 ids")
    if chosen.max_bytes is not None and chosen.max_bytes < 1:
        raise ConfigError(f"--max_bytes {chosen.max_bytes}: expected 1 or more")
    source = find_source(chosen)
    limit = math.inf if chosen.max_bytes is None else chosen.max_bytes
    with progress_bar("reading text", min(limit, source.bytes)) as advance:

        def texts() -> Iterator[str]:
            taken = 0
            for document in source.documents(advance):
                if document.data and not document.held_out:
                    yield document.data.decode(errors="replace")
                    taken += len(document.data)
                if taken >= limit:
                    return

        read = texts()
        first = next(read, None)
        if first is None:
            raise DataError(f"{' '.join(chosen.source)} holds no text to train a tokenizer on")
        train_bpe(itertools.chain([first], read), chosen.vocab_size, chosen.out)
    tokenizer = load_tokenizer(str(chosen.out))
    print(
        f"{chosen.out}: {tokenizer.vocab_size} ids, separator {SEPARATORS[0]} = {tokenizer.separator}, "
        f"vocabulary {tokenizer.fingerprint[:12]}{_skips(source.skipped)}"
    )
    if tokenizer.vocab_size < chosen.vocab_size:
        words = f"the text gives no more merges than these {tokenizer.vocab_size} ids; {chosen.vocab_size:,} were asked for"
        print(f"note: {words}", file=sys.stderr)


def write_directory(chosen: argparse.Namespace) -> None:
    """`write`: tokenize a source into a directory of shards."""
    if chosen.shard_tokens < 1:
        raise ConfigError(f"--shard_tokens {chosen.shard_tokens}: a shard holds at least 1 token")
    source, tokenizer = find_source(chosen), load_tokenizer(chosen.tokenizer)
    with progress_bar("writing shards", source.bytes) as advance:
        index = write_shards(
            source.documents(advance),
            tokenizer,
            chosen.out,
            shard_tokens=chosen.shard_tokens,
            settings=source.description | {"files": source.files},
            description=source.description | {"skipped_files": source.skipped},  # complete when the last document is read
            say=lambda text: print(text, file=sys.stderr),
        )
    _print_index(chosen.out, index)


def inspect(chosen: argparse.Namespace) -> None:
    """`inspect`: headers only."""
    for path, entry in _all_shards(chosen.path):
        header = open_shard(path, entry, check=False)[0] if entry else shards.read_header(path)
        _print_shard(path, header, "")


def verify(chosen: argparse.Namespace) -> None:
    """`verify`: every byte."""
    for path, entry in _all_shards(chosen.path):
        header = open_shard(path, entry, check=True)[0] if entry else shards.verify(path)
        _print_shard(path, header, "  checksum ok")


def _all_shards(paths: list[Path]) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no {path}")
        if path.is_dir():
            index = read_index(path)
            _print_index(path, index)
            for split in ("train", "validation"):
                yield from ((path / entry["file"], entry) for entry in index[split]["shards"])
        else:
            yield path, None


def _print_index(directory: Path, index: dict[str, Any]) -> None:
    facts = index["description"]
    for split in ("train", "validation"):
        counts = facts[split]
        print(
            f"{directory}: {split} {len(index[split]['shards'])} shards, {counts['tokens']:,} tokens, "
            f"{counts['bytes']:,} bytes, {counts['documents']:,} documents"
        )
    print(
        f"{directory}: tokenizer {facts['tokenizer']}, vocabulary {index['vocabulary'][:12]}, text {facts['fingerprint'][:12]}"
        f"{_skips(facts.get('skipped_files', {}))}"
    )


def _skips(counts: dict[str, int]) -> str:
    return f", {words}" if (words := skip_words(counts)) else ""


def _print_shard(path: Path, header: shards.Header, note: str) -> None:
    print(
        f"{path}: {header.count:,} tokens of {header.itemsize} bytes, {header.vocab_size} ids, "
        f"vocabulary {header.vocabulary[:12]}, sha256 {header.checksum[:12]}{note}"
    )


if __name__ == "__main__":
    sys.exit(main())
