"""`python -m trainer.diff RUN_A RUN_B`: what differs between two runs, in config, environment and result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> int:
    """The command line; exits 0 whether or not the runs differ."""
    parser = argparse.ArgumentParser(prog="python -m trainer.diff", description=__doc__)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="run directory")
    arguments = parser.parse_args(argv)
    from strata import ConfigError
    from trainer import config as configuration
    from trainer.run_directory import RunDirectory

    before, after = (Path(run) for run in arguments.runs)
    for directory in (before, after):
        if not (directory / "config.json").is_file():
            raise ConfigError(f"{directory} has no config.json, so it is not a run directory")
    one, two = (configuration.load(str(directory / "config.json")).config for directory in (before, after))
    found = configuration.compare(one, two)
    print(f"config: {len(found)} fields differ ({configuration.run_id(one)} and {configuration.run_id(two)})")
    for difference in found:
        print(f"  {difference}  [{difference.key}]")
    environments = (RunDirectory(directory).read_json("environment.json") for directory in (before, after))
    _print_differences("environment", *(_flat(environment or {}) for environment in environments))
    _print_differences("result", _last_rows(before), _last_rows(after))
    return 0


def _print_differences(title: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    paths = [path for path in sorted(one.keys() | two.keys()) if one.get(path) != two.get(path)]
    print(f"{title}: {len(paths)} entries differ")
    for path in paths:
        print(f"  {path}: {_short(one.get(path))} -> {_short(two.get(path))}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, item in tree.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}


def _last_rows(directory: Path) -> dict[str, Any]:
    """The last row of each split, without what may differ between two runs of one config."""
    from trainer.metrics.jsonl import read_metrics

    path = directory / "metrics.jsonl"
    last = {row["split"]: row for row in read_metrics(path)} if path.is_file() else {}
    return {
        f"{split}.{name}": value
        for split, row in last.items()
        for name, value in row.items()
        if name not in ("timing", "split")
    }


if __name__ == "__main__":
    from trainer.command import run

    run(main)
