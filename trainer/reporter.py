"""Rows of metrics to the file, the console and the mirrors, with the speed of the steps between them."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from strata import Preempted, to_tree
from trainer import config as configuration
from trainer import processes
from trainer.evaluate import bits_per_byte
from trainer.flops import training_flops
from trainer.metrics.console import Console
from trainer.metrics.jsonl import MetricsWriter, end_of_rows
from trainer.metrics.throughput import Timer, device_memory, mfu
from trainer.options import Config
from trainer.run_directory import RunDirectory
from trainer.setup import Setup


class Reporter:
    """Context manager; in a run of several processes only the first one writes and speaks.

    Args:
      config, directory, setup: of the run.
      done: steps done before this process began; 0 drops whatever rows are there.
      host: what the restored checkpoint saved; `metrics_offset` is where its rows end. What was evaluated at its step stays:
        the end of a run that is extended now.
    """

    def __init__(self, config: Config, directory: RunDirectory, setup: Setup, done: int, host: Mapping[str, Any]):
        self.config, self.setup = config, setup
        self.flops = training_flops(setup.model, config.data.sequence_length)
        self.writer: MetricsWriter | None = None
        self.mirrors: list[Any] = []
        self._lost: list[Any] = []  # mirrors that failed
        self._last_row = done
        self._stack = contextlib.ExitStack()
        self._profiling = self._profile_failed = False
        self._traced = [0, 0]  # the first and the last step of a trace
        self._profile_directory = str(directory.path / "profile")
        self.timer = self._stack.enter_context(contextlib.closing(Timer()))
        if not processes.first():
            self.console = None
            return
        self.writer = self._stack.enter_context(MetricsWriter(directory.metrics))
        offset = host.get("metrics_offset", 0)
        extended = 0 < done < config.train.steps
        self.writer.truncate(end_of_rows(directory.metrics, offset, done, "val") if extended else offset)
        self.console = self._stack.enter_context(Console(config.train.steps, start=done))
        if config.log.wandb != "disabled":
            from trainer.metrics.wandb_mirror import WandbMirror

            self.mirrors.append(
                WandbMirror(
                    directory.path,
                    mode=config.log.wandb,
                    run_id=_mirror_id(directory),
                    project=config.log.wandb_project,
                    group=config.log.wandb_group,
                    name=directory.path.name,
                    config=to_tree(config) | {"run_id": configuration.run_id(config)},
                    history=directory.metrics,
                )
            )
        if config.log.tensorboard:
            from trainer.metrics.tensorboard_mirror import TensorBoardMirror

            self.mirrors.append(TensorBoardMirror(directory.path, resumed_at=done or None))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._profiling:
            self._stop_profiling()
        self._stack.close()
        stopped = kind is None or issubclass(kind, Preempted)  # a run that was told to stop has not failed
        for mirror in self.mirrors:
            failed = kind or RuntimeError if not stopped or mirror in self._lost else None
            self._mirrored(mirror, "at its end", mirror.__exit__, failed, None, None)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.console is not None:
            self.console.say(text)

    def before_step(self, step: int, state: Any) -> None:
        """Start or stop the profiler trace that the config asks for, between two steps: the one in flight, which gives
        `state`, is waited for."""
        wanted = self.config.log.profile
        if wanted and not (self._profiling or self._profile_failed) and wanted[0] <= step <= wanted[1]:
            jax.block_until_ready(state)
            self._traced = [step, step]
            try:
                # First, since JAX looks only when the trace ends, and would hold on to one that it cannot write.
                Path(self._profile_directory).mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(self._profile_directory)
                self._profiling = True
            except Exception as error:
                self._unprofiled(error)
        elif self._profiling and step > wanted[1]:
            jax.block_until_ready(state)
            self._stop_profiling()
        elif self._profiling:
            self._traced[1] = step

    def _stop_profiling(self) -> None:
        self._profiling = False
        first, last = self._traced
        try:
            jax.profiler.stop_trace()
            self.say(f"profiler trace of steps {first} to {last} in {self._profile_directory}")
        except Exception as error:
            self._unprofiled(error)

    def _unprofiled(self, error: Exception) -> None:
        """No trace is worth a run."""
        self._profile_failed = True
        self.say(f"warning: no profiler trace in {self._profile_directory}: {error}".splitlines()[0])

    def due(self, step: int) -> bool:
        """Whether a step has a row: the first, every `log.every`-th and the last."""
        return step == 1 or step % self.config.log.every == 0 or step == self.config.train.steps

    def train(self, step: int, values: Mapping[str, Any], rates: Mapping[str, Any]) -> None:
        """A row of training."""
        tokens = max(float(values["tokens"]), 1.0)
        loss = float(values["nats"]) / tokens
        row = {"step": step, "split": "train", "loss": loss, "objective": float(values["objective"]) / tokens}
        if self.setup.token_bytes is not None:
            row["bpb"] = bits_per_byte(values)
        if self.setup.dataset.reports_accuracy:
            row["accuracy"] = float(values["right"]) / tokens
        row["grad_norm"] = float(values["grad_norm"])
        first = next(iter(rates))
        row["learning_rate"] = float(rates[first])
        row |= {f"learning_rate/{group}": float(rate) for group, rate in rates.items()} if len(rates) > 1 else {}
        if "cut" in values:
            row["cut"] = int(values["cut"])
        if self.config.train.nonfinite == "skip":
            row["skipped"] = int(values["skipped"])
        self._write(row | {"timing": self._speed(step)})
        if self.console is not None:
            self.console.update(row | {"timing": self._shown})

    def validation(self, step: int, found: Mapping[str, float], seconds: float) -> None:
        """A row of evaluation."""
        row = {"step": step, "split": "val", **found, "timing": {"seconds": seconds, "time": time.time()}}
        self._write(row)
        if self.console is not None:
            self.console.evaluation(row)

    def diagnostics(self, step: int, found: Mapping[str, Any], seconds: float) -> None:
        """A row of depth diagnostics, for `trainer.inspect`; nothing of it is shown here."""
        self._write({"step": step, "split": "diagnostics", **found, "timing": {"seconds": seconds, "time": time.time()}})

    def flushed_offset(self) -> int:
        """Bytes of rows that are on the disk now; 0 in a process that writes none."""
        if self.writer is None:
            return 0
        self.writer.flush()
        return self.writer.offset

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not step time."""
        with self.timer.outside():
            yield

    def _speed(self, step: int) -> dict[str, Any]:
        data = self.config.data
        count = step - self._last_row
        flops = self._flops_per_token(range(self._last_row + 1, step + 1))
        speed: dict[str, Any] = self.timer.lap(count, count * data.batch_size * data.sequence_length)
        self._last_row = step
        device = self.setup.mesh.devices.flat[0]
        speed["mfu"] = mfu(
            flops,
            speed["tokens_per_second"],
            device.device_kind,
            self.setup.mesh.size,
            self.config.train.precision,
        )
        memory = device_memory()
        if memory is not None:
            speed["memory"] = memory
        speed["time"] = time.time()
        self._shown = speed
        return speed

    def _flops_per_token(self, steps: Sequence[int]) -> float:
        """The mean over the steps of a row, each with the layers that it updates."""
        cuts = self.setup.cuts
        if cuts is None:
            return self.flops.per_token
        return sum(self.flops.at_cut(cuts.cut(step, self.config.seed)) for step in steps) / max(len(steps), 1)

    def _write(self, row: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(row)
        for mirror in self.mirrors:
            if mirror not in self._lost:
                self._mirrored(mirror, f"at step {row['step']} and gets no more rows", mirror.write, row)

    def _mirrored(self, mirror: Any, when: str, tell: Callable[..., None], *given: Any) -> None:
        """What a mirror is told. The rows are in metrics.jsonl, and no mirror is worth a run."""
        try:
            tell(*given)
        except Exception as error:
            self._lost.append(mirror)
            what = f"{type(mirror).__name__} failed {when} ({type(error).__name__}: {error})"
            self.say(f"warning: {what}; python -m trainer.mirror rebuilds it from metrics.jsonl")


def _mirror_id(directory: RunDirectory) -> str:
    """The run's id at W&B: drawn once and kept, since directories of one base name are different runs."""
    found = directory.read_json("wandb.json")
    if not (isinstance(found, dict) and isinstance(found.get("id"), str)):
        found = {"id": uuid.uuid4().hex[:12]}
        directory.write_json("wandb.json", found)
    return found["id"]
