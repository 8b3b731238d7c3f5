"""Compile time of the training step as the stack grows: depth 96 against depth 12, layers scanned.

    python -m benchmarks.compile_depth
    python -m benchmarks.compile_depth --depths 12 96 --set model.depth.unroll=True

JAX's caches are cleared before every compilation and the persistent cache is off; the depths alternate, and the ratio
is taken within each repeat. Tracing and lowering (Python) and XLA's compilation are shown apart. Target: ratio of the
sum at most 1.25.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from benchmarks.measure import Patience, overrides, parser, show, shown_ratio, spread, write_result
from strata import to_tree
from strata.cpu import tune_cpu
from trainer import command


def config(depth: int, changes: list[tuple[str, str]]) -> Any:
    """A checked config of the given depth, scanned unless `changes` say otherwise."""
    from trainer.config import load

    base = {
        "data.name": "bigram",
        "data.vocabulary": "257",
        "data.sequence_length": "128",
        "data.batch_size": "8",
        "model.width": "128",
        "model.heads": "4",
        "model.depth.unroll": "False",
        "model.layers": str(depth),
    }
    return load("configs/tiny.py", [*base.items(), *changes]).config


def compile_seconds(options: Any) -> dict[str, float]:
    """Seconds to trace and lower, and to compile, the training step of a config, nothing remembered from before."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import optim
    from trainer.setup import assemble

    setup = assemble(options)
    rows = (options.data.batch_size, options.data.sequence_length)
    batch = {name: jnp.zeros(rows, np.int32) for name in ("tokens", "targets", "segment_ids")}
    batch["weights"] = jnp.ones(rows, np.float32)
    rates = setup.put_scalars(optim.rates(options.optimizer, options.train.steps)(1))
    with jax.set_mesh(setup.mesh):
        state = setup.abstract_state()
        jax.clear_caches()
        gc.collect()
        step = setup.jitted_train_step()
        begin = time.perf_counter()
        lowered = step.lower(state, batch, rates)
        middle = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
    return {"trace": middle - begin, "compile": end - middle, "total": end - begin}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--depths", nargs=2, type=int, default=[12, 96], help="layers of the two stacks")
    arguments.add_argument("--repeats", type=int, default=7, help="compilations of each")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the config")
    chosen = arguments.parse_args(argv)
    changes = overrides(chosen.set)
    configs = {depth: config(depth, changes) for depth in chosen.depths}
    tune_cpu()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    first, last = chosen.depths
    compile_seconds(configs[first])  # the first compilation of a process starts the compiler too
    found: dict[int, list[dict[str, float]]] = {first: [], last: []}
    calm = Patience(chosen.patience)
    for number in range(chosen.repeats):
        for depth in (first, last) if number % 2 == 0 else (last, first):
            calm.wait()
            found[depth].append(compile_seconds(configs[depth]))
    parts = ("trace", "compile", "total")
    result: dict[str, Any] = {
        "depths": {depth: {part: spread([one[part] for one in found[depth]]) for part in parts} for depth in found},
        "ratio": {part: spread([b[part] / a[part] for a, b in zip(found[first], found[last], strict=True)]) for part in parts},
    }
    rows = [
        [part, *(f"{result['depths'][depth][part]['median']:.2f}" for depth in found), shown_ratio(result["ratio"][part])]
        for part in parts
    ]
    columns = ["", *(f"{depth} layers, s" for depth in found), "ratio, median [range or 95 %]"]
    show("compile time of the training step", columns, rows)
    options = {"depths": chosen.depths, "repeats": chosen.repeats, "set": chosen.set, "model": to_tree(configs[first].model)}
    write_result("compile_depth", {"options": options} | result, chosen.out)


if __name__ == "__main__":
    command.run(main)
