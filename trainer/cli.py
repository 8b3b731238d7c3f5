"""The front door: `python -m trainer --config FILE[:ARG] [--config.path.to.key=value ...] [--workdir DIR]`."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from strata import ConfigError
from trainer import config as configuration

USAGE = """\
usage: python -m trainer --config FILE[:ARG] [--config.path.to.key=value ...] [--workdir DIR]

  --config FILE[:ARG]       a config with get_config(arg), or a run's own config.json
  --config.KEY=VALUE        override one field, such as --config.model.layers=8
  --workdir DIR             run directory (default runs/<config name>-<id>); an existing run of the same config goes on
  --validate                check the config and stop, without loading JAX
  --print_config            print the resolved config as JSON, which can be run again
  --dry_run                 print parameters, FLOPs, memory and the optimizer's assignment, and stop
  --fields [PATH]           list every field of the config, or of one part of it, with type, default and help
  --coordinator HOST:PORT   several processes: address of the first one (Slurm is found by itself)
  --process_count N  --process_index I
"""

FLAGS = ("validate", "print_config", "dry_run", "help")
VALUES = ("config", "workdir", "coordinator", "process_count", "process_index", "fields")


@dataclasses.dataclass
class Arguments:
    """The command line, taken apart."""

    values: dict[str, str]
    flags: set[str]
    overrides: list[tuple[str, str]]


def parse(argv: Sequence[str]) -> Arguments:
    """Take the command line apart. Raises `ConfigError` with every unknown or incomplete argument."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    overrides: list[tuple[str, str]] = []
    wrong: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        if word in ("-h",):
            flags.add("help")
        elif not word.startswith("--"):
            wrong.append(f"{word!r} is not a flag; flags start with --")
        elif name in FLAGS:
            if equals:
                wrong.append(f"--{name} takes no value")
            flags.add(name)
        elif name == "fields" and not equals:
            values["fields"] = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        elif name in VALUES or name.startswith("config."):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    wrong.append(f"--{name} needs a value: --{name}=...")
                    continue
                value = rest.pop(0)
            if name in ("config", "workdir") and not value:
                wrong.append(f"--{name} is empty")
            elif values.get(name, value) != value:
                wrong.append(f"--{name} is given twice, as {values[name]} and as {value}")
            elif name in VALUES:
                values[name] = value
            else:
                overrides.append((name.removeprefix("config."), value))
        else:
            near = difflib.get_close_matches(name, [*FLAGS, *VALUES], n=1, cutoff=0.5)
            hint = f"; did you mean --{near[0]}?" if near else f"; a config field is --config.{name}"
            wrong.append(f"unknown flag --{name}{hint}")
    if overrides and "config" not in values and "help" not in flags:
        shown = f"--config.{overrides[0][0]}={overrides[0][1]}"
        wrong.append(f"{shown} overrides a field of a config, but there is no config: add --config FILE")
    if wrong:
        raise ConfigError("; ".join(wrong) + "\n" + USAGE)
    return Arguments(values, flags, overrides)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse(argv)
    if "help" in arguments.flags:
        print(USAGE, end="")
        return 0
    if "fields" in arguments.values:
        from trainer.config.fields import describe_fields

        print(describe_fields(arguments.values["fields"]))
        return 0
    if "config" not in arguments.values:
        raise ConfigError("no config given: python -m trainer --config configs/tiny.py\n" + USAGE)
    loaded = configuration.load(arguments.values["config"], arguments.overrides)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    if "print_config" in arguments.flags:
        print(configuration.canonical_json(loaded.config), end="")
        return 0
    if "validate" in arguments.flags:
        print(f"{loaded.source} is valid; run id {configuration.run_id(loaded.config)}")
        return 0
    from trainer import devices

    devices.start(
        loaded.config,
        coordinator=arguments.values.get("coordinator"),
        process_count=_whole(arguments, "process_count"),
        process_index=_whole(arguments, "process_index"),
    )
    if "dry_run" in arguments.flags:
        from trainer.dry_run import dry_run

        dry_run(loaded.config)
        return 0
    from trainer.loop import train

    workdir = arguments.values.get("workdir")
    origin = {"config": loaded.source, "name": loaded.name, "overrides": [list(pair) for pair in loaded.overrides]}
    train(
        loaded.config,
        Path(workdir) if workdir else Path("runs") / f"{loaded.name}-{configuration.run_id(loaded.config)}",
        origin=origin,
    )
    return 0


def _whole(arguments: Arguments, name: str) -> int | None:
    text = arguments.values.get(name)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise ConfigError(f"--{name} = {text}: expected a whole number")
    return int(text)
