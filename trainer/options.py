"""The config tree: every section of a run. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from models.options import Model
from optim.options import Optimizer
from strata import option, options, part, section
from trainer.data.options import Batches
from trainer.diagnostics.options import Diagnostics

Problems = Iterator[tuple[str, str]]
BATCHES = tuple(field.name for field in dataclasses.fields(Batches))


@options
class InitFrom:
    """Start from the weights of another run, or branch off it."""

    run: str | None = option(None, "run directory whose parameters are loaded before step 1; None: a fresh start")
    step: int | None = option(None, "its checkpoint step; None: the latest good one", least=0)
    convert: object = part(
        "model.conversion",
        None,
        "how another model's parameters become this one's, as in trainer.convert; absent: they fit as they are",
        added="0.2",
    )
    take: str = option(
        "parameters",
        "parameters: as initial ones, for a run of its own; optimizer: its state and the step as well, so that this run "
        "branches off there and goes on to train.steps under its own schedule, on data from the beginning; all: the position "
        "in the data as well",
        among=("parameters", "optimizer", "all"),
        added="0.2",
    )

    @property
    def branches(self) -> bool:
        """Whether the run goes on from the other one's step rather than from 0."""
        return self.take != "parameters"

    def problems(self) -> Problems:
        """There must be something to convert, or to go on from."""
        if self.branches and self.run is None:
            yield "take", "there is no run to branch off: give init_from.run"
        if self.step is not None and self.run is None:
            yield "step", "there is no run to take it from: give init_from.run"
        if self.convert is not None and self.run is None:
            yield "convert", "there is no run to convert: give init_from.run"
        if self.branches and self.convert is not None:
            yield "take", "the optimizer's state is that of the other model: give parameters with init_from.convert"


@options
class Teacher:
    """A finished run whose next-token distributions the model is trained to match, beside the data."""

    run: str | None = option(None, "run directory of the teacher; None: none. It must have the same tokenizer")
    step: int | None = option(None, "its checkpoint step; None: the latest good one", least=0)
    weight: float = option(1.0, "of the divergence in the objective, beside the cross-entropy with weight 1", above=0)
    divergence: str = option(
        "forward",
        "forward: KL(teacher || student); reverse: KL(student || teacher); jensen_shannon; total_variation",
        among=("forward", "reverse", "jensen_shannon", "total_variation"),
    )
    temperature: float = option(1.0, "divides the logits of both; the term is multiplied by its square", above=0)

    def problems(self) -> Problems:
        """A step is one of a run."""
        if self.step is not None and self.run is None:
            yield "step", "there is no run to take it from: give train.teacher.run"


@options
class Train:
    """How the model is trained."""

    steps: int = option(1000, "updates in the whole run", least=1)
    accumulation: int = option(1, "micro-batches an update is split into, inside the step", least=1, key="execution")
    precision: str = option(
        "float32",
        "compute type of the blocks; parameters and loss are float32. float32 products run at JAX's default precision: TF32 on "
        "NVIDIA, bfloat16 passes on TPU, unless JAX_DEFAULT_MATMUL_PRECISION says otherwise",
        among=("float32", "bfloat16"),
    )
    remat: str = option(
        "none",
        "what is recomputed in the backward pass: nothing, all but products without batch axes (dots), or the whole block",
        among=("none", "dots", "full"),
        key="execution",
    )
    deterministic: bool = option(False, "on GPU, order-independent reductions only (slower); CPU always is", key="execution")
    nonfinite: str = option(
        "raise",
        "a non-finite loss or gradient: stop with exit 3, or skip the update; an optimizer that makes one of finite ones stops",
        among=("raise", "skip"),
        key="execution",
    )
    skip_limit: int = option(
        20, "with nonfinite=skip: updates that may be skipped before the run stops", least=0, key="execution"
    )
    loss_chunk: int | None = option(
        None,
        "tokens whose logits exist at once, over all devices; None: what fits in 64 MiB of float32 on CPU, 512 MiB elsewhere",
        least=1,
        key="execution",
    )
    teacher: Teacher = section(Teacher, "distillation from another run", added="0.2")


@options
class Evaluate:
    """Evaluation on held-out data while training. The end of a run always evaluates.

    Which sequences are scored follows from `batches` and `batch_size` alone, and not from how the work is divided.
    """

    every: int = option(200, "steps between evaluations; 0: only at the end", least=0, key="cosmetic")
    batches: int = option(16, "batches of an evaluation during training", least=1)
    final_batches: int | None = option(None, "batches of the evaluation at the end; None: all held-out data", least=1)
    batch_size: int | None = option(None, "sequences of each of the batches above; None: data.batch_size", least=1)


@options
class Checkpoint:
    """What is kept on disk: three independent policies, none of which deletes what another keeps.

    Steps that the schedule names, such as each budget of WSD-S and the end of a stable phase, are saved and kept beside them.
    """

    every: int = option(200, "steps between checkpoints; 0: only at the end", least=0)
    keep_latest: int = option(2, "number of newest checkpoints kept", least=1)
    keep_every: int | None = option(None, "also keep every checkpoint whose step is a multiple of this", least=1)
    keep_best: int = option(1, "also keep this many with the lowest validation loss", least=0)


@options
class Mesh:
    """Devices by axis. A mesh of 1, 1, 1 uses one device however many there are."""

    data: int = option(1, "replicas, each with a part of the batch; -1: all devices that are left", least=-1)
    fsdp: int = option(1, "parts that parameters and batch are split into (ZeRO-3)", least=-1)
    tensor: int = option(1, "parts that heads and hidden units are split into", least=-1)

    def problems(self) -> Iterator[tuple[str, str] | Problems]:
        """At most one axis may be left open, and none may be empty."""
        yield from (self._size_problems(name) for name in ("data", "fsdp", "tensor"))
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            yield "", "only one mesh axis can be -1"

    def _size_problems(self, name: str) -> Problems:
        if getattr(self, name) == 0:
            yield name, "a mesh axis has at least one device (or -1: all that are left)"


@options
class Log:
    """What is reported and where it is mirrored; `metrics.jsonl` is always written."""

    every: int = option(10, "steps between rows of training metrics", least=1)
    wandb: str = option(
        "disabled",
        "mirror to Weights & Biases; auto: online with an account, offline without",
        among=("disabled", "auto", "offline", "online"),
    )
    wandb_project: str = option("strata", "project of the W&B mirror")
    wandb_group: str | None = option(None, "group of the W&B mirror")
    tensorboard: bool = option(False, "mirror to TensorBoard event files in the run directory")
    profile: tuple[int, ...] = option((), "first and last step of a profiler trace", least=1)
    sample: str = option("", "prompt of the text printed at the end (empty: a separator); data without text prints none")
    sample_tokens: int = option(400, "tokens sampled at the end; 0: none", least=0)

    def problems(self) -> Problems:
        """A trace needs a first and a last step."""
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            yield "profile", "expected two steps, first and last"


@options
class Config:
    """A whole run."""

    seed: int = option(0, "of the initial parameters, and of the data order unless data.seed is given", least=0, most=2**31 - 1)
    plugins: tuple[str, ...] = option((), "modules of your own, imported first, that register components", key="cosmetic")
    init_from: InitFrom = section(InitFrom, "start from another run's weights")
    data: object = part("data", "python_source", "what is trained on")
    model: Model = section(Model, "the network")
    optimizer: Optimizer = section(Optimizer, "the update")
    train: Train = section(Train, "the loop")
    evaluate: Evaluate = section(Evaluate, "held-out data", key="execution")
    checkpoint: Checkpoint = section(Checkpoint, "what is kept", key="cosmetic")
    diagnostics: Diagnostics = section(Diagnostics, "what is measured of every layer", key="cosmetic", added="0.2")
    mesh: Mesh = section(Mesh, "devices", key="execution")
    log: Log = section(Log, "reports", key="cosmetic")

    @property
    def milestones(self) -> dict[int, str]:
        """Steps whose checkpoints have a name, are always saved and never deleted, in ascending order."""
        return dict(sorted(self.optimizer.milestones(self.train.steps).items()))

    def problems(self) -> Iterator[Problems]:
        """Combinations across sections."""
        yield self._data_problems()
        yield self._batch_problems()
        yield self._evaluation_problems()
        yield self._sampling_problems()
        yield self._length_problems()
        yield self._branch_problems()
        yield self._conversion_problems()
        yield self._optimizer_problems()

    def _data_problems(self) -> Problems:
        missing = [name for name in BATCHES if not hasattr(self.data, name)]
        if missing:
            kind = type(self.data)
            message = (
                f"{kind.__module__}.{kind.__qualname__} lacks {', '.join(missing)}, which all data has; make it a subclass of "
                "trainer.data.options.Batches"
            )
            yield "data.name", message

    def _batch_problems(self) -> Problems:
        if not hasattr(self.data, "batch_size"):
            return
        size, parts = self.data.batch_size, self.train.accumulation
        if size % parts:
            yield "train.accumulation", f"{parts} micro-batches do not divide data.batch_size {size}"
            return
        shards = max(1, self.mesh.data) * max(1, self.mesh.fsdp)
        if (size // parts) % shards:
            message = f"{size} sequences in {parts} micro-batches do not divide over mesh.data x mesh.fsdp = {shards} devices"
            yield "data.batch_size", message
        elif self.optimizer.needs_second_gradient and (size // parts) % (2 * shards):
            message = "noise by independent gradients takes halves of every micro-batch: give an even number"
            yield "data.batch_size", message

    def _evaluation_problems(self) -> Problems:
        devices = max(1, self.mesh.data) * max(1, self.mesh.fsdp)
        if self.evaluate.batch_size and self.evaluate.batch_size % devices:
            yield "evaluate.batch_size", f"does not divide over mesh.data x mesh.fsdp = {devices} devices"

    def _sampling_problems(self) -> Problems:
        if self.optimizer.sampling is not None and self.model.tie_embeddings:
            message = "layer sampling needs a head of its own: a tied one is used by the last layer and frozen with the first"
            yield "model.tie_embeddings", message

    def _length_problems(self) -> Problems:
        if self.log.profile and self.log.profile[0] > self.train.steps:
            yield "log.profile", f"starts after the last step, {self.train.steps}"

    def _branch_problems(self) -> Problems:
        if self.init_from.branches and self.init_from.step is not None and self.init_from.step >= self.train.steps:
            yield "init_from.step", f"the run would branch off here, but ends at train.steps = {self.train.steps}"

    def _conversion_problems(self) -> Problems:
        if self.init_from.convert is not None:
            asked = getattr(self.init_from.convert, "problems_in", lambda model: ())(self.model)
            yield from ((f"init_from.convert.{name}", message) for name, message in asked)

    def _optimizer_problems(self) -> Iterator[Problems]:
        for check in self.optimizer.problems_over(self.train.steps):
            yield ((f"optimizer.{name}", message) for name, message in check)
