"""Text to token shards, in a way that can be killed at any moment and started again, with the same bytes in the end.

What has been done is known from `progress.json`, which is replaced after every finished shard: for each side the shards
so far, and the document and token at which its next shard begins. Documents before that are read again but not tokenized.

What is listed is believed only after it was read: a side whose shard is missing or damaged is written again from there on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from strata import DataError
from trainer.data import shards
from trainer.data.corpus import Document, Tally, described, encoded, is_exact
from trainer.data.dataset import fingerprint
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokens import INDEX, PROGRESS, open_shard, read_index

SIDES = {False: "train", True: "validation"}


class _Side:
    """The shards of one side."""

    def __init__(self, name: str, saved: dict[str, Any]):
        self.name = name
        self.shards: list[dict[str, Any]] = saved.get("shards", [])
        self.document: int = saved.get("document", 0)  # where the next shard begins: number of the document
        self.offset: int = saved.get("offset", 0)  # and tokens from its beginning, which later documents go on with
        self._passing = self.offset  # tokens to come that are in a shard already
        self._waiting: list[tuple[int, int, np.ndarray]] = []  # (document, offset of its first token, tokens)
        self.held = 0

    def add(self, number: int, tokens: np.ndarray) -> None:
        """Take the tokens of document `number`, those that are not in a shard yet."""
        passed = min(self._passing, len(tokens))
        self._passing -= passed
        if passed < len(tokens):
            self._waiting.append((number, passed, tokens[passed:]))
            self.held += len(tokens) - passed

    def take(self, count: int) -> np.ndarray:
        """Remove `count` tokens from the front and move the place where the next shard begins behind them."""
        taken, left = [], count
        while left:
            number, offset, tokens = self._waiting.pop(0)
            taken.append(tokens[:left])
            if len(tokens) > left:
                self._waiting.insert(0, (number, offset + left, tokens[left:]))
                self.document, self.offset = number, offset + left
            else:
                self.document, self.offset = number + 1, 0
            left -= len(taken[-1])
        self.held -= count
        return np.concatenate(taken)

    def roll_back(self, directory: Path) -> str | None:
        """Forget the shards from the first one on that is not on the disk as it was written, and say which that is."""
        for count, entry in enumerate(self.shards):
            try:
                open_shard(directory / entry["file"], entry, check=True)
            except DataError as error:
                self.shards = self.shards[:count]
                self.document, self.offset = 0, sum(entry["tokens"] for entry in self.shards)
                self._passing = self.offset
                return str(error)
        return None

    def state(self) -> dict[str, Any]:
        """What `progress.json` keeps."""
        return {"shards": self.shards, "document": self.document, "offset": self.offset}


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    shard_tokens: int,
    settings: dict[str, Any],
    description: dict[str, Any],
    on_shard: Callable[[str], None] = lambda name: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Tokenize documents into shards of `shard_tokens` tokens and an index.

    Args:
      documents: the same ones in the same order at every call with the same settings.
      tokenizer: its separator opens every document.
      directory: where the shards go; made if need be. A finished directory of the same settings is left as it is, but for
        shards that are missing or damaged, which are written again.
      shard_tokens: tokens in every shard but the last of each side.
      settings: JSON-able; everything that decides the outcome, compared when going on with earlier work.
      description: JSON-able; kept in the index.
      on_shard: called with the file name of each shard as it is finished.
      say: called with sentences on what was found in the directory.

    Returns:
      The index.

    Raises:
      DataError: the directory holds the work of other settings, or a side has no text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    chosen = fingerprint(settings | {"shard_tokens": shard_tokens, "vocabulary": tokenizer.fingerprint})
    earlier = next((path for name in (INDEX, PROGRESS) if (path := directory / name).is_file()), None)
    written = _load(earlier, chosen) if earlier else {}
    finished = earlier == directory / INDEX
    try:
        saved = _as_progress(read_index(directory)) if finished else written
        sides = {side: _Side(name, saved.get(name, {})) for side, name in SIDES.items()}
        broken = [(side.name, problem) for side in sides.values() if (problem := side.roll_back(directory))]
    except (AttributeError, KeyError, TypeError):
        raise _damaged(earlier) from None
    if finished and not broken:
        say(f"{directory} is finished already")
        return written
    for name, problem in broken:
        say(f"{problem}; the {name} shards are written again from there on")
    tally, exact = Tally(), saved.get("exact", True)

    def save() -> None:
        state = {side.name: side.state() for side in sides.values()}
        _save(directory / PROGRESS, state | {"settings": chosen, "exact": exact})

    if broken:
        save()
        (directory / INDEX).unlink(missing_ok=True)

    def flush(side: _Side, count: int) -> None:
        name = f"{side.name}-{len(side.shards):05d}.tokens"
        header = shards.write_shard(directory / name, side.take(count), tokenizer)
        side.shards.append({"file": name, "tokens": header.count, "sha256": header.checksum})
        save()
        on_shard(name)

    def unfinished() -> Iterator[Document]:
        for number, document in enumerate(tally(documents)):
            if number >= sides[document.held_out].document:
                numbers.append(number)
                yield document

    numbers: list[int] = []  # of the documents that went to the tokenizer and have not come back
    for document, tokens in encoded(unfinished(), tokenizer):
        side = sides[document.held_out]
        side.add(numbers.pop(0), tokens)
        if document.held_out:
            exact = exact and is_exact(document, tokens, tokenizer)
        while side.held >= shard_tokens:
            flush(side, shard_tokens)
    for side in sides.values():
        if side.held:
            flush(side, side.held)
        if not side.shards:
            count = sum(tally.documents.values())
            raise DataError(f"no text for the {side.name} shards in {directory}: {count} documents in all")
    tokens = {key: sum(shard["tokens"] for shard in side.shards) for key, side in sides.items()}
    index = {side.name: {"shards": side.shards} for side in sides.values()}
    index["vocabulary"] = tokenizer.fingerprint
    index["settings"] = chosen
    index["description"] = described(description | {"tokenizer": tokenizer.name}, tally, tokens, exact)
    _save(directory / INDEX, index)
    (directory / PROGRESS).unlink(missing_ok=True)
    return index


def _load(path: Path, settings: str) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
    except ValueError:
        raise _damaged(path) from None
    if not isinstance(state, dict):
        raise _damaged(path)
    if state.get("settings") != settings:
        raise DataError(
            f"{path} belongs to other work: the files, the tokenizer or the settings differ. "
            f"Give another --out, or remove {path.parent}"
        )
    return state


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged; remove the directory and write it again")


def _as_progress(index: dict[str, Any]) -> dict[str, Any]:
    """What `progress.json` was when the index was written: both sides are behind their last document."""
    facts = index["description"]
    behind = sum(facts[name]["documents"] for name in SIDES.values())
    sides = {name: {"shards": index[name]["shards"], "document": behind} for name in SIDES.values()}
    return sides | {"exact": facts["bytes_exact"]}


def _save(path: Path, state: dict[str, Any]) -> None:
    shards.replace_durably(path, json.dumps(state, indent=1, sort_keys=True).encode())
