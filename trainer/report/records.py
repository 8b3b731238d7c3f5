"""One run: what its directory holds, and what it was made with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import StrataError
from trainer.metrics.jsonl import read_metrics
from trainer.sweep.outcome import Outcome


@dataclasses.dataclass
class Record:
    """One run.

    Attributes:
      rows: of `metrics.jsonl`; empty for a run that has none.
      versions: of the code, one a start; more than one for a run that went on under other code.
      modules: digests of plugins and of a measurement's module, likewise, as `(name, digest)`.
      machine: in words.
      numbers: of a run that only an earlier report knows: by label of a metric, as `Results.values` gives them.
    """

    arm: str
    seed: int
    stage: str
    point: str
    directory: Path
    found: Outcome
    config: Mapping[str, Any]
    command: str
    steps: int
    tokens: int
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    versions: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    machine: str = ""
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, tuple[float, bool]] = dataclasses.field(default_factory=dict)

    @property
    def extended_from(self) -> int | None:
        """The updates that were planned, of a run that went on beyond them."""
        return self.found.extended_from(self.steps)

    @property
    def state(self) -> str:
        """One of `trainer.sweep.outcome.STATES`."""
        return self.found.state


def make_record(directory: Path, found: Outcome, **fields: Any) -> Record:
    """Of a run directory, with what its files say; `fields` are what a plan knows of it."""
    record = Record(directory=directory, found=found, **fields)
    if (directory / "metrics.jsonl").is_file():
        try:
            rows = read_metrics(directory / "metrics.jsonl")
            record.rows = [row for row in rows if not record.steps or row["step"] <= record.steps]  # it may have been extended
        except StrataError as error:
            record.found = Outcome("failed", found.step, str(error))
    starts = [read_json(directory / "environment.json")]
    try:
        starts += [json.loads(line) for line in (directory / "environment.resumed.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        pass
    starts = [start for start in starts if isinstance(start, dict)]
    if starts:
        record.environment = starts[0]
        record.versions = tuple(dict.fromkeys(code_version(start) for start in starts))
        record.modules = tuple(dict.fromkeys(pair for start in starts for pair in start.get("modules", {}).items()))
        record.machine = "; then ".join(dict.fromkeys(machine(start) for start in starts))
    return record


def code_version(environment: Mapping[str, Any]) -> str:
    """The source that a run was started with: revision, and a digest of what was changed in it, files that git does not track
    included.
    """
    source = environment.get("source")
    if not source:
        return f"not in git, strata {environment.get('packages', {}).get('strata-lm', 'of unknown version')}"
    revision = (source.get("revision") or "no revision")[:10]
    if not source.get("diff") and not source.get("untracked"):
        return revision
    changed = json.dumps([source.get("diff"), source.get("untracked"), *([own] if (own := source.get("contents")) else [])])
    return f"{revision} with changes {hashlib.sha256(changed.encode()).hexdigest()[:6]}"


def machine(environment: Mapping[str, Any]) -> str:
    """Devices, processors and the versions that decide numbers."""
    devices, packages = environment.get("devices", {}), environment.get("packages", {})
    processor = environment.get("processor")  # not recorded by runs of earlier versions
    cpus = f"{environment.get('cpus')} CPUs" + (f" of {processor}" if processor else "")
    words = [f"{devices.get('count')} x {devices.get('kind')}", cpus]
    words += [f"jax {packages.get('jax')}", f"Python {environment.get('python')}"]
    return ", ".join(words)


def read_json(path: Path) -> Any:
    """None for a file that is not there, or is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
