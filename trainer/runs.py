"""A finished or running run, opened for reading."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.options import Model
from models.stack import order
from strata import ConfigError, StrataError
from trainer import config as configuration
from trainer.checkpoint import Checkpointer, Restored
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.options import Config, Mesh
from trainer.run_directory import RunDirectory
from trainer.setup import Setup, abstract_params, assemble, make_mesh


@dataclasses.dataclass
class Run:
    """A run at one of its checkpoints."""

    directory: Path
    config: Config
    step: int
    model: nnx.Module  # with the parameters of that step
    setup: Setup
    notes: tuple[str, ...]  # defaults that were added since the run was made; another mesh than the run's
    saved: dict[str, Any]  # what the checkpoint holds beside the arrays

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the data is not text."""
        return self.setup.tokenizer

    def data_notes(self) -> list[str]:
        """Whether the data here is what the run was trained on; reads it."""
        before, now = self.saved["data"]["fingerprint"], self.setup.dataset.fingerprint
        if before == now:
            return []
        return [f"the data here is not what the run was trained on (fingerprint {before[:12]} there, {now[:12]} here)"]

    @property
    def params(self) -> Any:
        """The parameters, as a nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(self.model))


def load(run_dir: str | Path, step: int | str | None = None) -> Run:
    """Open a run directory, on the run's own mesh or, where there are too few devices for it, on one device.

    Args:
      run_dir: a directory with `config.json` and `checkpoints/`.
      step: a checkpoint's step or its name (of the schedule's, such as `"budget1000"`), `"best"`, or `"latest"` (also None):
        the newest one that is whole.

    Raises:
      ConfigError: the directory is no run, its config does not fit this version, or it has no such checkpoint.
      StrataError: the checkpoint is damaged, or the run has none yet.
    """
    directory = Path(run_dir)
    require_run(directory)
    loaded = configuration.load(str(directory / "config.json"))
    config, notes = _on_these_devices(loaded.config)
    setup = assemble(config)
    params, saved, found = restore_params(directory, setup, _numbered(directory, config, step))
    model = nnx.merge(setup.graph, nnx.State(params))
    return Run(directory, loaded.config, found, model, setup, (*loaded.notes, *notes), saved)


def _on_these_devices(config: Config) -> tuple[Config, tuple[str, ...]]:
    """The config on its own mesh, or on one device where there are too few for that, with a note."""
    try:
        make_mesh(config)
    except ConfigError as error:
        return dataclasses.replace(config, mesh=Mesh()), (f"{error}; the run is opened on one device instead",)
    return config, ()


def _numbered(directory: Path, config: Config, step: int | str | None) -> int | None:
    """The step of a checkpoint that is there, or damaged; None: the newest. Raises `ConfigError` where there is no such one."""
    if step is None or step == "latest":
        return None
    checkpointer = Checkpointer(directory / "checkpoints")
    if step == "best":
        best = checkpointer.best()
        if best is None:
            raise ConfigError(f"no checkpoint of {directory} has a validation loss, so none is the best")
        return best
    named = {name: number for number, name in config.milestones.items()}
    number = named.get(step) if isinstance(step, str) else step
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if whole and (checkpointer.directory / str(number)).is_dir():
        return int(number)
    good = checkpointer.steps()
    names = ", ".join(["best", "latest", *(f"{name} (step {at})" for name, at in named.items() if at in good)])
    what = f"no checkpoint {'named ' if isinstance(step, str) else ''}{step!r}"
    raise ConfigError(f"{directory} has {what}. Good steps here: {', '.join(map(str, good)) or 'none'}; names: {names}.")


def restore_params(directory: Path, setup: Setup, step: int | None) -> tuple[Any, dict[str, Any], int]:
    """Parameters of a run's checkpoint, laid out for `setup`, what was saved beside them, and the step. Raises as `load`."""
    checkpointer = Checkpointer(directory / "checkpoints")
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(setup.model),
        setup.shardings(),
    )
    try:
        restored = checkpointer.restore({"params": shapes}, step, partial=True)
    finally:
        checkpointer.close()
    if restored is None:
        raise StrataError(f"{directory} has no checkpoint yet")
    return restored.state["params"], restored.host, restored.step


def donated(
    setup: Setup, shapes: Any, before: dict[str, Any]
) -> tuple[tuple[Any, dict[str, Any], int], dict[str, Any], list[str]]:
    """What the run of `setup` starts with according to `init_from`.

    Args:
      setup: of a run whose `init_from.run` is set.
      shapes: of its training state, as `jax.ShapeDtypeStruct` with shardings.
      before: the record of an earlier start of the same run, or empty.

    Returns:
      Training state, what was saved with it and the updates done; a record for `init_from.json`; notes for the user.

    Raises:
      ConfigError: as `params_for`.
    """
    source = setup.config.init_from
    directory = Path(source.run)
    record: dict[str, Any] = {"run": source.run}
    step = before["step"] if before.get("run") == source.run and source.step is None else source.step
    if source.branches:
        restored = state_for(setup, shapes, directory, step)
        record["step"], what = restored.step, "parameters and optimizer state"
        host = {"data": restored.host["data"]} if source.take == "all" else {}
        found = restored.state, host, restored.step
    else:
        what = "parameters"
        if source.convert is None:
            params, record["step"] = params_for(setup, directory, step)
        else:
            params, record["step"], record["lost"] = converted_for(setup, directory, step)
        found = setup.initial_state(params), {}, 0
    notes = [f"{what} come from {source.run} at step {record['step']}"]
    if record.get("lost"):
        name, share = max(record["lost"].items(), key=lambda entry: entry[1])
        notes.append(f"the conversion lost at most {share:.4f} of a parameter ({name}); all are in init_from.json")
    return found, record, notes


def params_for(setup: Setup, directory: Path, step: int | None) -> tuple[Any, int]:
    """Another run's parameters for the model of `setup`, laid out as its own, and their step.

    Raises:
      ConfigError: the directory is no run, has no such checkpoint, its token ids mean something else, or its parameters do
        not fit this model; with every difference.
    """
    require_run(directory)
    try:
        _check_donor(setup, directory)
        params, _, step = restore_params(directory, setup, step)
    except StrataError as error:
        raise ConfigError(f"init_from.run = {str(directory)!r}: {error}") from None
    return params, step


def state_for(setup: Setup, shapes: Any, directory: Path, step: int | None) -> Restored:
    """Another run's checkpoint to go on from: its whole state, laid out as `shapes` asks.

    Raises:
      ConfigError: as `params_for`, of the whole state; or the checkpoint is not before the end of the run of `setup`.
    """
    require_run(directory)
    checkpointer = Checkpointer(directory / "checkpoints")
    try:
        _check_donor(setup, directory)
        restored = checkpointer.restore(shapes, step)
        if restored is None:
            raise StrataError("it has no checkpoint yet")
        if restored.step >= (steps := setup.config.train.steps):
            raise StrataError(
                f"it is at step {restored.step}, and this run ends at train.steps = {steps}: give more steps or an earlier "
                "init_from.step"
            )
    except StrataError as error:
        raise ConfigError(f"init_from.run = {str(directory)!r}: {error}") from None
    finally:
        checkpointer.close()
    return restored


def converted_for(setup: Setup, directory: Path, step: int | None) -> tuple[Any, int, dict[str, float]]:
    """As `params_for`, from a run of another model, converted for that of `setup` as `init_from.convert` says.

    Returns:
      Parameters, their step, and what the conversion lost by name.
    """
    from trainer.convert import converted_params

    chosen = setup.config.init_from
    try:
        donor = load(directory, step)
        params, lost = converted_params(donor, setup, chosen.convert, setup.config.seed)
    except StrataError as error:
        raise ConfigError(f"init_from.run = {str(directory)!r}: {error}") from None
    return params, donor.step, lost


def _check_donor(setup: Setup, directory: Path) -> None:
    """Raises `ConfigError` where arrays that fit would mean something else: other text, other layers."""
    donor = configuration.load(str(directory / "config.json")).config
    check_tokenizer(setup, directory, donor)
    _check_order(donor.model, setup.config.model)


def check_tokenizer(setup: Setup, directory: Path, config: Config) -> None:
    """Raises `ConfigError` where the run in `directory`, of `config`, was trained on text under another tokenizer."""
    if setup.tokenizer is None or not hasattr(config.data, "tokenizer"):
        return
    written = RunDirectory(directory).read_json("environment.json") or {}
    # As written: the file that the config names may have been replaced since.
    before = written.get("data", {}).get("vocabulary") or load_tokenizer(config.data.tokenizer).fingerprint
    if before != (now := setup.tokenizer.fingerprint):
        names = f"{config.data.tokenizer}, vocabulary {before[:12]}; here {setup.config.data.tokenizer}, {now[:12]}"
        raise ConfigError(f"the run has another tokenizer, so that its token ids are other text ({names})")


def _check_order(donor: Model, model: Model) -> None:
    """Raises `ConfigError` where parameters that fit belong to other layers: they are stacked by kind, not in order."""
    for layer, (before, now) in enumerate(zip(order(donor.plan()), order(model.plan()), strict=False)):
        if before != now:
            raise ConfigError(
                f"layers of one kind stand elsewhere in the run: layer {layer} is one of its {before} and of {now} here, "
                "so that layers would change places"
            )


def require_run(directory: Path) -> None:
    """Raises `ConfigError` if a path is not a run directory."""
    if not (directory / "config.json").is_file():
        what = "has no config.json, so it is not a run" if directory.is_dir() else "does not exist"
        raise ConfigError(f"run directory {directory} {what}")
