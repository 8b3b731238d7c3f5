"""Everything a run computes with, assembled from a config: data, model, optimizer, mesh and jitted functions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import models
import optim
from strata import ConfigError, DataError, StrataError
from trainer import data, devices
from trainer.data.dataset import Dataset
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.options import Config
from trainer.run_directory import RunDirectory
from trainer.step import State, evaluation_step, initial_state, train_step

ROWS = PartitionSpec(("data", "fsdp"), None)


@dataclasses.dataclass
class Setup:
    """The parts of a run. Parameters live in `TrainState`s, not here: `graph` is the model without them."""

    config: Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer | None  # None if the data is not text
    graph: nnx.GraphDef
    model: nnx.Module  # abstract: shapes, roles and axes only
    built: Dataset | None = None  # the data, where it had to be built to know the vocabulary
    _compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)  # training steps by cut

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data; read on first use, since sampling from a run needs none of it."""
        dataset = self.built or data.build(self.config.data, self.config.seed)
        if dataset.vocab_size != self.model.vocab_size:
            raise DataError(f"the data has {dataset.vocab_size} token ids and its tokenizer {self.model.vocab_size}")
        return dataset

    @functools.cached_property
    def token_bytes(self) -> jax.Array | None:
        """int32 [vocab], the bytes of raw text that each token stands for; None where that is not defined."""
        table = self.dataset.token_bytes
        return None if table is None else self.put_scalars(np.asarray(table, np.int32))

    @functools.cached_property
    def teacher(self) -> tuple[nnx.GraphDef, Any] | None:
        """Graph and parameters of the run that is distilled from; None if there is none.

        Raises:
          ConfigError: it is no run, has no such checkpoint, or another vocabulary or tokenizer.
        """
        chosen = self.config.train.teacher
        if chosen.run is None:
            return None
        from trainer import runs

        try:
            run = runs.load(chosen.run, chosen.step)
            status = RunDirectory(chosen.run).read_status() or {}
            if chosen.step is None and status.get("state") != "finished":
                raise ConfigError("it is not finished, so its latest checkpoint may change: give train.teacher.step")
            runs.check_tokenizer(self, run.directory, run.config)
        except StrataError as error:
            raise ConfigError(f"train.teacher.run = {chosen.run!r}: {error}") from None
        if run.model.vocab_size != self.model.vocab_size:
            sizes = f"{run.model.vocab_size} token ids and this model {self.model.vocab_size}"
            raise ConfigError(f"train.teacher.run = {chosen.run!r} has {sizes}")
        graph, state = nnx.split(run.model)
        shardings = models.parameter_shardings(run.model, self.mesh)
        return graph, jax.device_put(nnx.to_pure_dict(state), shardings)

    @property
    def teacher_params(self) -> Any:
        """What `jitted_train_step` takes last."""
        return self.teacher[1] if self.teacher else None

    def shardings(self) -> Any:
        """A sharding for every parameter, as a nested dict."""
        return models.parameter_shardings(self.model, self.mesh)

    def initial_params(self) -> Any:
        """Freshly initialised parameters, born sharded."""
        config = self.config
        model = models.build(
            config.model,
            vocab_size=self.model.vocab_size,
            seed=config.seed,
            precision=config.train.precision,
            remat=config.train.remat,
            mesh=self.mesh,
        )
        return nnx.to_pure_dict(nnx.state(model))

    def transformation(self):
        """The optimizer."""
        return optim.build(self.config.optimizer, self.model, steps=self.config.train.steps)

    def state_shardings(self) -> Any:
        """A sharding for every leaf of the training state.

        An optimizer leaf that stands for a parameter (its path ends in the parameter's path, dotted or not, or has the dotted
        path as a key of a state apart for each parameter; and it has the parameter's shape) is laid out like it; every other is
        replicated.
        """
        shardings, shapes = self.shardings(), abstract_params(self.model)
        known = {
            ".".join(keys(path)): (leaf.shape, sharding)
            for (path, leaf), sharding in zip(
                jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
            )
        }
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def place(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            names = keys(path)
            for name in (*(".".join(names[start:]) for start in range(len(names))), *names):
                shape, sharding = known.get(name, (None, None))
                if shape == leaf.shape:
                    return sharding
            return replicated

        return jax.tree_util.tree_map_with_path(place, self.abstract_state())

    def abstract_state(self) -> State:
        """Shapes and types of the training state."""
        return jax.eval_shape(lambda params: initial_state(params, self.transformation()), abstract_params(self.model))

    def initial_state(self, params: Any) -> State:
        """The state before the first update; `params` are taken over."""
        transformation = self.transformation()
        start = jax.jit(
            lambda params: initial_state(params, transformation), out_shardings=self.state_shardings(), donate_argnums=0
        )
        return start(params)

    @functools.cached_property
    def cuts(self) -> Any:
        """Which layers an update touches (`optim.sampling.Cuts`); None where it is always all."""
        return optim.cuts(self.config.optimizer, self.model, steps=self.config.train.steps)

    def train_step_of(self, step: int) -> Any:
        """The jitted function of one update; with layer sampling there is one for each first layer that can be drawn."""
        cut = None if self.cuts is None else self.cuts.cut(step, self.config.seed)
        if cut not in self._compiled:
            self._compiled[cut] = self.jitted_train_step(cut)
        return self._compiled[cut]

    def jitted_train_step(self, cut: int | None = None):
        """`(state, batch, rates, teacher_params) -> (state, metrics)`; the state is donated."""
        donor = self.teacher[0] if self.teacher else None
        how = {"teacher": donor, "cut": cut, "halves": needs_halves(self.config)}
        step = train_step(self.graph, self.transformation(), self.config.train, self.token_bytes, **how)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings(), replicated))

    def jitted_evaluation_step(self, depth: Any = None):
        """`(params, batch) -> sums`; `depth` is another way to run the same weights."""
        step = evaluation_step(self.graph, self.token_bytes, self.config.train.loss_chunk, depth)
        return jax.jit(step, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def share(self, batch_size: int) -> dict[str, int]:
        """Which rows of a batch this process reads: `process_index` and `process_count` for a `Dataset`.

        They follow from where the rows are laid out. Processes that hold parts of one model replica (a tensor axis across
        processes) read the same rows.
        """
        places = NamedSharding(self.mesh, ROWS).addressable_devices_indices_map((batch_size, 1)).values()
        first = min(rows.start or 0 for rows, _ in places)
        end = max(batch_size if rows.stop is None else rows.stop for rows, _ in places)
        if first % (end - first) or batch_size % (end - first):
            raise ConfigError(f"the devices of one process hold rows {first} to {end - 1} of {batch_size}, no even share")
        return {"process_index": first // (end - first), "process_count": batch_size // (end - first)}

    def put_batch(self, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """This process's rows of a batch of `batch_size` onto its devices."""
        sharding = NamedSharding(self.mesh, ROWS)
        if jax.process_count() == 1:
            return jax.device_put(batch, sharding)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
            for name, rows in batch.items()
        }

    def put_inputs(self, batches: list[Any], rates: list[Any]) -> list[tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
        """Training batches and the rates that go with them onto the devices, all in one transfer where possible."""
        size = self.config.data.batch_size
        if jax.process_count() > 1:
            return [(self.put_batch(batch, size), self.put_scalars(rate)) for batch, rate in zip(batches, rates, strict=True)]
        places = (NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, PartitionSpec()))
        return jax.device_put(list(zip(batches, rates, strict=True)), [places] * len(batches))

    def put_wish(self, stop: bool) -> dict[str, jax.Array]:
        """This process's wish to stop, beside those of the others: int32 [devices], as an entry `stop` of a batch.

        A signal may reach one process only, and all must stop after the same step. The step takes the maximum of the wishes
        and every process reads it with that step's metrics, so that no further synchronisation is needed. One process needs
        none of this: no entry.
        """
        if jax.process_count() == 1:
            return {}
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        here = np.full(self.mesh.size, stop, np.int32)
        return {"stop": jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])}

    def put_scalars(self, values: Any) -> Any:
        """Host scalars, equal in all processes, onto every device, by an explicit transfer."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        if jax.process_count() == 1:
            return jax.device_put(values, sharding)
        # `device_put` would have the processes compare the values, a collective that the host waits for.
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index]), values
        )


def needs_halves(config: Config) -> bool:
    """Whether the optimizer measures noise by two halves of each batch."""
    return config.optimizer.needs_second_gradient


def keys(path: Any) -> tuple[str, ...]:
    """A key path of a pytree as plain strings."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def abstract_params(model: nnx.Module) -> Any:
    """Shapes and types of a model's parameters, as a nested dict."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(nnx.state(model)))


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of a run. Raises `ConfigError` if these devices cannot give it, or the batch does not divide over it."""
    mesh = devices.make_mesh(config.mesh)
    if config.data.batch_size // config.train.accumulation % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ConfigError(
            f"data.batch_size = {config.data.batch_size} in {config.train.accumulation} micro-batches does not divide over "
            f"mesh.data x mesh.fsdp = {mesh.shape['data'] * mesh.shape['fsdp']} devices"
        )
    if (config.evaluate.batch_size or 0) % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ConfigError(
            f"evaluate.batch_size = {config.evaluate.batch_size} does not divide over mesh.data x mesh.fsdp = "
            f"{mesh.shape['data'] * mesh.shape['fsdp']} devices"
        )
    return mesh


def assemble(config: Config) -> Setup:
    """Build every part of a run but its parameters.

    Raises:
      ConfigError, DataError: what only JAX or the data can tell, in the same words as validation.
    """
    mesh = make_mesh(config)
    tokenizer = load_tokenizer(config.data.tokenizer) if hasattr(config.data, "tokenizer") else None
    dataset = None if tokenizer else data.build(config.data, config.seed)
    vocab_size = tokenizer.vocab_size if tokenizer else dataset.vocab_size
    model = models.abstract(config.model, vocab_size=vocab_size, precision=config.train.precision, remat=config.train.remat)
    return Setup(config, mesh, tokenizer, nnx.graphdef(model), model, dataset)
