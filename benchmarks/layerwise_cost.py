"""What layerwise rates add to a training step at their default intervals: heavy tail (LLR) and gradient noise (LANTON).

    python -m benchmarks.layerwise_cost
    python -m benchmarks.layerwise_cost --set model.width=256 --set model.layers=6

The same Muon step is compiled without and with each; steps that measure and steps that do not alternate with plain ones, and
the cost is what both add, weighted by how often each occurs. The training of a rate that stops adapting costs less than this.

Targets: at most 2 % of step time for llr, 5 % for lanton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.measure import Patience, Timed, batch_of, overrides, parser, show, spread, timed, write_result
from strata.cpu import tune_cpu
from trainer import command

CONTESTANTS = {
    "plain": [],
    "llr": [("optimizer.layerwise.name", "llr"), ("optimizer.layerwise.adapt", "1.0")],
    "lanton": [("optimizer.layerwise.name", "lanton")],
}


def stepper(changes: list[tuple[str, str]]) -> tuple[Callable[[int], None], int, Any]:
    """A function that does the update of a given number and waits for it; the interval of measurements; the config."""
    import jax
    import jax.numpy as jnp

    import optim
    from trainer.config import load
    from trainer.setup import assemble

    config = load("configs/tiny.py", [("data.name", "bigram"), ("data.vocabulary", "257"), *changes]).config
    setup = assemble(config)
    batch = batch_of(config, setup.model.vocab_size)
    rates = setup.put_scalars(optim.rates(config.optimizer, config.train.steps)(1))
    with jax.set_mesh(setup.mesh):
        held = [setup.initial_state(setup.initial_params())]
        step = setup.jitted_train_step()

    def run(number: int) -> None:
        state = held[0]
        state["optimizer"] = state["optimizer"]._replace(count=jnp.asarray(number - 1, jnp.int32))
        with jax.set_mesh(setup.mesh):
            held[0], metrics = step(state, batch, rates)
        jax.block_until_ready((held[0], metrics))

    interval = config.optimizer.layerwise.interval if config.optimizer.layerwise else 1
    return run, interval, config


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=10, help="rounds")
    arguments.add_argument("--count", type=int, default=4, help="updates in a segment")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the config")
    chosen = arguments.parse_args(argv)
    tune_cpu()
    changes = overrides(chosen.set)
    runs = {name: stepper([*changes, *own]) for name, own in CONTESTANTS.items()}
    # Beside the number of the update: whether it measures.
    segments = {"plain": ("plain", 7)}
    for name in ("llr", "lanton"):
        interval = runs[name][1]
        segments |= {f"{name}, measuring": (name, 2 * interval), f"{name}, between": (name, 2 * interval + 1)}
    for name, number in segments.values():
        runs[name][0](number)
    found: dict[str, list[Timed]] = {name: [] for name in segments}
    patience = Patience(chosen.patience)
    for pair in range(chosen.pairs):
        patience.wait()
        for label in list(segments) if pair % 2 == 0 else reversed(segments):
            name, number = segments[label]
            found[label].append(timed(functools.partial(runs[name][0], number), chosen.count))

    def cost(name: str, which: str) -> dict[str, Any]:
        interval = runs[name][1]
        labels = (f"{name}, measuring", f"{name}, between", "plain")
        rows = zip(*([getattr(one, which) for one in found[label]] for label in labels), strict=True)
        return spread([(due + (interval - 1) * idle) / interval / plain - 1 for due, idle, plain in rows])

    costs = {name: {"time": cost(name, "seconds"), "cpu": cost(name, "cpu")} for name in ("llr", "lanton")}
    milliseconds = {label: spread([1e3 * one.seconds for one in own]) for label, own in found.items()}
    others = spread([one.others for own in found.values() for one in own if one.others is not None] or [0.0])
    rows = [[label, f"{own['median']:.2f}"] for label, own in milliseconds.items()]
    show("one training step", ["", "ms"], rows)
    for name, both in costs.items():
        low, high = both["time"]["interval95"]
        print(
            f"{name}: every {runs[name][1]} steps it adds {both['time']['median']:.1%} of step time [{low:.1%}, {high:.1%}], "
            f"{both['cpu']['median']:.1%} of its CPU time"
        )
    print(f"others used {others['median']:.2f} cores meanwhile")
    options = {"pairs": chosen.pairs, "count": chosen.count, "set": chosen.set}
    write_result(
        "layerwise_cost", {"options": options, "milliseconds": milliseconds, "cost": costs, "others": others}, chosen.out
    )


if __name__ == "__main__":
    command.run(main)
