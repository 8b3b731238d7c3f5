"""Options of `--submitit.NAME=VALUE`: those of submitit's `AutoExecutor.update_parameters`, and `cluster`. Imports no JAX."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from strata import ConfigError
from trainer.sweep.slots import visible_gpus

SEVERAL = ("nodes", "ntasks", "ntasks_per_node", "tasks_per_node")
"""What would give a run more than one process."""
LISTS = ("setup", "srun_args")
"""What submitit takes as a list, and would read a text of as its characters."""
WEEK = 7 * 24 * 60


def check_options(options: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The cluster, and what its executor is given.

    Args:
      options: as typed. `cluster`, default: the one that submitit finds here; values are read as JSON where they are JSON.

    Raises:
      ConfigError: submitit is missing, knows no such cluster, refuses an option, or would misread it.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("--launcher submitit needs submitit: pip install -e '.[sweep]'") from None
    found = {name: _value(text) for name, text in options.items() if name != "cluster"}
    cluster = options.get("cluster") or submitit.AutoExecutor.which()
    if cluster == "debug":
        raise ConfigError("--submitit.cluster=debug runs jobs within the launcher; local makes processes of them")
    if cluster == "local" and visible_gpus():
        raise ConfigError("--submitit.cluster=local does not share out the GPUs here; --launcher local does")
    for name, value in found.items():
        plain = name.removeprefix(f"{cluster}_")
        inside = value.keys() if plain == "additional_parameters" and isinstance(value, dict) else ()
        if (plain in SEVERAL and value != 1) or set(SEVERAL) & {str(key).replace("-", "_") for key in inside}:
            raise ConfigError(f"--submitit.{name}: a job here is one process; --launcher slurm starts several with srun")
        if plain in LISTS and not isinstance(value, list):
            raise ConfigError(f"--submitit.{name}={value}: expected a list, such as '[\"module load cuda\"]'")
        if plain in ("time", "timeout_min") and type(value) is not int:
            raise ConfigError(f"--submitit.{name}={value}: expected whole minutes")
    try:
        with tempfile.TemporaryDirectory() as folder:
            submitit.AutoExecutor(folder=folder, cluster=cluster).update_parameters(**found)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"--submitit.*: {error}") from None
    if not {"timeout_min", f"{cluster}_time", f"{cluster}_timeout_min"} & found.keys():
        if cluster != "local":
            raise ConfigError("--submitit.timeout_min=MINUTES is missing: how long a job may take (submitit would say 5)")
        found["timeout_min"] = WEEK
    return cluster, found


def _value(text: str) -> Any:
    """JSON, or the text itself where it is none; `Infinity` and its kin are texts."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError:
        return text


def _refuse(name: str) -> None:
    raise ValueError(name)
