"""Latency of layer-parallel execution against the sequential stack at batch 1, always beside the loss that it costs.

    python -m benchmarks.layer_parallel --run runs/snlp             # a trained run: latency and held-out loss
    python -m benchmarks.layer_parallel                             # untrained weights: latency alone, and it says so

One forward pass of a whole sequence is timed for every way to run the weights, alternating; the ratio to the sequential pass is
taken within each round. Without a run the model has 32 layers of width 640 on an accelerator, as in SNLP's 0.5 B setting, and
of width 64 on CPU.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.measure import Patience, parser, show, shown_ratio, spread, write_result
from trainer import command

SEQUENTIAL = "sequential"


def ways(layers: int) -> dict[str, dict[str, Any]]:
    """The strategies that are compared, by a short name: N layers of the suffix, K sweeps, M fused."""
    found: dict[str, dict[str, Any]] = {SEQUENTIAL: {"name": "sequential"}}
    for part in (4, 2):
        count = layers // part
        for sweeps in (1, 2, 4):
            if sweeps < count:
                found[f"N{count} K{sweeps}"] = {"name": "layer_parallel", "layers": count, "sweeps": sweeps}
    count = layers // 2
    found[f"N{count} K1 batched"] = {"name": "layer_parallel", "layers": count, "start": "batched", "sweeps": 1}
    for fused in (2, count):
        if count % fused == 0:
            found[f"N{count} M{fused} K1"] = {"name": "layer_parallel", "layers": count, "sweeps": 1, "fused": fused}
    return found


def untrained(platform: str) -> dict[str, Any]:
    """Options of the model that is timed without a run."""
    size = {"width": 64, "heads": 2} if platform == "cpu" else {"width": 640, "heads": 5}
    return {"layers": 32, "output_init": "scaled", **size}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--run", default=None, help="run directory of a trained model")
    arguments.add_argument("--length", type=int, default=None, help="tokens of the sequence (default 512, or the run's)")
    arguments.add_argument("--layers", type=int, default=None, help="without a run: layers of the model (default 32)")
    arguments.add_argument("--batches", type=int, default=8, help="with a run: batches of held-out data to score")
    arguments.add_argument("--rounds", type=int, default=20, help="passes of every strategy")
    chosen = arguments.parse_args(argv)
    import jax
    from flax import nnx

    import models
    from models.transformer import depth_options
    from strata import ConfigError
    from strata.cpu import tune_cpu

    tune_cpu()
    platform, losses = jax.default_backend(), {}
    if chosen.run:
        from trainer import load

        run = load(chosen.run)
        model, length = run.model, chosen.length or run.config.data.sequence_length
    else:
        precision = "float32" if platform == "cpu" else "bfloat16"
        options = untrained(platform) | ({"layers": chosen.layers} if chosen.layers else {})
        model, length = models.build(options, vocab_size=32768, seed=0, precision=precision), chosen.length or 512
    strategies, refused = ways(model.options.layers), []
    for name, depth in list(strategies.items()):
        try:
            depth_options(depth, model.options)
        except ConfigError as error:
            refused.append(f"{name} is not possible: {error}")
            del strategies[name]
    graph, state = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, model.vocab_size)

    def passes(depth: dict[str, Any]) -> Any:
        return jax.jit(lambda state, tokens: nnx.merge(graph, state).hidden(tokens, depth=depth)[0])

    calls = {name: passes(depth).lower(state, tokens).compile() for name, depth in strategies.items()}
    if chosen.run:
        from trainer.evaluate import evaluate

        for name, depth in strategies.items():
            with jax.set_mesh(run.setup.mesh):
                losses[name] = evaluate(run.setup, run.params, run.setup.jitted_evaluation_step(depth=depth), chosen.batches)
    seconds: dict[str, list[float]] = {name: [] for name in strategies}
    calm = Patience(chosen.patience)
    for number in range(chosen.rounds + 2):
        calm.wait()
        for name in strategies if number % 2 == 0 else reversed(strategies):
            begin = time.perf_counter()
            jax.block_until_ready(calls[name](state, tokens))
            if number >= 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - begin)
    found, rows = {}, []
    for name, depth in strategies.items():
        ratios = [base / own for base, own in zip(seconds[SEQUENTIAL], seconds[name], strict=True)]
        found[name] = {
            "depth": depth,
            "milliseconds": spread([1e3 * value for value in seconds[name]]),
            "faster_than_sequential": spread(ratios),
            "evaluation": losses.get(name),
        }
        loss = losses.get(name)
        shown = ["untrained", ""] if loss is None else [f"{loss['loss']:.4f}", f"{loss['perplexity']:.3f}"]
        rows.append(
            [name, f"{found[name]['milliseconds']['median']:.2f}", shown_ratio(found[name]["faster_than_sequential"]), *shown]
        )
    title = f"one sequence of {length} tokens, {model.options.layers} layers, width {model.options.width}"
    show(title, ["", "ms", "times as fast, median [95 %]", "loss", "perplexity"], rows, refused)
    options = {"run": chosen.run and run.config.model.depth.name, "length": length, "rounds": chosen.rounds}
    options |= {"layers": model.options.layers, "width": model.options.width, "batches": chosen.batches}
    write_result("layer_parallel", {"options": options, "strategies": found}, chosen.out)


if __name__ == "__main__":
    command.run(main)
