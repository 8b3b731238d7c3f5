"""From the start of the process to the end of the first training step, with a warm compilation cache.

    python -m benchmarks.start_time
    python -m benchmarks.start_time --config configs/tiny.py --repeats 9

Every repeat is a fresh `python -m trainer` in all but its name: the same entry with clocks around its parts, in a new
run directory, stopped when the first step's metrics have arrived. The compilation cache is a directory of this
benchmark's own, filled by one cold start that is reported apart. Target: median at most 4 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Neighbours, Patience, parser, show, spread, write_result
from trainer.command import run

PARTS = (
    "interpreter",
    "config",
    "imports",
    "data",
    "assemble",
    "initial state",
    "run directory",
    "step 1: compile",
    "step 1: run",
)


def start_once(config: str, changes: list[str], cache: Path) -> dict[str, Any]:
    """Seconds of every part of one start, their total, and the cores that others used."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.timed_start", "--config", config, "--workdir", f"{folder}/run"]
        command += [f"--config.{change}" for change in changes]
        neighbours, children, begin = Neighbours(), _children(), time.time()
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "BENCHMARK_BEGIN": repr(begin)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the start failed with code {done.returncode}:\n{done.stderr[-2000:]}")
        others = neighbours.cores(time.time() - begin, _children() - children)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"others": others}


def _children() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--config", default="configs/tiny.py", help="the run (default configs/tiny.py)")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the config")
    arguments.add_argument("--repeats", type=int, default=7, help="fresh processes")
    chosen = arguments.parse_args(argv)
    calm = Patience(chosen.patience)
    with tempfile.TemporaryDirectory() as cache:
        cold = start_once(chosen.config, chosen.set, Path(cache))
        warm = []
        for _ in range(chosen.repeats):
            calm.wait()
            warm.append(start_once(chosen.config, chosen.set, Path(cache)))
    result = {
        "cold": cold,
        "warm": {part: spread([start[part] for start in warm]) for part in (*PARTS, "other", "total")},
        "others_cores": [start["others"] for start in warm],
    }
    rows = []
    for part in (*PARTS, "other", "total"):
        found = result["warm"][part]
        low, high = found["quartiles"]
        rows.append([part, f"{found['median']:.2f}", f"{low:.2f}-{high:.2f}", f"{cold[part]:.2f}"])
    seen = [value for value in result["others_cores"] if value is not None]
    notes = [f"cores used by other processes: {', '.join(f'{value:.2f}' for value in seen)}"]
    show("seconds from the start of the process to the end of step 1", ["", "warm cache", "quartiles", "cold"], rows, notes)
    options = {"config": chosen.config, "set": chosen.set, "repeats": chosen.repeats}
    write_result("start_time", {"options": options} | result, chosen.out)


if __name__ == "__main__":
    run(main)
