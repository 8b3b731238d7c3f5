"""What a model part costs: step time, parameters and memory of variants of one config against the config itself.

    python -m benchmarks.model_parts
    python -m benchmarks.model_parts --arm "rank 32=model.linear.name=noble,model.linear.rank=32" --set model.width=256

All variants live in one process; segments of a second or so alternate and the ratio is taken within each round. The default
arms are NOBLE at three ranks, its half-scale control, and plain and relaxed looped models. Scratch is the compiler's own
account of one step.
"""

from __future__ import annotations

import math
import time
from typing import Any

from benchmarks.measure import Neighbours, Patience, overrides, parser, quiet_only, show, shown_ratio, spread, write_result
from strata import to_tree
from strata.cpu import tune_cpu
from trainer import command

BASE = "base"
ARMS = {
    "noble rank 8": "model.linear.name=noble,model.linear.rank=8",
    "noble rank 16": "model.linear.name=noble,model.linear.rank=16",
    "noble rank 64": "model.linear.name=noble,model.linear.rank=64",
    "half scale only": "model.linear.name=noble,model.linear.rank=0",
    "2 loops": "model.depth.name=recursive,model.depth.loops=2",
    "2 loops, rank 8": "model.depth.name=recursive,model.depth.loops=2,model.depth.rank=8",
    "Mix-LN": "model.placement.name=mix",
}


class Arm:
    """A variant: its compiled step, its state, and what it holds."""

    def __init__(self, name: str, options: Any):
        import jax
        import numpy as np

        import optim
        from trainer.setup import assemble

        self.name, setup = name, assemble(options)
        rows = (options.data.batch_size, options.data.sequence_length)
        tokens = np.random.default_rng(0).integers(0, setup.model.vocab_size, rows).astype(np.int32)
        self.batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": np.ones(rows, np.int32)}
        self.batch = jax.device_put(self.batch | {"weights": np.ones(rows, np.float32)})
        self.rates = setup.put_scalars(optim.rates(options.optimizer, options.train.steps)(1))
        with jax.set_mesh(setup.mesh):
            self.state = setup.initial_state(setup.initial_params())
            compiled = setup.jitted_train_step().lower(self.state, self.batch, self.rates).compile()
        self.step, memory = compiled, compiled.memory_analysis()
        sizes = {part: sum(leaf.nbytes for leaf in jax.tree.leaves(self.state[part])) for part in ("params", "optimizer")}
        self.facts = {
            "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.state["params"])),
            "parameter_bytes": sizes["params"],
            "optimizer_bytes": sizes["optimizer"],
            "scratch_bytes": None if memory is None else memory.temp_size_in_bytes,
            "megaflops_a_token": _flops(setup, options) / 1e6,
        }

    def run(self, steps: int) -> float:
        """Seconds a step over `steps` steps."""
        import jax

        begin = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch, self.rates)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - begin) / steps


def _flops(setup: Any, options: Any) -> float:
    from trainer.flops import training_flops

    return training_flops(setup.model, options.data.sequence_length).per_token


def race(arms: list[Arm], rounds: int, seconds: float, patience: float) -> tuple[dict[str, list[float]], list[float | None]]:
    """Seconds a step of every arm in every round, and the cores that others used in it."""
    count = max(1, round(seconds / min(arm.run(3) for arm in arms)))
    found: dict[str, list[float]] = {arm.name: [] for arm in arms}
    others: list[float | None] = []
    calm = Patience(patience)
    for number in range(rounds):
        calm.wait()
        neighbours, begin, cpu = Neighbours(), time.perf_counter(), time.process_time()
        for arm in arms if number % 2 == 0 else arms[::-1]:
            found[arm.name].append(arm.run(count))
        others.append(neighbours.cores(time.perf_counter() - begin, time.process_time() - cpu))
    return found, others


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--config", default="configs/tiny.py", help="the base")
    arguments.add_argument("--arm", action="append", default=[], metavar="NAME=CHANGES", help="instead of the default arms")
    arguments.add_argument("--rounds", type=int, default=12, help="segments of every arm")
    arguments.add_argument("--seconds", type=float, default=0.7, help="length of a segment")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of all configs")
    chosen = arguments.parse_args(argv)
    from trainer.config import load

    named = dict(arm.split("=", 1) for arm in chosen.arm) or ARMS
    shared = overrides(chosen.set)
    configs = {BASE: load(chosen.config, shared).config}
    configs |= {name: load(chosen.config, [*shared, *overrides(text.split(","))]).config for name, text in named.items()}
    tune_cpu()
    arms = [Arm(name, options) for name, options in configs.items()]
    seconds, others = race(arms, chosen.rounds, chosen.seconds, chosen.patience)
    rows, found = [], {}
    for arm in arms:
        ratios = [mine / base for mine, base in zip(seconds[arm.name], seconds[BASE], strict=True)]
        quiet = quiet_only(ratios, others)
        found[arm.name] = arm.facts | {
            "milliseconds": spread([1e3 * value for value in seconds[arm.name]]),
            "step_over_base": spread(ratios),
            "step_over_base_quiet": spread(quiet) if quiet else None,
            "parameters_over_base": arm.facts["parameters"] / arms[0].facts["parameters"],
        }
        rows.append(
            [
                arm.name,
                f"{found[arm.name]['milliseconds']['median']:.1f}",
                shown_ratio(found[arm.name]["step_over_base"]),
                f"{arm.facts['parameters']:,}",
                f"{found[arm.name]['parameters_over_base']:.3f}",
                f"{(arm.facts['parameter_bytes'] + arm.facts['optimizer_bytes']) / 2**20:.2f}",
                "n/a" if arm.facts["scratch_bytes"] is None else f"{arm.facts['scratch_bytes'] / 2**20:.1f}",
                f"{arm.facts['megaflops_a_token']:.2f}",
            ]
        )
    columns = ["", "ms/step", "over base, median [95 %]", "parameters", "over base", "state MiB", "scratch MiB", "MFLOP/token"]
    show(f"parts of {chosen.config}", columns, rows)
    options = {"config": chosen.config, "rounds": chosen.rounds, "seconds": chosen.seconds, "set": chosen.set, "arms": named}
    write_result("model_parts", {"options": options | {"model": to_tree(configs[BASE].model)}, "arms": found}, chosen.out)


if __name__ == "__main__":
    command.run(main)
