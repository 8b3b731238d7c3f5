"""Everything a run computes with, assembled from a config: data, model, optimizer, mesh and jitted functions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import models
import optim
from strata import ConfigError
from trainer import data, devices
from trainer.data.dataset import Dataset
from trainer.options import Config
from trainer.step import State, evaluation_step, initial_state, train_step

ROWS = PartitionSpec(("data", "fsdp"), None)


@dataclasses.dataclass
class Setup:
    """The parts of a run. Parameters live in `TrainState`s, not here: `graph` is the model without them."""

    config: Config
    mesh: jax.sharding.Mesh
    dataset: Dataset
    graph: nnx.GraphDef
    model: nnx.Module  # abstract: shapes, roles and axes only
    token_bytes: jax.Array | None  # int32 [vocab]

    def shardings(self) -> Any:
        """A sharding for every parameter, as a nested dict."""
        return models.parameter_shardings(self.model, self.mesh)

    def initial_params(self) -> Any:
        """Freshly initialised parameters, born sharded."""
        config = self.config
        model = models.build(
            config.model,
            vocab_size=self.dataset.vocab_size,
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

        An optimizer leaf that stands for a parameter (its path ends in the parameter's path, dotted or not, and it has the
        parameter's shape) is laid out like it; every other is replicated.
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
            for start in range(len(names)):
                shape, sharding = known.get(".".join(names[start:]), (None, None))
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

    def jitted_train_step(self):
        """`(state, batch, rates) -> (state, metrics)`; the state is donated."""
        step = train_step(self.graph, self.transformation(), self.config.train, self.token_bytes)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings(), replicated))

    def jitted_evaluation_step(self, depth: Any = None):
        """`(params, batch) -> sums`; `depth` is another way to run the same weights."""
        step = evaluation_step(self.graph, self.token_bytes, self.config.train.loss_chunk, depth)
        return jax.jit(step, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch onto its devices."""
        sharding = NamedSharding(self.mesh, ROWS)
        if jax.process_count() == 1:
            return jax.device_put(batch, sharding)
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}

    def put_scalars(self, values: Any) -> Any:
        """Host scalars onto every device, by an explicit transfer."""
        return jax.device_put(values, NamedSharding(self.mesh, PartitionSpec()))


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
    return mesh


def assemble(config: Config) -> Setup:
    """Build every part of a run but its parameters.

    Raises:
      ConfigError, DataError: what only JAX or the data can tell, in the same words as validation.
    """
    mesh = make_mesh(config)
    dataset = data.build(config.data, config.seed)
    model = models.abstract(
        config.model, vocab_size=dataset.vocab_size, precision=config.train.precision, remat=config.train.remat
    )
    table = None
    if dataset.token_bytes is not None:
        table = jax.device_put(jnp.asarray(dataset.token_bytes, jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return Setup(config, mesh, dataset, nnx.graphdef(model), model, table)
