"""From a training state to a row of diagnostics: one compiled function, apart from the training step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import models
from models.layers.parameter import is_executed
from optim.roles import parameters
from strata import implementation, lookup
from strata.options import declaration
from trainer.diagnostics.options import KIND, Diagnostics
from trainer.diagnostics.trace import Trace, is_matrix, measured_layers
from trainer.setup import Setup

DIGITS = 6
"""Significant decimal digits of a number in a row; float32 has about seven."""


class Diagnosis:
    """The diagnostics of one run.

    Args:
      setup: of the run.
      option: what to measure; None: the config's section.

    Attributes:
      notes: what the user should know before the first row.
    """

    def __init__(self, setup: Setup, option: Diagnostics | None = None):
        self.setup, self.option = setup, option or setup.config.diagnostics
        self.declared = parameters(setup.model)
        spectra = {"momentum_spectrum", "heavy_tail"} & set(self.option.chosen)
        matrices = [parameter for parameter in self.declared.values() if is_matrix(parameter)]
        large = [p for p in matrices if len(measured_layers(p, self.option)) < p.shape[0]]
        self.notes = []
        if spectra and large:
            sides = sorted({min(parameter.shape[-2:]) for parameter in large})
            self.notes.append(
                f"{' and '.join(sorted(spectra))} look at {self.option.large_layers} layer(s) of {len(large)} kinds of matrix, "
                f"whose smaller sides {', '.join(map(str, sides))} are above diagnostics.largest_matrix = "
                f"{self.option.largest_matrix}"
            )

    def row(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers, lists and dicts for one row of `metrics.jsonl`; None where a value is not defined. Collective.

        Args:
          state: a training state, of which `params` and `optimizer` are read and left as they are.
        """
        found = self._measured(state["params"], state["optimizer"], self._batch)
        return {name: plain(values) for name, values in jax.device_get(found).items() if values}

    @functools.cached_property
    def _batch(self) -> dict[str, jax.Array]:
        """The same rows of held-out data on every device: the batch is too small to be split."""
        whole = next(iter(self.setup.dataset.validation(self.option.sequences, rows=self.option.sequences)))
        cut = {name: np.ascontiguousarray(rows[:, : self.option.length]) for name, rows in whole.items()}
        return self.setup.put_scalars(cut)

    @functools.cached_property
    def _measured(self) -> Any:
        graph, option, declared, recipe = self._graph, self.option, self.declared, self.setup.config.optimizer
        chosen = {name: implementation(lookup(KIND, name)) for name in option.chosen}
        variables = nnx.to_flat_state(nnx.state(self.setup.model))
        executed = frozenset(".".join(map(str, path)) for path, variable in variables if is_executed(path, variable))

        def measured(params: Any, optimizer: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
            trace = Trace(graph, params, batch, optimizer, recipe, declared, executed, option)
            found = {}
            for name, measure in chosen.items():
                with jax.named_scope(name):
                    found[name] = measure(trace)
            return found

        replicated = jax.sharding.NamedSharding(self.setup.mesh, jax.sharding.PartitionSpec())
        return jax.jit(measured, out_shardings=replicated)

    @functools.cached_property
    def _graph(self) -> nnx.GraphDef:
        """The model in float32 and with the default implementation of every part, whatever the run trains with."""
        options = _default_execution(self.setup.config.model)
        return nnx.graphdef(models.abstract(options, vocab_size=self.setup.model.vocab_size))


def plain(value: Any) -> Any:
    """Arrays as nested lists of numbers, None where they are not finite; `DIGITS` digits, which is what a picture needs."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _default_execution(option: Any) -> Any:
    """Options with every execution key (attention and kernel implementations, unrolling) at its default."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(option):
        value = getattr(option, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _default_execution(value)
        elif isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value):
            changes[field.name] = tuple(_default_execution(item) for item in value)
        elif declaration(field).key == "execution":
            changes[field.name] = field.default
    return dataclasses.replace(option, **changes)
