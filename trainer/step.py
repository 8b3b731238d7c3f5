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
from trainer.options import Train

State = dict[str, Any]
"""`params`: nested dict of float32 arrays; `optimizer`: optax state; `guard`: `skipped` int32 and `halted` bool."""

Batch = dict[str, jax.Array]
"""`tokens`, `targets`, `segment_ids` int32 [B, T], `weights` float32 [B, T]; with several processes `stop` int32 [devices]."""


def initial_state(params: Any, transformation: optax.GradientTransformation) -> State:
    """The state before the first update."""
    guard = {"skipped": jnp.zeros((), jnp.int32), "halted": jnp.zeros((), jnp.bool_)}
    return {"params": params, "optimizer": transformation.init(params), "guard": guard}


def sums(
    graph: nnx.GraphDef, params: Any, batch: Batch, token_bytes: jax.Array | None, chunk: int | None, depth: Any = None
) -> dict[str, jax.Array]:
    """What a batch adds up to: `nats`, `tokens` scored, those guessed `right`, raw `bytes` they stand for, `auxiliary` loss."""
    model = nnx.merge(graph, nnx.State(params))
    h, auxiliary = model.hidden(batch["tokens"], segment_ids=batch["segment_ids"], depth=depth)
    nats, right = cross_entropy(
        h, model.output_kernel(), batch["targets"], batch["weights"], cap=model.options.logit_softcap, chunk=chunk
    )
    counted = jnp.zeros((), jnp.int32)
    if token_bytes is not None:
        counted = jnp.sum(jnp.where(batch["weights"] > 0, token_bytes[batch["targets"]], 0))
    extra = sum(auxiliary.values(), jnp.float32(0))
    return {"nats": nats, "tokens": jnp.sum(batch["weights"]), "right": right, "bytes": counted, "auxiliary": extra}


def train_step(
    graph: nnx.GraphDef, transformation: optax.GradientTransformationExtraArgs, option: Train, token_bytes: Any
) -> Callable[[State, Batch, dict[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
    """The function `(state, batch, rates) -> (state, metrics)`, to be jitted with the state donated.

    Gradients are of the summed nats over all micro-batches, divided once by the number of scored tokens, so that
    neither the number of micro-batches nor that of devices changes what is computed. An update with a non-finite loss
    or gradient leaves parameters and optimizer as they were; with `nonfinite="raise"`, or past `skip_limit`, it also
    halts every later update, so that what is saved is the state before it.
    """

    def objective(params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        total = sums(graph, params, batch, token_bytes, option.loss_chunk)
        return total["nats"] + total["auxiliary"] * total["tokens"], total

    gradient = jax.grad(objective, has_aux=True)

    def step(state: State, batch: Batch, rates: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        params, guard = state["params"], state["guard"]
        if option.accumulation == 1:
            gradients, total = gradient(params, batch)
        else:
            gradients, total = _accumulate(gradient, params, batch, option.accumulation)
        tokens = jnp.maximum(total["tokens"], 1)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        norm = optim.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(total["nats"])
        updates, optimizer = transformation.update(gradients, state["optimizer"], params, rates=rates, grad_norm=norm)
        updated = {"params": optax.apply_updates(params, updates), "optimizer": optimizer}
        go = finite & ~guard["halted"]
        kept = jax.tree.map(lambda new, old: jnp.where(go, new, old), updated, {k: state[k] for k in updated})
        skipped = guard["skipped"] + (~finite & ~guard["halted"])
        limit = 0 if option.nonfinite == "raise" else option.skip_limit
        halted = guard["halted"] | (skipped > limit)
        metrics = total | {"grad_norm": norm, "finite": finite, "skipped": skipped, "halted": halted}
        if "stop" in batch:
            metrics["stop"] = jnp.max(batch["stop"])
        return kept | {"guard": {"skipped": skipped, "halted": halted}}, metrics

    return step


def _accumulate(gradient: Callable[..., Any], params: Any, batch: Batch, count: int) -> tuple[Any, dict[str, jax.Array]]:
    """Sum gradients and totals over micro-batches of every `count`-th row.

    Taking every count-th row, not consecutive ones, keeps each micro-batch spread over all devices of a sharded batch.
    """
    rows = {key: value for key, value in batch.items() if key != "stop"}
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), rows)

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, gradient(params, part)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro))
    )
    (gradients, total), _ = jax.lax.scan(add, zeros, micro)
    return gradients, total | {"auxiliary": total["auxiliary"] / count}


def evaluation_step(
    graph: nnx.GraphDef, token_bytes: Any, chunk: int | None, depth: Any = None
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """The function `(params, batch) -> sums`, to be jitted."""

    def step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        return sums(graph, params, batch, token_bytes, chunk, depth)

    return step
