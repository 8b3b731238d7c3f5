"""`--dry_run`: what a config would train, without training it: parameters, work, memory, and how each is updated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

import optim
from models.sharding import partition
from trainer.announce import data_line, mixer_lines
from trainer.flops import FORMULA, Flops, training_flops
from trainer.options import Config
from trainer.runs import require_run
from trainer.setup import Setup, assemble

TEXT_COLUMNS = ("role", "path", "shape", "axes", "rule", "Newton-Schulz", "split")
PLOT_WIDTH, PLOT_HEIGHT = 60, 6


def dry_run(config: Config) -> None:
    """Print the report. Raises as `assemble`, `optim.build` and the attention choice do, or if `init_from.run` is no run."""
    source = config.init_from
    if source.run is not None:
        require_run(Path(source.run))
    setup = assemble(config)
    console = Console(width=None if Console().is_terminal else 160, highlight=False, soft_wrap=True)
    console.print(f"data: {data_line(setup.dataset.description)}", markup=False)
    if source.run is not None:
        console.print(f"starts with: {source.take} of {source.run}", markup=False)
    console.print(_parameters(setup))
    console.print(_assignment(setup))
    for line in [*_work(setup), *_memory(setup), *_rates(config), *_milestones(config)]:
        console.print(line, markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right")
    return table


def _parameters(setup: Setup) -> Table:
    counts: dict[str, list[int]] = {}
    for _, variable in nnx.to_flat_state(nnx.state(setup.model, nnx.Param)):
        entry = counts.setdefault(variable.get_metadata()["role"], [0, 0])
        entry[0] += 1
        entry[1] += math.prod(variable.shape)
    table = _table("parameters by role", "role", "arrays", "parameters", "share")
    total = sum(count for _, count in counts.values())
    for role, (arrays, count) in sorted(counts.items(), key=lambda item: -item[1][1]):
        table.add_row(role, str(arrays), f"{count:,}", f"{count / total:.1%}")
    table.add_row("all", str(sum(arrays for arrays, _ in counts.values())), f"{total:,}", "100.0%")
    return table


def _assignment(setup: Setup) -> Table:
    axes = {
        ".".join(map(str, path)): (variable.get_metadata()["axes"], variable.shape)
        for path, variable in nnx.to_flat_state(nnx.state(setup.model, nnx.Param))
    }
    split = setup.mesh.size > 1
    rows = optim.assignment(setup.config.optimizer, setup.model)
    more = [name for name in ("layerwise", "sampling") if any(getattr(row, name) for row in rows)]
    columns = ["path", "shape", "role", "rule", "rate", "multiplier", "decay", "Newton-Schulz", *more]
    table = _table("optimizer assignment, and layout", *columns, *(["axes", "split"] if split else []))
    for row in rows:
        cells = [
            row.path,
            " x ".join(map(str, row.shape)),
            row.role,
            row.rule,
            f"{row.learning_rate:g}",
            f"{row.learning_rate_multiplier:g}",
            f"{row.weight_decay:g}",
            row.newton_schulz,
            *(getattr(row, name) for name in more),
        ]
        if split:
            names, shape = axes[row.path]
            cells += [" ".join(names), str(partition(names, shape, setup.mesh)).removeprefix("PartitionSpec")]
        table.add_row(*cells)
    return table


def _work(setup: Setup) -> list[str]:
    config = setup.config
    flops = training_flops(setup.model, config.data.sequence_length)
    tokens = config.data.batch_size * config.data.sequence_length
    expected = flops.expected(setup.cuts)
    sampled = f" ({expected / flops.per_token:.3f} of a full one on average)" if setup.cuts else ""
    lines = [
        f"work: {flops.per_token / 1e6:,.2f} MFLOP a token ({flops.per_token_full / 1e6:,.2f} without the causal half): "
        f"{FORMULA}",
        f"      {expected * tokens / 1e9:,.2f} GFLOP a step of {tokens:,} tokens{sampled}; "
        f"{expected * tokens * config.train.steps:.3g} FLOP for {tokens * config.train.steps:,} tokens in "
        f"{config.train.steps:,} steps",
    ]
    return lines + _sampling(setup, flops) + [f"mixer: {line}" for line in mixer_lines(config, setup.mesh)]


def _sampling(setup: Setup, flops: Flops) -> list[str]:
    """What layer sampling can save at most."""
    cuts = setup.cuts
    if cuts is None:
        return []
    depth = setup.config.model.depth
    together = setup.config.model.layers - depth.layers if getattr(depth, "forward", "") == "parallel" else None
    inside = [] if together is None else [str(cut) for cut in cuts.first if cut > together]
    lines = [
        f"layer sampling: cuts at layers {', '.join(map(str, cuts.first))}; a step is at most {cuts.ceiling:.3f} times as fast "
        f"as one of every layer, counting blocks alone. Of a full step's FLOPs the head, which no cut leaves out, has "
        f"{flops.head_share:.1%} (with it at most {cuts.ceiling_beside(flops.head_share):.3f} times) and the embedding 0.0%: "
        "its rows are looked up"
    ]
    if inside:
        lines.append(
            f"      these do not hold: layers from {together} on run in parallel and are differentiated together, so that cuts "
            f"at {', '.join(inside)} save no more than one at {together} would"
        )
    return lines


def _memory(setup: Setup) -> list[str]:
    """What a device holds: state exactly, from its layout; activations by the compiler's own account of the step."""
    state, layout = setup.abstract_state(), setup.state_shardings()
    sizes: dict[str, int] = {}
    for name in ("params", "optimizer"):
        leaves, places = jax.tree.leaves(state[name]), jax.tree.leaves(layout[name])
        sizes[name] = sum(
            math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in zip(leaves, places, strict=True)
        )
    words = [f"parameters {_bytes(sizes['params'])}", f"optimizer {_bytes(sizes['optimizer'])}"]
    analysis = _compiled(setup).memory_analysis()
    if analysis is not None:
        words.append(f"scratch of a step {_bytes(analysis.temp_size_in_bytes)} (gradients and activations, by the compiler)")
    return [f"memory a device: {', '.join(words)}"]


def _compiled(setup: Setup) -> Any:
    data = setup.config.data
    rows = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None))
    shape = (data.batch_size, data.sequence_length)

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    batch = {name: array(np.int32) for name in ("tokens", "targets", "segment_ids")} | {"weights": array(np.float32)}
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        setup.abstract_state(),
        setup.state_shardings(),
    )
    rates = optim.rates(setup.config.optimizer, setup.config.train.steps)(1)
    with jax.set_mesh(setup.mesh):
        return setup.jitted_train_step().lower(state, batch, setup.put_scalars(rates)).compile()


def _rates(config: Config) -> list[str]:
    """The rate of every group over the run, drawn with characters."""
    steps = config.train.steps
    table = optim.rates(config.optimizer, steps)
    points = np.unique(np.linspace(1, steps, PLOT_WIDTH).round().astype(int))
    values = {group: np.array([float(table(int(k))[group]) for k in points]) for group in table.groups}
    lines = []
    for group, rates in values.items():
        top = max(rates.max(), 1e-30)
        ends = f"{rates[0]:.3g} at step 1, at most {rates.max():.3g}, {rates[-1]:.3g} at step {steps:,}"
        lines.append(f"learning rate of group {group!r}: {ends}")
        for level in range(PLOT_HEIGHT, 0, -1):
            row = "".join("#" if rate > top * (level - 0.5) / PLOT_HEIGHT else " " for rate in rates)
            lines.append(f"  {top * level / PLOT_HEIGHT:9.3g} |{row.rstrip()}")
        lines.append(f"            +{'-' * len(points)}")
    return lines


def _milestones(config: Config) -> list[str]:
    named = ", ".join(f"{name} after step {step:,}" for step, name in config.milestones.items())
    return [f"checkpoints that are always kept: {named}"] if named else []


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
