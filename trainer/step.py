"""One update, as a jitted function over plain pytrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optim
from models import cross_entropy
from trainer.objectives import distilled, exit_objective
from trainer.options import Train

State = dict[str, Any]
"""`params`: nested dict of float32 arrays; `optimizer`: optax state; `guard`: `skipped` int32 and `halted` bool."""

Batch = dict[str, jax.Array]
"""`tokens`, `targets`, `segment_ids` int32 [B, T], `weights` float32 [B, T]; with several processes `stop` int32 [devices]."""


def initial_state(params: Any, transformation: optax.GradientTransformation) -> State:
    """The state before the first update."""
    guard = {"skipped": jnp.zeros((), jnp.int32), "halted": jnp.zeros((), jnp.bool_)}
    return {"params": params, "optimizer": transformation.init(params), "guard": guard}


def score(model: nnx.Module, h: jax.Array, batch: Batch, chunk: int | None) -> tuple[jax.Array, jax.Array]:
    """Summed nats of a batch's targets, and how many are guessed right, from hidden states [B, T, width]."""
    cap = model.options.logit_softcap
    return cross_entropy(h, model.output_kernel(), batch["targets"], batch["weights"], cap=cap, chunk=chunk)


def counts(batch: Batch, token_bytes: jax.Array | None) -> dict[str, jax.Array]:
    """`tokens` of a batch that are scored, and the raw `bytes` that they stand for (0 where that is not defined)."""
    counted = jnp.zeros((), jnp.int32)
    if token_bytes is not None:
        counted = jnp.sum(jnp.where(batch["weights"] > 0, token_bytes[batch["targets"]], 0))
    return {"tokens": jnp.sum(batch["weights"]), "bytes": counted}


def train_step(
    graph: nnx.GraphDef,
    transformation: optax.GradientTransformationExtraArgs,
    option: Train,
    token_bytes: Any,
    teacher: nnx.GraphDef | None = None,
    cut: int | None = None,
    halves: bool = False,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """The function `(state, batch, rates, teacher_params) -> (state, metrics)`, to be jitted with the state donated.

    Gradients are of the summed nats over all micro-batches, divided once by the number of scored tokens, so that
    neither the number of micro-batches nor that of devices changes what is computed. An update with a non-finite loss
    or gradient leaves parameters and optimizer as they were; with `nonfinite="raise"`, or past `skip_limit`, it also
    halts every later update, so that what is saved is the state before it. One that makes a parameter non-finite from a
    finite gradient halts too, but has been made: to hold it back, both states would have to exist at once.

    Args:
      graph: of the model.
      transformation: as `optim.build` gives.
      option: how to train.
      token_bytes: int32 [vocab], raw bytes of each token; None where that is not defined.
      teacher: graph of the model that is distilled from.
      cut: the first layer that this step updates, where the optimizer samples layers; None where it does not.
      halves: the optimizer needs the difference of two independent gradients at the same weights. They are those of every
        second row; their difference over sqrt(2) has the noise of the difference of two whole batches.
    """

    def objective(params: Any, batch: Batch, progress: jax.Array, donor: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, nnx.State(params))
        h, extra = model.hidden(batch["tokens"], segment_ids=batch["segment_ids"], progress=progress, cut=cut or 0)
        nats, right = score(model, h, batch, option.loss_chunk)
        total = counts(batch, token_bytes) | {"nats": nats, "right": right}
        whole = nats
        if "exits" in extra:
            whole = exit_objective(model, h, nats, extra["exits"], batch, option.loss_chunk)
        if teacher is not None:
            whole += distilled(model, h, nnx.merge(teacher, nnx.State(donor)), batch, option)
        for added in extra.get("losses", {}).values():
            whole += added * total["tokens"]
        return whole, total | {"objective": whole}

    gradient = jax.grad(objective, has_aux=True)

    def step(state: State, batch: Batch, rates: dict[str, jax.Array], donor: Any = None) -> tuple[State, dict[str, jax.Array]]:
        params, guard = state["params"], state["guard"]
        progress = state["optimizer"].count / jnp.float32(option.steps)

        def over(rows: Batch) -> tuple[Any, dict[str, jax.Array]]:
            if option.accumulation == 1:
                return gradient(params, rows, progress, donor)
            return _accumulate(gradient, params, rows, option.accumulation, progress, donor)

        if halves:
            parts = [over({name: x[i::2] for name, x in batch.items() if name != "stop"}) for i in (0, 1)]
            gradients, total = jax.tree.map(jnp.add, *parts)
            means = [jax.tree.map(lambda g, n=part["tokens"]: g / jnp.maximum(n, 1), own) for own, part in parts]
            apart = jax.tree.map(lambda a, b: (a - b) * 0.5**0.5, *means)
        else:
            gradients, total = over(batch)
        tokens = jnp.maximum(total["tokens"], 1)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        # A frozen block that loops use again has a gradient, which moves nothing.
        norm = optim.global_norm(optim.active_rows(gradients, nnx.merge(graph, nnx.State(params)), cut) if cut else gradients)
        how = {"grad_norm": norm} | ({} if cut is None else {"cut": cut})
        how |= {"gradient_difference": apart} if halves else {}
        updates, optimizer = transformation.update(gradients, state["optimizer"], params, rates=rates, **how)
        updated = {"params": optax.apply_updates(params, updates), "optimizer": optimizer}
        finite = jnp.isfinite(norm) & jnp.isfinite(total["nats"])
        go = finite & ~guard["halted"]
        kept = jax.tree.map(lambda new, old: jnp.where(go, new, old), updated, {k: state[k] for k in updated})
        skipped = guard["skipped"] + (~finite & ~guard["halted"])
        limit = 0 if option.nonfinite == "raise" else option.skip_limit
        halted = guard["halted"] | (skipped > limit) | ~all_finite(kept["params"])
        metrics = total | {"grad_norm": norm, "finite": finite, "skipped": skipped, "halted": halted}
        if cut is not None:
            metrics["cut"] = jnp.int32(cut)
        if "stop" in batch:
            metrics["stop"] = jnp.max(batch["stop"])
        return kept | {"guard": {"skipped": skipped, "halted": halted}}, metrics

    return step


def all_finite(tree: Any) -> jax.Array:
    """Whether every element of every leaf is finite, a bool on the device."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def _accumulate(
    gradient: Callable[..., Any], params: Any, batch: Batch, count: int, *constants: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """Sum gradients and totals over micro-batches of every `count`-th row.

    Taking every count-th row, not consecutive ones, keeps each micro-batch spread over all devices of a sharded batch.
    """
    rows = {key: value for key, value in batch.items() if key != "stop"}
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), rows)

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, gradient(params, part, *constants)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro), *constants)
    )
    return jax.lax.scan(add, zeros, micro)[0]


def evaluation_step(
    graph: nnx.GraphDef, token_bytes: Any, chunk: int | None, depth: Any = None
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """The function `(params, batch) -> sums`, to be jitted.

    Sums are `nats`, `right`, `tokens` and `bytes`; without a `depth` that is asked for, also `nats/NAME` and `right/NAME` of
    every view of the run's own depth strategy, such as a looped model's earlier loops.
    """

    def step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graph, nnx.State(params))
        found = counts(batch, token_bytes)
        views = model.options.depth.views() if depth is None else {}
        for name, view in {"": depth, **{f"/{name}": view for name, view in views.items()}}.items():
            h, _ = model.hidden(batch["tokens"], segment_ids=batch["segment_ids"], depth=view)
            found[f"nats{name}"], found[f"right{name}"] = score(model, h, batch, chunk)
        return found

    return step
