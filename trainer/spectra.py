"""`python -m trainer.spectra RUN...`: power laws `s = c M^-alpha` of the momentum's spectrum over runs of several sizes.

For every kind of matrix and depth (nearest N/4, N/2, 3N/4, and the last layer) the normalised singular values of descending
rank ceil(q r), q = 0.1, 0.25, 0.5, 0.75, 0.9, are read from the momentum in each run's checkpoints (arXiv:2606.04058, section
1), as geometric means over layers of one depth and over checkpoints. Laws of the median are printed in the form that
`optimizer.direction.newton_schulz.laws` takes. With one size, or one run, the values are shown without a law.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Key = tuple[str, str, float]
"""Kind of matrix, depth, quantile."""

MOMENTA = ("momentum", "mu", "trace", "ema")
"""What states call a running mean of the gradient, the first that exists."""


class Measured(NamedTuple):
    """The spectra of one run."""

    run: str
    size: int  # parameters of the model
    steps: tuple[int, ...]  # of the checkpoints that were read
    values: dict[Key, float]


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.spectra", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--last", type=int, default=1, help="newest checkpoints that are averaged (the paper: steps 1300 to 1500)"
    )
    parser.add_argument("--until", type=int, help="of the checkpoints up to this step, such as those before a decay (all)")
    parser.add_argument("--kinds", nargs="*", default=[], help="more patterns path=kind (fnmatch over dotted paths)")
    parser.add_argument("--out", type=Path, help="also write values and laws to this JSON file")
    arguments = parser.parse_args(argv)
    from strata import ConfigError

    if arguments.last < 1:
        raise ConfigError(f"--last = {arguments.last}: expected at least 1")
    if arguments.out and (arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir()):
        raise ConfigError(f"--out = {arguments.out}: expected a file in a directory that exists")
    found = [measure(run, arguments.last, arguments.kinds, arguments.until) for run in arguments.runs]
    laws = fits(found)
    show(found, laws)
    if arguments.out:
        arguments.out.write_text(json.dumps(as_json(found, laws), indent=1) + "\n")
        print(f"written to {arguments.out}")
    return 0


def measure(run_dir: str | Path, last: int = 1, kinds: Sequence[str] = (), until: int | None = None) -> Measured:
    """Quantiles of the momentum of every matrix of a run.

    Args:
      run_dir: a run directory.
      last: so many of its newest checkpoints are averaged.
      kinds: more patterns `path=kind`.
      until: only checkpoints up to this step; None: all.

    Raises:
      ConfigError: no run, a matrix of unknown kind, or an optimizer without a running mean of the gradient.
      StrataError: no good checkpoint.
    """
    import jax
    import numpy as np

    from optim import roles
    from optim.directions.spectral_laws import bucket
    from optim.kinds import kinds_of
    from optim.layerwise.spectrum import quantile_index
    from optim.options.newton_schulz import QUANTILES
    from strata import ConfigError, StrataError
    from trainer import manifest, runs
    from trainer.checkpoint import Checkpointer

    directory = Path(run_dir)
    declared = roles.parameters(runs.load(directory).model)
    kind_of, depth = kinds_of(declared, kinds, "--kinds"), roles.depth_of(declared, "matrix")
    checkpointer = Checkpointer(directory / "checkpoints")
    logs: dict[Key, list[float]] = {}
    try:
        steps = [step for step in checkpointer.steps() if until is None or step <= until][-last:]
        if not steps:
            raise StrataError(f"{directory} has no checkpoint {'yet' if until is None else f'up to step {until}'}")
        for step in steps:
            arrays = manifest.read_manifest(directory / "checkpoints" / str(step)).arrays
            for path, kind in kind_of.items():
                place = _momentum(arrays, path)
                if place is None:
                    raise ConfigError(f"{directory}: its optimizer keeps no running mean of the gradient of {path}")
                wanted: Any = jax.ShapeDtypeStruct(arrays[place][1], arrays[place][0])
                for name in reversed(place.split("/")):
                    wanted = {name: wanted}
                restored = checkpointer.restore(wanted, step, partial=True)
                momentum = np.asarray(jax.tree.leaves(restored.state)[0], np.float64)
                own = declared[path]
                rows = momentum if own.stacked else momentum[None]
                for layer, row in zip(own.positions or (depth - 1,), rows, strict=True):
                    for block in np.split(row, np.cumsum(own.split)[:-1], axis=-1) if own.split else [row]:
                        s = np.linalg.svd(block, compute_uv=False).reshape(-1, min(block.shape[-2:]))
                        s = s[np.linalg.norm(s, axis=-1) > 0]
                        s = s / np.linalg.norm(s, axis=-1, keepdims=True)
                        for q in QUANTILES:
                            at = np.log(np.maximum(s[:, quantile_index(s.shape[-1], q)], 1e-12))
                            logs.setdefault((kind, bucket(layer, depth), q), []).extend(at.tolist())
    finally:
        checkpointer.close()
    size = sum(math.prod(parameter.shape) for parameter in declared.values())
    values = {key: math.exp(sum(own) / len(own)) for key, own in logs.items() if own}
    return Measured(str(run_dir), size, tuple(steps), values)


def _momentum(arrays: Any, path: str) -> str | None:
    """Where a checkpoint keeps the running mean of a parameter's gradient."""
    for name in MOMENTA:
        for place in arrays:
            # A transformation of optax has the state of each parameter apart.
            apart = f"/{path}/" in place and place.endswith(f"/{name}")
            if place.startswith("optimizer/directions/") and (apart or place.endswith(f"/{name}/{path}")):
                return place
    return None


def fits(found: Sequence[Measured]) -> dict[Key, Any]:
    """A law for every kind, depth and quantile that runs of two sizes or more have."""
    from optim.directions.spectral_laws import fit

    laws = {}
    for key in sorted({key for run in found for key in run.values}):
        having = [run for run in found if key in run.values]
        if len({run.size for run in having}) > 1:
            laws[key] = fit([run.size for run in having], [run.values[key] for run in having])
    return laws


def show(found: Sequence[Measured], laws: dict[Key, Any]) -> None:
    """Print the values of every run, the laws, and the laws of the median as options."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    for run in found:
        console.print(f"{run.run}: {run.size:,} parameters, checkpoints {', '.join(map(str, run.steps))}", soft_wrap=True)
    keys = sorted({key for run in found for key in run.values})
    table = Table(title="normalised singular values of the momentum", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(["kind", "depth", "q", *(f"{run.size:,}" for run in found), "alpha", "95 %", "R2", "slopes"]):
        table.add_column(column, justify="left" if i < 2 else "right")
    for key in keys:
        cells = [f"{run.values[key]:.3g}" if key in run.values else "" for run in found]
        law = laws.get(key)
        tail = ["", "", "", ""]
        if law:
            slopes = " ".join(f"{slope:.2f}" for slope in law.slopes) if len(law.slopes) > 1 else ""
            low, high = law.alpha_interval
            interval = "none: two runs" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
            tail = [f"{law.law.alpha:.3f}", interval, f"{law.r_squared:.3f}", slopes]
        table.add_row(key[0], key[1], f"{key[2]:g}", *cells, *tail)
    console.print(table)
    for key in (key for key in laws if key[2] == 0.5):
        c, alpha = not_rising(laws[key].law, [run.values[key] for run in found if key in run.values])
        console.print(f"{key[0]}@{key[1]}={c:.6g},{alpha:.4f}")


def not_rising(law: Any, values: Sequence[float]) -> Any:
    """The law, or the constant that fits best where it rises with size: options take no negative exponent, since one that was
    fitted to noise would promise large models fewer steps.
    """
    if law.alpha >= 0:
        return law
    return law._replace(c=math.exp(sum(math.log(value) for value in values) / len(values)), alpha=0.0)


def as_json(found: Sequence[Measured], laws: dict[Key, Any]) -> dict[str, Any]:
    """Values and laws as plain data."""

    def named(key: Key) -> str:
        return f"{key[0]}@{key[1]} q={key[2]:g}"

    return {
        "runs": [run._asdict() | {"values": {named(key): value for key, value in run.values.items()}} for run in found],
        "laws": {
            named(key): {
                "c": law.law.c,
                "alpha": law.law.alpha,
                "c_interval": [None if math.isnan(x) else x for x in law.c_interval],
                "alpha_interval": [None if math.isnan(x) else x for x in law.alpha_interval],
                "r_squared": law.r_squared,
                "slopes": law.slopes,
            }
            for key, law in laws.items()
        },
    }


if __name__ == "__main__":
    from trainer.command import run

    run(main)
