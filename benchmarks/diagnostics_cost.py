"""What depth diagnostics cost a run: the time of a row against that of the steps between two rows.

    python -m benchmarks.diagnostics_cost
    python -m benchmarks.diagnostics_cost --config configs/tiny.py --rows 30 --set model.layers=8

A real run writes a row every `--segment` steps; both times come from its `metrics.jsonl`, so each row is compared with the
steps right before it, and the cost is told for the interval that the config asks for. Compilation, once a run and from an
empty cache here, is told apart, and as a part of the config's own number of steps. Goal: at most 2 % at the default
interval. Then every diagnostic is measured alone, on the last checkpoint: what it shares with others (the forward pass)
counts in each.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Neighbours, Patience, overrides, parser, show, shown_ratio, spread, write_result
from trainer import command

ALONE = 5
"""Rows of a single diagnostic that are timed after the one that compiles it."""


def run_rows(config: Any, directory: Path) -> tuple[float, list[float], list[float]]:
    """Train; returns the seconds that the first row took longer than the others, and the rows' and steps' seconds."""
    from trainer import loop
    from trainer.metrics import read_metrics

    loop.train(config, directory)
    found = read_metrics(directory / "metrics.jsonl")
    steps = {row["step"]: row["timing"]["step_seconds"] for row in found if row["split"] == "train"}
    rows = [(row["step"], row["timing"]["seconds"]) for row in found if row["split"] == "diagnostics"]
    (_, first), *rest = rows
    seconds = [value for _, value in rest]
    return first - spread(seconds)["median"], seconds, [steps[step] for step, _ in rest]


def alone(directory: Path) -> dict[str, dict[str, float]]:
    """Seconds of a row, and of compiling, for each diagnostic by itself; those that have nothing to measure are left out."""
    import jax

    import trainer
    from trainer.diagnostics.measure import Diagnosis
    from trainer.inspect import states

    run = trainer.load(directory)
    option, found = run.config.diagnostics, {}
    with jax.set_mesh(run.setup.mesh):
        ((_, state),) = states(run)
        for name in option.chosen:
            diagnosis, seconds = Diagnosis(run.setup, dataclasses.replace(option, names=(name,))), []
            for _ in range(ALONE + 1):
                begin = time.perf_counter()
                row = diagnosis.row(state)
                seconds.append(time.perf_counter() - begin)
            if row:
                median = spread(seconds[1:])["median"]
                found[name] = {"row_seconds": median, "compile_seconds": seconds[0] - median}
    return found


def summary(compiling: float, rows: list[float], steps: list[float], every: int, length: int) -> dict[str, Any]:
    """The cost of rows at an interval, and of all of them and compiling in a run of `length` steps."""
    step = spread(steps)["median"]
    whole = compiling + spread(rows)["median"] * (length // every)
    return {
        "every": every,
        "row_seconds": spread(rows),
        "step_seconds": spread(steps),
        "cost": spread([row / (every * before) for row, before in zip(rows, steps, strict=True)]),
        "compile_seconds": compiling,
        "steps_of_the_run": length,
        "cost_with_compiling": whole / (length * step),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--config", default="configs/tiny.py", help="the run (default configs/tiny.py)")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the config")
    arguments.add_argument("--rows", type=int, default=20, help="rows that are timed, after the one that compiles")
    arguments.add_argument("--segment", type=int, default=10, help="steps between two of them")
    arguments.add_argument("--no-alone", action="store_true", help="do not measure every diagnostic by itself")
    chosen = arguments.parse_args(argv)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # none: what compiling costs is to be seen
    from trainer import config as configuration
    from trainer import devices

    wanted = configuration.load(chosen.config, overrides(chosen.set)).config
    every, length = wanted.diagnostics.every, wanted.train.steps
    if not every:
        raise SystemExit("error: diagnostics.every = 0 turns them off; there is nothing to measure")
    short = {"train.steps": (chosen.rows + 1) * chosen.segment, "diagnostics.every": chosen.segment}
    short |= {"log.every": chosen.segment, "evaluate.every": 0, "evaluate.batches": 1, "evaluate.final_batches": 1}
    short |= {"checkpoint.every": 0, "log.sample_tokens": 0}
    changes = [*overrides(chosen.set), *((path, str(value)) for path, value in short.items())]
    config = configuration.load(chosen.config, changes).config
    devices.start(config)
    Patience(chosen.patience).wait()
    neighbours, wall, cpu = Neighbours(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = summary(*run_rows(config, Path(folder) / "run"), every, length)
        found["other_cores"] = neighbours.cores(time.perf_counter() - wall, time.process_time() - cpu)
        if not chosen.no_alone:
            found["alone"] = alone(Path(folder) / "run")
    report(found)
    options = {"config": chosen.config, "set": chosen.set, "rows": chosen.rows, "segment": chosen.segment}
    write_result("diagnostics_cost", {"options": options} | found, chosen.out)


def report(found: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        ["a step, ms", _shown(found["step_seconds"], 1e3, 1)],
        ["a row, ms", _shown(found["row_seconds"], 1e3, 1)],
        [f"cost at every = {found['every']}, %", _shown(found["cost"], 100, 2)],
        ["compiling once, s", f"{found['compile_seconds']:.2f}"],
        [f"cost in {found['steps_of_the_run']:,} steps, compiling included, %", f"{100 * found['cost_with_compiling']:.2f}"],
    ]
    used = found["other_cores"]
    notes = [] if used is None else [f"other processes used {used:.1f} cores meanwhile"]
    show("depth diagnostics against the steps between them", ["", "median [95 %]"], rows, notes)
    if "alone" in found:
        by_cost = sorted(found["alone"].items(), key=lambda item: -item[1]["row_seconds"])
        table = [[name, f"{1e3 * v['row_seconds']:.1f}", f"{v['compile_seconds']:.2f}"] for name, v in by_cost]
        show("each by itself", ["", "row, ms", "compiling, s"], table)


def _shown(found: dict[str, Any], factor: float, digits: int) -> str:
    interval = [factor * value for value in found["interval95"]]
    return shown_ratio({"median": factor * found["median"], "interval95": interval}, digits)


if __name__ == "__main__":
    command.run(main)
