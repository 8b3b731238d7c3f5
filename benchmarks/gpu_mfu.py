"""Model FLOPs utilisation of the real training step on one accelerator, and where its milliseconds go.

    python -m benchmarks.gpu_mfu --config configs/gpt2_small.py
    python -m benchmarks.gpu_mfu --config configs/one_billion.py --set data.batch_size=16 --set train.remat=dots

The step is the one that `trainer.train` would run, on batches that already lie on the device. MFU counts the matrix
products of the model and the causal half of attention, forward and backward, nothing that is recomputed, against the
vendor's dense peak (`trainer.metrics.throughput`). Attention, head with loss, and optimizer are also timed alone, which
says where to look; they do not add up to the step. On CPU the peak is unknown and MFU is `n/a`.

Goals on one H200 in bfloat16: 45 % for 124 M parameters at 1024 tokens, 55 % for about 1 B at 2048.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optim
from benchmarks.measure import overrides, parser, show, spread, write_result
from models import cross_entropy
from models.mixers import softmax
from trainer import command, devices
from trainer import config as configuration
from trainer.flops import training_flops
from trainer.metrics.throughput import device_memory, mfu, peak_flops
from trainer.setup import Setup, assemble


def seconds(call: Callable[[], Any], repeats: int, calls: int) -> list[float]:
    """Seconds of one call, over `repeats` groups of `calls`; compiled and warm before the first."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - begin) / calls)
    return found


def made_up_batch(setup: Setup) -> dict[str, jax.Array]:
    """Random tokens, one document a row."""
    rows = (setup.config.data.batch_size, setup.config.data.sequence_length)
    drawn = np.random.default_rng(0).integers(0, setup.dataset.vocab_size, (2, *rows), np.int32)
    batch = {"tokens": drawn[0], "targets": drawn[1], "segment_ids": np.ones(rows, np.int32)}
    return setup.put_batch(batch | {"weights": np.ones(rows, np.float32)}, rows[0])


def whole_step(setup: Setup, batch: dict[str, jax.Array]) -> tuple[Callable[[], Any], float]:
    """A call that takes the next training step, and the seconds it took to compile."""
    config = setup.config
    rates = setup.put_scalars(optim.rates(config.optimizer, config.train.steps)(1))
    held = [setup.initial_state(setup.initial_params())]
    begin = time.perf_counter()
    compiled = setup.jitted_train_step().lower(held[0], batch, rates).compile()
    took = time.perf_counter() - begin

    def call() -> Any:
        held[0], metrics = compiled(held[0], batch, rates)
        return metrics

    return call, took


def attention_alone(setup: Setup, name: str) -> Callable[[], Any]:
    """Forward and backward of one layer's attention."""
    config, model = setup.config, setup.config.model
    rows, dtype = (config.data.batch_size // config.train.accumulation, config.data.sequence_length), config.train.precision
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (model.query_heads, model.key_heads, model.key_heads)
    parts = [jax.random.normal(k, (*rows, h, model.head_units), dtype) for k, h in zip(keys, heads, strict=True)]
    segments = jnp.ones(rows, jnp.int32)

    def total(q, k, v):
        positions = jnp.arange(rows[1])
        mask = softmax.attention_mask(positions, positions, query_segments=segments, key_segments=segments)
        return jnp.sum(softmax.IMPLEMENTATIONS[name](q, k, v, mask, causal=True).astype(jnp.float32) ** 2)

    jitted = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return lambda: jitted(*parts)


def head_alone(setup: Setup, batch: dict[str, jax.Array]) -> Callable[[], Any]:
    """Forward and backward of the head with its loss, over one micro-batch."""
    config = setup.config
    rows = config.data.batch_size // config.train.accumulation
    shape = (rows, config.data.sequence_length, config.model.width)
    h = jax.random.normal(jax.random.key(1), shape, config.train.precision)
    kernel = jax.random.normal(jax.random.key(2), (config.model.width, setup.dataset.vocab_size)) * config.model.width**-0.5
    targets, weights = batch["targets"][:rows], batch["weights"][:rows]

    def loss(h, kernel):
        cap = config.model.logit_softcap
        return cross_entropy(h, kernel, targets, weights, cap=cap, chunk=config.train.loss_chunk)[0]

    jitted = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return lambda: jitted(h, kernel)


def optimizer_alone(setup: Setup) -> Callable[[], Any]:
    """One update of every parameter."""
    transformation, params = setup.transformation(), setup.initial_params()
    rates = setup.put_scalars(optim.rates(setup.config.optimizer, setup.config.train.steps)(1))

    def update(params, state):
        updates, state = transformation.update(params, state, params, rates=rates)
        return jax.tree.map(jnp.add, params, updates), state

    jitted, held = jax.jit(update, donate_argnums=(0, 1)), [params, transformation.init(params)]

    def call() -> Any:
        held[:] = jitted(*held)
        return held[0]

    return call


def measure(setup: Setup, repeats: int, calls: int) -> dict[str, Any]:
    """Everything, as JSON."""
    config = setup.config
    device = setup.mesh.devices.flat[0]
    name, why = softmax.choose(config.model.mixer.implementation, jnp.dtype(config.train.precision), config.model.head_units)
    flops = training_flops(setup.model, config.data.sequence_length)
    tokens = config.data.batch_size * config.data.sequence_length
    with jax.set_mesh(setup.mesh):
        batch = made_up_batch(setup)
        call, compile_seconds = whole_step(setup, batch)
        step = seconds(call, repeats, calls)
        memory = device_memory()
        del call  # its state makes room for what follows
        # By how often a step runs each: once a layer and micro-batch, once a micro-batch, once.
        parts = {
            "attention": (attention_alone(setup, name), config.model.layers * config.train.accumulation),
            "head and loss": (head_alone(setup, batch), config.train.accumulation),
            "optimizer": (optimizer_alone(setup), 1),
        }
        alone = {}
        for part, (call, times) in parts.items():
            alone[part] = spread([1e3 * times * value for value in seconds(call, repeats, calls)])
    speed = [tokens / value for value in step]
    used = [mfu(flops.per_token, value, device.device_kind, setup.mesh.size, config.train.precision) for value in speed]
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.abstract_state()["params"])),
        "tokens_a_step": tokens,
        "precision": config.train.precision,
        "attention": {"implementation": name, "why": why},
        "flops_per_token": dataclasses.asdict(flops) | {"per_token": flops.per_token},
        "peak_flops": peak_flops(device.device_kind, config.train.precision),
        "compile_seconds": compile_seconds,
        "step_milliseconds": spread([1e3 * value for value in step]),
        "tokens_per_second": spread(speed),
        "mfu": None if used[0] is None else spread(used),
        "memory": memory,
        "alone_milliseconds": alone,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--config", required=True, help="the model, batch and precision")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the config")
    arguments.add_argument("--repeats", type=int, default=7, help="timed groups of steps")
    arguments.add_argument("--calls", type=int, default=10, help="steps of a group")
    chosen = arguments.parse_args(argv)
    loaded = configuration.load(chosen.config, overrides(chosen.set))
    devices.start(loaded.config)
    found = measure(assemble(loaded.config), chosen.repeats, chosen.calls)
    report(loaded.name, found)
    options = {"config": chosen.config, "set": chosen.set, "repeats": chosen.repeats, "calls": chosen.calls}
    write_result(f"gpu_mfu-{loaded.name}", {"options": options} | found, chosen.out)


def report(name: str, found: dict[str, Any]) -> None:
    """Print the table."""
    step = found["step_milliseconds"]["median"]
    peak = "n/a" if found["mfu"] is None else f"{100 * found['mfu']['median']:.1f} %"
    rows = [
        ["parameters", f"{found['parameters']:,}", ""],
        ["attention", found["attention"]["implementation"], found["attention"]["why"]],
        ["compile, s", f"{found['compile_seconds']:.1f}", ""],
        ["step, ms", f"{step:.2f}", "quartiles {:.2f}-{:.2f}".format(*found["step_milliseconds"]["quartiles"])],
        ["tokens/s", f"{found['tokens_per_second']['median']:,.0f}", f"{found['tokens_a_step']:,} a step"],
        ["MFU", peak, f"{found['flops_per_token']['per_token'] / 1e6:.1f} MFLOP a token, {found['precision']}"],
    ]
    if found["memory"]:
        rows.append(["peak memory, GiB", f"{found['memory'].get('peak_bytes_in_use', 0) / 2**30:.1f}", ""])
    for part, value in found["alone_milliseconds"].items():
        rows.append([f"{part} alone, ms", f"{value['median']:.2f}", f"{100 * value['median'] / step:.0f} % of the step"])
    show(f"{name}: the training step", ["", "", ""], rows)


if __name__ == "__main__":
    command.run(main)
