"""Documents from .txt, .md, .jsonl and .parquet files."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from strata import ConfigError, DataError
from trainer.data.corpus import Corpus, Document, falls_in, pack
from trainer.data.options import TextFiles
from trainer.data.tokenizer import Tokenizer

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


def matching(patterns: tuple[str, ...], option: str) -> list[Path]:
    """The files that globs match, each once, sorted.

    Raises:
      DataError: a glob matches no file, or matches a file of another kind.
    """
    found = set()
    for pattern in patterns:
        paths = [Path(path) for path in glob.glob(pattern, recursive=True)]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise DataError(f"{option}: no file matches {pattern!r} (seen from {Path.cwd()})")
        for path in paths:
            if path.suffix not in SUFFIXES:
                raise DataError(f"{option}: {path} is none of {', '.join(SUFFIXES)}; narrow the glob {pattern!r}")
        found.update(paths)
    return sorted(found)


def documents(options: TextFiles, on_read: Callable[[int], None] = lambda size: None) -> Iterator[Document]:
    """Every document of the training files, then of the validation files, in the order of their paths.

    Args:
      options: which files and how they are split.
      on_read: called with the bytes of file that were read.

    Raises:
      DataError: a file is missing, cannot be read or parsed, or is on both sides.
    """
    training = matching(options.files, "files")
    validation = matching(options.validation_files, "validation_files") if options.validation_files else []
    for path in sorted(set(map(Path.resolve, training)) & set(map(Path.resolve, validation))):
        raise DataError(f"{path} matches both files and validation_files")
    for path in training:
        for name, data in read_texts(path, options.field, on_read):
            if validation:
                yield Document(name, data, False)
            elif options.split == "documents":
                yield Document(name, data, falls_in(data, options.held_out))
            else:
                cut = _boundary(data, round(len(data) * (1 - options.held_out)))
                yield Document(name, data[:cut], False)
                yield Document(name, data[cut:], True)
    for path in validation:
        for name, data in read_texts(path, options.field, on_read):
            yield Document(name, data, True)


def _boundary(data: bytes, cut: int) -> int:
    """The nearest place at or before `cut` that does not split a UTF-8 character."""
    while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def read_texts(path: Path, field: str, on_read: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
    """The texts of one file as `(place, UTF-8 bytes)`. Raises DataError naming the file, and the line or row."""
    try:
        if path.suffix == ".jsonl":
            yield from _json_lines(path, field, on_read)
        elif path.suffix == ".parquet":
            yield from _parquet(path, field, on_read)
        else:
            data = path.read_bytes()
            on_read(len(data))
            yield str(path), data
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _json_lines(path: Path, field: str, on_read: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            on_read(len(line))
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}") from None
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{path}, line {number} has no text in the field {field!r} (data.field)")
            try:
                yield f"{path}, line {number}", text.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):04x}"
                raise DataError(f"{path}, line {number} has half a surrogate pair, {half}, which no UTF-8 can hold") from None


def _parquet(path: Path, field: str, on_read: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path} needs the package pyarrow, which is not installed: pip install 'strata-lm[text]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path} has no column {field!r} (data.field); it has {columns}")
            row, size, rows = 0, path.stat().st_size, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                try:
                    texts = batch.column(0).to_pylist()
                except UnicodeDecodeError:
                    rows_here = f"rows {row} to {row + batch.num_rows - 1}"
                    raise DataError(f"{path}, {rows_here}: the column {field!r} holds text that is not UTF-8") from None
                for text in texts:
                    if not isinstance(text, str):
                        raise DataError(f"{path}, row {row}: the column {field!r} holds no text")
                    yield f"{path}, row {row}", text.encode()
                    row += 1
                on_read(size * batch.num_rows // rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from None


def read_corpus(options: TextFiles, tokenizer: Tokenizer) -> Corpus:
    """The corpus of the files."""
    count = len(matching(options.files, "files"))
    unsplit = "none of them was held out; give validation files, a larger held_out"
    if options.validation_files:
        validation = [str(path) for path in matching(options.validation_files, "validation_files")]
        count += len(validation)
        more = f" and {len(validation) - 5} more" if len(validation) > 5 else ""
        unsplit = f"nothing is held out: no text is in the validation files ({', '.join(validation[:5])}{more})"
    elif options.split == "documents":
        unsplit += ", or split='tail'"
    description = {"kind": "text_files", "files": count, "split": options.split}
    return pack(documents(options), tokenizer, f"text_files ({', '.join(options.files)})", description, unsplit=unsplit)
