"""Training: one config, one run directory; the same call starts a run, resumes it, extends it, or says it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import optim
from strata import Diverged, Preempted, StrataError, to_tree
from trainer import config as configuration
from trainer import devices, processes, resume, runs
from trainer.announce import announce, conclude
from trainer.checkpoint import Checkpointer
from trainer.diagnostics.measure import Diagnosis
from trainer.evaluate import evaluate
from trainer.metrics.wandb_mirror import resolve_mode
from trainer.options import Config
from trainer.prefetch import Prefetch
from trainer.reporter import Reporter
from trainer.run_directory import RunDirectory
from trainer.setup import Setup, assemble
from trainer.signals import StopRequest

MOST_PENDING = 12
"""Steps on CPU after which their metrics are read although no row is due."""


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
      Diverged: a loss, gradient (or too many, with `nonfinite="skip"`) or update was not finite.
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
        if config.log.wandb != "disabled" and processes.first():
            resolve_mode(config.log.wandb)  # an account that is missing claims no directory
        try:
            with StopRequest() as stop:
                return Loop(config, directory, dict(origin or {}), notes, stop).run()
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
    if not processes.first():
        return
    with contextlib.suppress(Exception):
        status = directory.read_status() or {"state": "running", "step": 0}
        # Where a run is finished, what failed is only what is said at the end.
        if status["state"] == "finished" or directory.read_config() is None:
            return
        directory.write_status("failed", status["step"], f"{type(error).__name__}: {error}".splitlines()[0])


class Pending(NamedTuple):
    """A step that was dispatched and not read yet."""

    step: int
    metrics: dict[str, jax.Array]
    rates: Mapping[str, Any]


class Loop:
    """A run in progress."""

    def __init__(self, config: Config, directory: RunDirectory, origin: dict[str, Any], notes: list[str], stop: StopRequest):
        self.config, self.directory, self.notes, self.stop = config, directory, notes, stop
        self.setup: Setup = assemble(config)
        self.rates = optim.rates(config.optimizer, config.train.steps)
        self.origin = origin
        keep = config.checkpoint
        self.checkpointer = Checkpointer(
            directory.checkpoints,
            keep_latest=keep.keep_latest,
            keep_every=keep.keep_every,
            keep_best=keep.keep_best,
            named=config.milestones,
            committed=lambda step: directory.write_status("running", step),
        )
        every, saved = config.evaluate.every, keep.every
        if keep.keep_best and every and saved % every:
            notes.append(
                f"only checkpoints of steps that are evaluated can be the best: checkpoint.every = {saved} is no multiple of "
                f"evaluate.every = {every}"
            )
        self.diagnosis = Diagnosis(self.setup)
        notes += self.diagnosis.notes if config.diagnostics.every else []
        # On CPU a step runs in the caller's thread: nothing would be gained, and a row would be timed with the step after it.
        self.one_ahead = jax.default_backend() != "cpu" or jax.process_count() > 1
        self.positions: dict[int, dict[str, Any]] = {}  # of the data, after each of the last steps

    def run(self) -> Result:
        """Train to the last step, save, evaluate, conclude."""
        steps = self.config.train.steps
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self.setup.mesh))
            stack.push(lambda kind, *_: self.checkpointer.close(quietly=kind is not None))
            stack.callback(gc.unfreeze)
            state, host, done = self._restore()
            if done < steps:
                self.setup.teacher  # noqa: B018 (one that is not there claims no directory)
            self._write_first_files(done)
            self.reporter = stack.enter_context(Reporter(self.config, self.directory, self.setup, done, host))
            announce(self, state, done)
            self.evaluation_step = self.setup.jitted_evaluation_step()
            if done < steps:
                self.train_step = self.setup.jitted_train_step()
                share = self.setup.share(self.config.data.batch_size)
                rows = stack.enter_context(contextlib.closing(self.setup.dataset.train(start_state=host.get("data"), **share)))
                self.positions[done] = rows.get_state()
                with Prefetch(self.setup, rows, self.rates, done + 1, steps) as ahead:
                    state = self._steps(state, ahead, done)
            # Everything below happens again when it is interrupted: the last checkpoint is from before it.
            evaluation = self._evaluate(state, steps, self.config.evaluate.final_batches, self._stop_evaluating)
            if not math.isfinite(evaluation["loss"]):  # the last update's doing: no step came after it to halt at
                raise Diverged(
                    f"the held-out loss after the last step, {steps}, is not finite ({evaluation['loss']}); "
                    f"its state is saved in {self.directory.checkpoints}"
                )
            self._finished(state, steps)
            try:
                conclude(self, state, evaluation)
            except Exception as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                self.reporter.say(f"warning: the run is finished and saved; what is said at the end could not be ({why})")
        return Result(self.directory.path, steps, evaluation)

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
            state, host, done = restored.state, restored.host, restored.step
            if self.directory.read_config() is None:  # lost; the checkpoint knows what it is of
                self.notes += resume.compare(self.directory.path, configuration.resolve_config(host["config"]), self.config)
        elif self.config.init_from.run is None:
            state, host, done = self.setup.initial_state(self.setup.initial_params()), {}, 0
        else:
            state, host, done = self._donated(shapes)
        saved = (self.directory.read_status() or {"step": 0})["step"]
        if restored is None and saved > done:
            raise StrataError(
                f"{self.directory.path / 'status.json'} says that step {saved} was saved, and there is no checkpoint in "
                f"{self.directory.checkpoints}: bring it back, or remove the run directory to begin anew"
            )
        if done and jax.device_get(state["guard"]["halted"]):
            # Whoever starts a run again that halted on non-finite losses has seen why; it counts anew.
            state |= {"guard": self.setup.put_scalars({"skipped": np.int32(0), "halted": np.bool_(False)})}
        return state, host, done

    def _donated(self, shapes: Any) -> tuple[Any, dict[str, Any], int]:
        """As `_restore`, from the run that `init_from` names.

        Which step "the latest" was is kept, so that a start that was cut short before its first checkpoint begins again
        from the same weights, although the other run may have gone on.
        """
        before = self.directory.read_json("init_from.json") or {}
        found, record, notes = runs.donated(self.setup, shapes, before)
        if processes.first():
            self.directory.write_json("init_from.json", record)
        self.notes += notes
        return found

    def _write_first_files(self, done: int) -> None:
        if not processes.first():
            return
        from trainer.environment import describe_environment, differences

        here = describe_environment(modules=self.config.plugins) | {
            "data": self.setup.dataset.description
        }  # first: bad data claims no directory
        self.directory.write_config(configuration.canonical_json(self.config), self.origin or None)
        first = self.directory.write_environment(here, done)
        if first is not None:
            changed = differences(first, here, python_matters=_reads_python(self.config.data))
            if changed:
                self.notes.append(f"not the machine of the first start ({'; '.join(changed)}): {resume.NOT_BIT_EXACT}")
        self.directory.write_status("running", done)

    # ---- the loop

    def _steps(self, state: Any, ahead: Prefetch, done: int) -> Any:
        """Run the remaining steps. Metrics of a step are read after the next one is dispatched, on CPU before."""
        config, milestones = self.config, self.config.milestones
        pending: list[Pending] = []  # steps whose metrics are still on the device
        for step in range(done + 1, config.train.steps + 1):
            last = step == config.train.steps
            inputs = ahead.take()
            self.positions[step] = inputs.position
            self.reporter.before_step(step, state)
            batch = inputs.batch | self.setup.put_wish(self.stop.received is not None)
            ahead.begin()
            update = self.train_step if self.setup.cuts is None else self.setup.train_step_of(step)
            state, metrics = update(state, batch, inputs.rates, self.setup.teacher_params)
            stopping = self.one_ahead and self._read(pending, state)
            pending.append(Pending(step, metrics, inputs.host_rates))
            if not self.one_ahead:
                stopping = self._read(pending, state)
            if step == done + 1:
                # What start-up made lives as long as the run; without this, collections walk through it for ever.
                with self.reporter.pause():
                    gc.collect()
                    gc.freeze()
            evaluating = bool(config.evaluate.every) and step % config.evaluate.every == 0
            saving = last or step in milestones or (bool(config.checkpoint.every) and step % config.checkpoint.every == 0)
            saving = saving or (self.checkpointer.failed and jax.process_count() == 1)  # several: at the next one, together
            diagnosing = bool(config.diagnostics.every) and step % config.diagnostics.every == 0
            if evaluating or saving or stopping or diagnosing:
                stopping = self._read(pending, state, now=True) or stopping
                metric = None
                if diagnosing:
                    self._diagnose(state, step)
                if last:
                    # The row of the last step is of all held-out data; checkpoints are compared on the usual part of it.
                    metric = self._score(state, config.evaluate.batches)["loss"] if config.checkpoint.keep_best else None
                elif evaluating:
                    metric = self._evaluate(state, step, config.evaluate.batches)["loss"]
                if saving or stopping:
                    self._save(state, step, metric, blocking=last or stopping)
                if stopping:
                    self._preempt(step)
        return state

    def _read(self, pending: list[Pending], state: Any, now: bool = False) -> bool:
        """Fetch metrics that are on the device, write the row that is due, and end the run if it halted.

        An accelerator is read after every step, so that one step is in flight and no more. On CPU that would only cost time,
        and only a row that is due, or a dozen steps, is waited for.

        Returns:
          Whether to stop.
        """
        if not pending:
            return False
        step, metrics, rates = pending[-1]
        due = self.reporter.due(step)
        if not (now or due or self.one_ahead or len(pending) >= MOST_PENDING):
            return self.stop.received is not None
        if jax.device_get(metrics["halted"]):
            self._diverge(state, pending)
        if due:
            self.reporter.train(step, jax.device_get(metrics), rates)
        pending.clear()
        self.positions = {step: position for step, position in self.positions.items() if step >= max(self.positions) - 1}
        if "stop" in metrics:  # several processes: all learn of the signal from the same step
            return bool(jax.device_get(metrics["stop"]))
        return self.stop.received is not None

    def _score(self, state: Any, batches: int | None, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        with self.reporter.pause():
            return evaluate(self.setup, state["params"], self.evaluation_step, batches, between)

    def _evaluate(
        self, state: Any, step: int, batches: int | None, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Score held-out data and write the row."""
        started = time.perf_counter()
        found = self._score(state, batches, between)
        self.reporter.validation(step, found, time.perf_counter() - started)
        return found

    def _diagnose(self, state: Any, step: int) -> None:
        """Measure every layer and write the row."""
        started = time.perf_counter()
        with self.reporter.pause():
            found = self.diagnosis.row(state)
        self.reporter.diagnostics(step, found, time.perf_counter() - started)

    def _save(self, state: Any, step: int, metric: float | None, blocking: bool) -> None:
        with self.reporter.pause():
            self.checkpointer.save(step, state, self._host(step), metric=metric, blocking=blocking)

    def _finished(self, state: Any, step: int) -> None:
        """Mark the run as finished."""
        del state
        self.reporter.flushed_offset()
        if processes.first():
            self.directory.write_status("finished", step)

    def _host(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays."""
        return {
            "data": self.positions[step],
            "metrics_offset": self.reporter.flushed_offset(),
            "config": to_tree(self.config),
        }

    # ---- ends before the end

    def _stop_evaluating(self) -> None:
        """End here if told to: all of the held-out data can take long. Several processes would have to agree, and go on."""
        if self.stop.received and jax.process_count() == 1:
            self._preempt(self.config.train.steps)

    def _preempt(self, step: int) -> None:
        name = self.stop.received or "a signal to another process"
        if processes.first():
            try:
                self.directory.write_status("preempted", step, name)
            except StrataError as error:  # the checkpoint is what counts
                self.reporter.say(str(error))
        raise Preempted(f"stopped by {name} after saving step {step}; start the same command again to go on")

    def _diverge(self, state: Any, pending: list[Pending]) -> None:
        """End the run at the first step that halted it; every later update was held back on the device."""
        fetched = [(entry.step, jax.device_get(entry.metrics)) for entry in pending]
        step, values = next((step, values) for step, values in fetched if values["halted"])
        before, after = self.positions[step - 1], self.positions[step]
        loss, norm = float(values["nats"]) / max(float(values["tokens"]), 1.0), float(values["grad_norm"])
        report = {
            "step": step,
            "what": "update" if math.isfinite(loss + norm) else "gradient" if math.isfinite(loss) else "loss",
            "loss": repr(loss),
            "grad_norm": repr(norm),
            "skipped": int(values["skipped"]),
            "examples": [before["examples"], after["examples"]],  # first, and one past the last
            "data": before,
        }
        where, details = self.directory.checkpoints, self.directory.path / "nonfinite.json"
        saved, written = f"the state before it is saved as step {step - 1} in {where}", f"the details are in {details}"
        try:
            if report["what"] == "update":  # it has been made
                saved = f"no state with it is saved; earlier ones are in {where}"
                self.checkpointer.wait()
            else:
                self.checkpointer.save(step - 1, state, self._host(step - 1), blocking=True)
        except StrataError as error:
            saved = f"the state before it is not saved ({error})"
        try:
            if processes.first():
                self.directory.write_json(details.name, report)
        except StrataError as error:
            written = f"the details are lost ({error})"
        limit = ""
        if self.config.train.nonfinite == "skip":
            limit = f"; {report['skipped']} updates were skipped, and train.skip_limit is {self.config.train.skip_limit}"
        first, last = before["examples"], after["examples"] - 1
        raise Diverged(
            f"the {report['what']} of step {step} is not finite (loss {report['loss']}, gradient norm {report['grad_norm']})"
            f"{limit}. Its batch is examples {first} to {last} of the data; {saved}, and {written}."
        )


def _reads_python(data: Any) -> bool:
    """Whether the text depends on the version of Python."""
    return any(source.name == "python_source" for source in getattr(data, "sources", (data,)))
