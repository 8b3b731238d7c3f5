"""`python -m trainer.inspect --run DIR`: pictures of what every layer of a run does, from its rows of depth diagnostics.

Writes PNG files and `index.html`, a page that needs no network, to `DIR/inspect/`. A run without such rows is measured now, at
its newest checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> int:
    """The command line; prints where the page is."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, help="run directory")
    parser.add_argument(
        "--measure",
        choices=("latest", "all"),
        default=None,
        help="measure the newest checkpoint, or every one that is kept, instead of drawing the run's own rows",
    )
    arguments = parser.parse_args(argv)
    from strata import StrataError
    from trainer import runs
    from trainer.diagnostics.pictures import pictures, require_matplotlib

    runs.require_run(arguments.run)
    require_matplotlib()
    rows, source = [], "measured while it was trained"
    if arguments.measure is None:
        rows = recorded(arguments.run)
    if not rows:
        rows, source = measured(arguments.run, arguments.measure == "all"), "measured now, from its checkpoints"
        if arguments.measure is None:
            print("note: the run has no rows of diagnostics; its newest checkpoint is measured instead", file=sys.stderr)
    drawn = list(pictures(rows))
    if not drawn:
        raise StrataError(f"the rows of diagnostics of {arguments.run} hold no numbers")
    print(write(arguments.run, rows, source, drawn))
    return 0


def recorded(directory: Path) -> list[dict[str, Any]]:
    """The rows of diagnostics that a run has written, in order."""
    from trainer.metrics import read_metrics

    path = directory / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["split"] == "diagnostics"] if path.is_file() else []


def measured(directory: Path, every: bool = False) -> list[dict[str, Any]]:
    """Rows of diagnostics for a run's newest checkpoint, or for every one that is kept, as training would have written them.

    Raises:
      StrataError: there is no good checkpoint.
    """
    import jax

    from trainer import devices, load
    from trainer.diagnostics.measure import Diagnosis

    devices.use_compilation_cache()
    run = load(directory)
    diagnosis = Diagnosis(run.setup)
    for note in [*run.notes, *run.data_notes(), *diagnosis.notes]:
        print(f"note: {note}", file=sys.stderr)
    with jax.set_mesh(run.setup.mesh):
        return [{"step": step, "split": "diagnostics", **diagnosis.row(state)} for step, state in states(run, every)]


def states(run: Any, every: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parameters and optimizer state of an opened run's checkpoint, or of all that are kept, with their steps."""
    import jax

    from trainer.checkpoint import Checkpointer

    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        run.setup.abstract_state(),
        run.setup.state_shardings(),
    )
    wanted = {name: shapes[name] for name in ("params", "optimizer")}
    with contextlib.closing(Checkpointer(run.directory / "checkpoints")) as checkpointer:
        for step in checkpointer.steps() if every else [run.step]:
            yield step, checkpointer.restore(wanted, step, partial=True).state


def write(directory: Path, rows: Sequence[dict[str, Any]], source: str, drawn: Sequence[Any]) -> Path:
    """The PNG files and the page in `inspect/` of a run directory, in place of those of an earlier call; returns the page."""
    from trainer.atomic_files import write_bytes_atomic
    from trainer.diagnostics.page import page

    out = directory / "inspect"
    out.mkdir(exist_ok=True)
    for old in [*out.glob("*.png"), *out.glob("*.html")]:
        old.unlink()
    for picture in drawn:
        (out / f"{picture.name}.png").write_bytes(picture.png)
    names = list(dict.fromkeys(picture.diagnostic for picture in drawn))
    text = page(directory.resolve().name, facts(directory, rows, source), drawn, meanings(names))
    write_bytes_atomic(out / "index.html", text.encode())
    return out / "index.html"


def facts(directory: Path, rows: Sequence[dict[str, Any]], source: str) -> list[str]:
    """Sentences about the run and its rows."""
    from trainer import config as configuration

    config = configuration.load(str(directory / "config.json")).config
    model, option = config.model, config.diagnostics
    length = min(option.length or config.data.sequence_length, config.data.sequence_length)
    steps = f"steps {rows[0]['step']:,} to {rows[-1]['step']:,}" if len(rows) > 1 else f"step {rows[0]['step']:,}"
    return [
        f"{model.layers} layers of width {model.width}; mixer {model.mixer.name}, placement {model.placement.name}, "
        f"feed-forward {model.ffn.name}, linear {model.linear.name}, depth {model.depth.name}; "
        f"run {configuration.run_id(config)}.",
        f"{len(rows)} row{'s' if len(rows) > 1 else ''}, {steps}, {source}, on {option.sequences} held-out sequences of "
        f"{length} tokens.",
    ]


def meanings(names: Sequence[str]) -> dict[str, str]:
    """What each diagnostic measures, by name: the documentation of its function."""
    import inspect

    from strata import implementation, lookup, registry
    from trainer.diagnostics.options import KIND

    known = [name for name in names if name in registry.names(KIND)]
    found = {name: inspect.getdoc(implementation(lookup(KIND, name))) or "" for name in known}
    return {name: " ".join(text.replace("`", "").split()) for name, text in found.items()}


if __name__ == "__main__":
    from trainer.command import run

    run(main)
