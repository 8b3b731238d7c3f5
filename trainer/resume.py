"""May this config go on in that run directory, and what does it change?"""

from __future__ import annotations

from pathlib import Path

from strata import ConfigError
from trainer import config as configuration
from trainer.options import Config

NOT_BIT_EXACT = "the run goes on, but not bit for bit as it would have"


def check(directory: Path, wanted: Config) -> list[str]:
    """Compare a config with the one in `config.json`.

    Returns:
      Notes for the user: defaults added since, and those of `compare`.

    Raises:
      ConfigError: as `compare`.
    """
    loaded = configuration.load(str(directory / "config.json"))
    return [*loaded.notes, *compare(directory, loaded.config, wanted)]


def compare(directory: Path, before: Config, wanted: Config) -> list[str]:
    """Compare a config with the one that a run directory was made with.

    Returns:
      Notes for the user: execution keys that changed, a run that is extended.

    Raises:
      ConfigError: a semantic key differs, with every difference.
    """
    notes = []
    differences = configuration.compare(before, wanted)
    refused = [str(d) for d in differences if d.key == "semantic" and d.path != "train.steps"]
    steps = next((d for d in differences if d.path == "train.steps"), None)
    if steps is not None:
        refused += _steps(before, wanted, steps)
        if steps.after > steps.before and not refused:
            notes.append(f"the run is extended from {steps.before} to {steps.after} steps")
    if refused:
        raise ConfigError(
            f"{directory} belongs to another config; what it has -> what was asked for:\n"
            + "".join(f"  {line}\n" for line in refused)
            + "Give another --workdir, or none to get one of its own."
        )
    execution = [str(d) for d in differences if d.key == "execution"]
    if execution:
        notes.append(f"{', '.join(execution)}: {NOT_BIT_EXACT}")
    return notes


def _steps(before: Config, after: Config, difference: configuration.Difference) -> list[str]:
    parts = configuration.depends_on_steps(after)
    if parts:
        return [f"{difference} (the {' and the '.join(parts)} depends on train.steps: up to here it was another)"]
    if difference.after < difference.before:
        return [f"{difference} (a run can be extended, not shortened)"]
    return []
