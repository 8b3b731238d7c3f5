"""Tokens a second of one small training step on CPU: Strata, the plainest JAX script, PyTorch eager, others.

    python -m benchmarks.step_speed
    python -m benchmarks.step_speed --sizes medium --ablate
    python -m benchmarks.step_speed --external "name=command to start a worker {size}"

Every contestant trains the same Llama-style model on the same batch in a process of its own; segments of half a second
or so alternate. The ratio of tokens a second is taken within each round. `--ablate` compares Strata with itself, one
form left out at a time. An external worker speaks the protocol of `benchmarks.workers`; `{size}` in its command is
replaced by the size as JSON.

Targets: at least 0.98 of the plain script; goal 1.0 of PyTorch eager.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from typing import Any

from benchmarks.measure import QUIET, parser, quiet_only, show, shown_ratio, spread, write_result
from benchmarks.steps import ablations
from benchmarks.steps.sizes import SIZES, Size
from benchmarks.workers import Segment, Worker, alternate
from trainer.command import run

STRATA = "Strata"


def commands(size: Size, *, ablate: bool, external: list[str], only: list[str]) -> dict[str, list[str]]:
    """How to start every contestant, by name. Strata is first."""
    text = size.to_json()

    def module(name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.steps.{name}", "--size", text, *more]

    found = {STRATA: module("strata_step")}
    if ablate:
        found |= {f"without {name}": module("strata_step", "--without", name) for name in only or ablations.NAMES}
    else:
        found["plain JAX"] = module("plain_jax")
        if importlib.util.find_spec("torch"):
            found["PyTorch eager"] = module("torch_eager")
    for word in external:
        name, equals, command = word.partition("=")
        if not equals:
            raise SystemExit(f"error: --external {word}: expected name=command")
        found[name] = [part.replace("{size}", text) for part in shlex.split(command)]
    return found


def summary(segments: dict[str, list[Segment]], tokens: dict[str, int]) -> list[dict[str, Any]]:
    """Speed of each contestant, and of Strata relative to it, in all rounds and in those where nobody disturbed."""
    mine = segments[STRATA]
    rows = []
    for name, others in segments.items():
        ratios = [
            (theirs.seconds / tokens[name]) / (own.seconds / tokens[STRATA]) for own, theirs in zip(mine, others, strict=True)
        ]
        busy = [
            None if own.others is None or theirs.others is None else max(own.others, theirs.others)
            for own, theirs in zip(mine, others, strict=True)
        ]
        quiet = quiet_only(ratios, busy)
        rows.append(
            {
                "name": name,
                "milliseconds": spread([1e3 * segment.seconds for segment in others]),
                "tokens_per_second": spread([tokens[name] / segment.seconds for segment in others]),
                "cpu_milliseconds": spread([1e3 * segment.cpu for segment in others]),
                "strata_speed_over_this": spread(ratios),
                "strata_speed_over_this_quiet": spread(quiet) if quiet else None,
                "others_cores": spread([segment.others for segment in others if segment.others is not None] or [0.0]),
            }
        )
    return rows


def race(size: Size, contestants: dict[str, list[str]], rounds: int, seconds: float, patience: float) -> list[dict[str, Any]]:
    """Start everyone, alternate, and sum up."""
    workers: list[Worker] = []
    try:
        for name, command in contestants.items():
            workers.append(Worker(name, command))
        segments = alternate(workers, rounds, seconds, patience)
        return summary(segments, {worker.name: worker.tokens for worker in workers})
    finally:
        for worker in workers:
            worker.close()


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", nargs="+", type=Size.parse, default=list(SIZES.values()), help="small, medium, or JSON")
    arguments.add_argument("--rounds", type=int, default=24, help="segments of every contestant")
    arguments.add_argument("--seconds", type=float, default=0.7, help="length of a segment")
    arguments.add_argument("--external", action="append", default=[], help="NAME=COMMAND of another worker")
    arguments.add_argument("--ablate", action="store_true", help="Strata against itself, one form left out at a time")
    arguments.add_argument("--only", nargs="+", default=[], choices=ablations.NAMES, help="with --ablate: these forms only")
    chosen = arguments.parse_args(argv)
    found = []
    for size in chosen.sizes:
        contestants = commands(size, ablate=chosen.ablate, external=chosen.external, only=chosen.only)
        rows = race(size, contestants, chosen.rounds, chosen.seconds, chosen.patience)
        found.append({"size": vars(size), "contestants": rows})
        report(size, rows, chosen.ablate)
    if not chosen.ablate and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed and was not measured: pip install -e '.[benchmark]'")
    options = {"rounds": chosen.rounds, "seconds": chosen.seconds}
    write_result("step_ablations" if chosen.ablate else "step_speed", {"options": options, "sizes": found}, chosen.out)


def report(size: Size, rows: list[dict[str, Any]], ablate: bool) -> None:
    """Print the table of one size."""
    shown = []
    for row in rows:
        quiet = row["strata_speed_over_this_quiet"]
        quartiles = row["strata_speed_over_this"]["quartiles"]
        shown.append(
            [
                row["name"],
                f"{row['milliseconds']['median']:.1f}",
                f"{row['tokens_per_second']['median']:,.0f}",
                f"{row['cpu_milliseconds']['median']:.1f}",
                shown_ratio(row["strata_speed_over_this"]),
                f"{quartiles[0]:.3f}-{quartiles[1]:.3f}",
                f"{shown_ratio(quiet)} n={quiet['count']}" if quiet else "none",
                f"{row['others_cores']['median']:.2f}",
            ]
        )
    columns = ["", "ms/step", "tokens/s", "CPU ms", "Strata is faster by", "quartiles", "in quiet rounds", "others"]
    notes = [f"faster by: tokens/s of Strata over this one, median [95 %]. others: cores used elsewhere; quiet: <= {QUIET}."]
    if ablate:
        notes += [f"without {name}: {ablations.meaning(name)}" for name in ablations.NAMES]
    title = f"{size.layers} layers, width {size.width}, {size.heads} heads, batch {size.batch} x {size.length}"
    show(title, columns, shown, notes)


if __name__ == "__main__":
    run(main)
