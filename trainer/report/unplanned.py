"""The results of run directories that no plan names, grouped by config; no arms were declared and no claim is decided."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from strata import ConfigError
from trainer.report.records import make_record, read_json
from trainer.report.results import Results
from trainer.sweep.changes import flat
from trainer.sweep.experiment import Arm, Metric
from trainer.sweep.outcome import outcome
from trainer.sweep.space import label


def of_directory(path: Path) -> Results:
    """Every run directory below `path`, grouped by config; no claims."""
    found: dict[tuple[str, str], list[tuple[int, Path, dict[str, Any]]]] = {}
    notes = []
    for file in sorted(path.glob("*/config.json")):
        config = read_json(file)
        if _sizes(config) is None:
            notes.append(f"{file} is not the config of a run; what is beside it is left out")
            continue
        group = json.dumps({k: v for k, v in config.items() if k not in ("seed", "log", "checkpoint")}, sort_keys=True)
        name = file.parent.name.split("-")[0]
        found.setdefault((name, group), []).append((config["seed"], file.parent, config))
    if not found:
        raise ConfigError(f"{path} is neither a sweep (no plan.json) nor a directory of run directories")
    configs = {key: {p: v for p, v in flat(json.loads(key[1])).items()} for key in found}
    varying = {
        p for one in configs.values() for p in one if any(other.get(p, "absent") != one[p] for other in configs.values())
    }
    records, arms, taken = [], [], set()
    for key, members in found.items():
        shown = {p: configs[key][p] for p in sorted(varying) if p in configs[key]}
        name = f"{key[0]} {label(shown)}".strip() if len(found) > 1 else key[0]
        while name in taken:
            name += "'"
        taken.add(name)
        arms.append(Arm(name))
        by_seed: dict[int, Path] = {}
        for seed, directory, _ in members:
            if by_seed.setdefault(seed, directory) != directory:
                both = f"{by_seed[seed].name} and {directory.name}"
                raise ConfigError(
                    f"{both} in {path} are one run, of seed {seed}, which would count twice: move one of them away"
                )
        for seed, directory, config in sorted(members, key=lambda member: (member[0], str(member[1]))):
            steps, tokens = _sizes(config)
            records.append(
                make_record(
                    directory,
                    outcome(directory, steps),
                    arm=name,
                    seed=seed,
                    stage="compare",
                    point="",
                    config=config,
                    command=f"python -m trainer --config {directory / 'config.json'} --workdir ANOTHER",
                    steps=steps,
                    tokens=tokens,
                )
            )
    seeds = tuple(sorted({record.seed for record in records}))
    return Results(
        title=path.resolve().name,
        question="",
        scale="as found",
        note="run directories without a plan: no arms were declared and no claim is decided",
        metric=Metric(unit="nats/token"),
        also=(),
        claims=(),
        arms=arms,
        records=records,
        seeds=seeds,
        notes=notes,
        source=str(path),
        command=f"python -m trainer.report {path}",
    )


def _sizes(config: Any) -> tuple[int, int] | None:
    """Steps and tokens of a run's config, zero of a measurement's; None where it is no config of a run."""
    if not (isinstance(config, dict) and isinstance(config.get("seed"), int)):
        return None
    train, data = config.get("train", {}), config.get("data", {})
    if not (isinstance(train, dict) and isinstance(data, dict)):
        return None
    sizes = [train.get("steps", 0), data.get("batch_size", 0), data.get("sequence_length", 0)]
    return (sizes[0], math.prod(sizes)) if all(isinstance(size, int) for size in sizes) else None
