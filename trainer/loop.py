"""Training: one config, one run directory; the same call starts a run, resumes it, extends it, or says it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import optim
from strata import Diverged, Preempted
from trainer import config as configuration
from trainer import devices, processes, resume, runs
from trainer.announce import announce, conclude
from trainer.atomic_files import write_json_atomic
from trainer.checkpoint import Checkpointer
from trainer.evaluate import evaluate
from trainer.options import Config
from trainer.reporter import Reporter
from trainer.run_directory import RunDirectory
from trainer.setup import Setup, assemble
from trainer.signals import StopRequest


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    run_dir: Path
    step: int
    evaluation: dict[str, float]  # the last row of held-out data: loss, perplexity, tokens; bpb and accuracy where they apply


def train(
    config: Mapping[str, Any] | Config,
    workdir: str | Path,
    *,
    origin: Mapping[str, Any] | None = None,
) -> Result:
    """Train a config in a run directory, from wherever that directory is.

    Args:
      config: a `ConfigDict`, dict or resolved `Config`.
      workdir: made if it does not exist; a run of the same config that is there is resumed from its newest good
        checkpoint, and a finished one is left alone.
      origin: where the config came from, kept in `overrides.json`: `config`, `name`, `overrides`.

    Returns:
      The result of the finished run.

    Raises:
      ConfigError: the config is wrong, or the directory belongs to another one.
      DataError: data is missing or damaged.
      Diverged: a loss or gradient was not finite (or too many were, with `nonfinite="skip"`); the state before it is saved.
      Preempted: stopped by a signal after saving.
      StrataError: a checkpoint could not be written, or the directory is in use.
    """
    config = configuration.resolve_config(config)
    devices.check_started(config)
    directory = RunDirectory(workdir)
    with directory if processes.first() else contextlib.nullcontext():
        existing = directory.read_config() is not None
        notes = resume.check(directory.path, config) if existing else []
        status = directory.read_status() if existing else None
        processes.wait("every process has read the run directory")
        if status and status["state"] == "finished" and status["step"] >= config.train.steps:
            return _finished_before(directory, status)
        try:
            return Loop(config, directory, dict(origin or {}), notes).run()
        except Preempted:
            raise
        except BaseException as error:
            _fail(directory, error)
            raise


def _finished_before(directory: RunDirectory, status: Mapping[str, Any]) -> Result:
    from trainer.metrics import read_metrics

    last = next((row for row in reversed(read_metrics(directory.metrics)) if row["split"] == "val"), {})
    if processes.first():
        print(f"{directory.path} is finished at step {status['step']}: nothing to do.")
    numbers = {name: value for name, value in last.items() if name not in ("step", "split", "timing")}
    return Result(directory.path, status["step"], numbers)


def _fail(directory: RunDirectory, error: BaseException) -> None:
    """Say in `status.json` why the run ended; a second error there must not hide the first."""
    if not processes.first() or directory.read_config() is None:
        return
    done = (directory.read_status() or {}).get("step", 0)
    with contextlib.suppress(Exception):
        directory.write_status("failed", done, f"{type(error).__name__}: {error}".splitlines()[0])


class Loop:
    """A run in progress."""

    def __init__(self, config: Config, directory: RunDirectory, origin: dict[str, Any], notes: list[str]):
        self.config, self.directory, self.notes = config, directory, notes
        self.setup: Setup = assemble(config)
        self.rates = optim.rates(config.optimizer, config.train.steps)
        self.origin = origin
        keep = config.checkpoint
        self.checkpointer = Checkpointer(
            directory.checkpoints, keep_latest=keep.keep_latest, keep_every=keep.keep_every, keep_best=keep.keep_best
        )
        self.positions: dict[int, dict[str, Any]] = {}  # of the data, after each of the last steps
        self.evaluation: dict[str, float] = {}

    def run(self) -> Result:
        """Train to the last step, evaluate, save, conclude."""
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            stack.enter_context(jax.set_mesh(self.setup.mesh))
            stack.callback(self.checkpointer.close)
            stack.callback(gc.unfreeze)
            state, host, done = self._restore()
            self._write_first_files(done)
            self.reporter = stack.enter_context(Reporter(self.config, self.directory, self.setup, done, host))
            announce(self, state, done)
            self.train_step = self.setup.jitted_train_step()
            self.evaluation_step = self.setup.jitted_evaluation_step()
            rows = self.setup.dataset.train(
                start_state=host.get("data"), process_index=jax.process_index(), process_count=jax.process_count()
            )
            stack.callback(rows.close)
            self.positions[done] = rows.get_state()
            state = self._steps(state, rows, done, stop)
            conclude(self, state)
        return Result(self.directory.path, self.config.train.steps, self.evaluation)

    # ---- start

    def _restore(self) -> tuple[Any, dict[str, Any], int]:
        """The state to go on from, what the host saved with it, and the steps done."""
        shapes = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.setup.abstract_state(),
            self.setup.state_shardings(),
        )
        restored = self.checkpointer.restore(shapes)
        if restored is not None:
            state = restored.state
            if jax.device_get(state["guard"]["halted"]):
                # Whoever starts a run again that halted on non-finite losses has seen why; it counts anew.
                state |= {"guard": self.setup.put_scalars({"skipped": np.int32(0), "halted": np.bool_(False)})}
            return state, restored.host, restored.step
        if self.config.init_from.run is None:
            params = self.setup.initial_params()
        else:
            params, step = runs.params_for(self.setup, Path(self.config.init_from.run), self.config.init_from.step)
            self.notes.append(f"parameters come from {self.config.init_from.run} at step {step}")
        return self.setup.initial_state(params), {}, 0

    def _write_first_files(self, done: int) -> None:
        if not processes.first():
            return
        from trainer.environment import describe_environment, differences

        self.directory.write_config(configuration.canonical_json(self.config), self.origin or None)
        here = describe_environment() | {"data": self.setup.dataset.description}
        first = self.directory.write_environment(here, done)
        if first is not None:
            changed = differences(first, here, python_matters=_reads_python(self.config.data))
            if changed:
                self.notes.append(f"not the machine of the first start ({'; '.join(changed)}): {resume.NOT_BIT_EXACT}")
        self.directory.write_status("running", done)

    # ---- the loop

    def _steps(self, state: Any, rows: Any, done: int, stop: StopRequest) -> Any:
        """Run the remaining steps. Metrics of a step are read after the next one is dispatched."""
        config, pending = self.config, None
        for step in range(done + 1, config.train.steps + 1):
            batch = next(rows)
            self.positions = {step - 1: self.positions[step - 1], step: rows.get_state()} | self._older(step)
            self.reporter.before_step(step)
            rates = self.rates(step)
            placed = self.setup.put_batch(processes.with_stop(batch, stop))
            state, metrics = self.train_step(state, placed, self.setup.put_scalars(rates))
            stopping = self._read(pending, state, stop)
            pending = (step, metrics, rates)
            if step == done + 1:
                # What start-up made lives as long as the run; without this, collections walk through it for ever.
                gc.collect()
                gc.freeze()
            last = step == config.train.steps
            evaluating = last or (config.evaluate.every and step % config.evaluate.every == 0)
            saving = last or (config.checkpoint.every and step % config.checkpoint.every == 0)
            if evaluating or saving or stopping:
                stopping = self._read(pending, state, stop) or stopping
                pending = None
                metric = self._evaluate(state, step, last) if evaluating else None
                if saving or stopping:
                    self._save(state, step, metric, blocking=last or stopping)
                if stopping and not last:
                    self._preempt(step, stop)
        return state

    def _older(self, step: int) -> dict[int, dict[str, Any]]:
        return {step - 2: self.positions[step - 2]} if step - 2 in self.positions else {}

    def _read(self, pending: Any, state: Any, stop: StopRequest) -> bool:
        """Fetch the metrics of a step, report them, and end the run if it halted. Returns whether to stop."""
        if pending is None:
            return False
        step, metrics, rates = pending
        values = jax.device_get(metrics)
        if values["halted"]:
            self._diverge(state, step, values)
        self.reporter.train(step, values, rates)
        if "stop" in values:  # several processes: all learn of the signal from the same step
            return bool(values["stop"])
        return stop.received is not None

    def _evaluate(self, state: Any, step: int, last: bool) -> float:
        """Evaluate, write the row, and return the loss that compares checkpoints: always of the same batches."""
        options = self.config.evaluate
        started = time.perf_counter()
        with self.reporter.pause():
            score = functools.partial(
                evaluate, self.setup, state["params"], self.evaluation_step, batch_size=options.batch_size
            )
            found = score(options.batches)
            loss = found["loss"]
            if last and options.final_batches != options.batches:
                found = score(options.final_batches)
        self.evaluation = found
        self.reporter.validation(step, found, time.perf_counter() - started)
        return loss

    def _save(self, state: Any, step: int, metric: float | None, blocking: bool) -> None:
        host = {"data": self.positions[step], "metrics_offset": self.reporter.flushed_offset(), "seed": self.config.seed}
        with self.reporter.pause():
            self.checkpointer.save(step, state, host, metric=metric, blocking=blocking)
        if processes.first():
            self.directory.write_status("running", step)

    # ---- ends before the end

    def _preempt(self, step: int, stop: StopRequest) -> None:
        name = stop.received or "a signal to another process"
        if processes.first():
            self.directory.write_status("preempted", step, name)
        raise Preempted(f"stopped by {name} after saving step {step}; start the same command again to go on")

    def _diverge(self, state: Any, step: int, values: dict[str, Any]) -> None:
        """Every update from `step` on was held back on the device, so `state` is the one before it."""
        before, after = self.positions[step - 1], self.positions[step]
        report = {
            "step": step,
            "loss": repr(float(values["nats"]) / max(float(values["tokens"]), 1.0)),
            "grad_norm": repr(float(values["grad_norm"])),
            "skipped": int(values["skipped"]),
            "examples": [before["examples"], after["examples"]],  # first, and one past the last
            "data": before,
        }
        if processes.first():
            write_json_atomic(self.directory.path / "nonfinite.json", report)
        host = {"data": before, "metrics_offset": self.reporter.flushed_offset(), "seed": self.config.seed}
        self.checkpointer.save(step - 1, state, host, blocking=True)
        if processes.first():
            self.directory.write_status("running", step - 1)
        limit = ""
        if self.config.train.nonfinite == "skip":
            limit = f"; {report['skipped']} updates were skipped, and train.skip_limit is {self.config.train.skip_limit}"
        first, last = before["examples"], after["examples"] - 1
        raise Diverged(
            f"the loss or gradient of step {step} is not finite (loss {report['loss']}, gradient norm {report['grad_norm']})"
            f"{limit}. Its batch is examples {first} to {last} of the data; the state before it is saved as step {step - 1} in "
            f"{self.directory.checkpoints}, and the details are in {self.directory.path / 'nonfinite.json'}."
        )


def _reads_python(data: Any) -> bool:
    """Whether the text depends on the version of Python."""
    return any(source.name == "python_source" for source in getattr(data, "sources", (data,)))
