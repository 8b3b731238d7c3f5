"""`python -m trainer.evaluate --run DIR [--step N | --average lawa:5]`: loss, perplexity, bits per byte, accuracy."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:  # not at run time: other packages of our names are looked for first (`trainer.command`)
    from trainer.runs import Run
    from trainer.setup import Setup

IN_FLIGHT = 4
"""Batches of an evaluation that are dispatched before the oldest must be done."""


def evaluate(
    setup: Setup, params: Any, step: Any, batches: int | None, between: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Score held-out data.

    A batch has `evaluate.batch_size` sequences, by default as many as one of training. Without a size of its own it is taken
    in the parts that training takes it in, `train.accumulation` of them, so that it needs no more memory; which sequences are
    scored does not depend on that.

    Args:
      setup: of the run.
      params: nested dict of parameters.
      step: `setup.jitted_evaluation_step()`, compiled once for all evaluations of a run.
      batches: at most this many, spread over the held-out data; None: all of it.
      between: called before each batch; what it raises ends the evaluation.

    Returns:
      `loss` in nats per token, `perplexity`, `tokens`; `bpb` where tokens stand for bytes; `accuracy` where it means
      something; each of the three also as `loss/NAME` for every view of the depth strategy. Equal on every process.
    """
    config = setup.config
    whole = config.evaluate.batch_size or config.data.batch_size
    size = config.evaluate.batch_size or config.data.batch_size // config.train.accumulation
    rows = None if batches is None else batches * whole
    parts: list[Any] = []
    for batch in setup.dataset.validation(size, rows=rows, **setup.share(size)):
        between()
        parts.append(step(params, setup.put_batch(batch, size)))
        if len(parts) > IN_FLIGHT:  # the host must not run ahead and fill the device with batches
            jax.block_until_ready(parts[-IN_FLIGHT])
    # Added in float64 on the host: a float32 sum over millions of tokens would lose digits.
    parts = jax.device_get(parts)
    return summary(setup, {name: sum(float(part[name]) for part in parts) for name in parts[0]})


def summary(setup: Setup, total: dict[str, Any]) -> dict[str, float]:
    """From sums over tokens to the numbers that are reported."""
    tokens = float(total["tokens"])
    loss = float(total["nats"]) / tokens if tokens else math.nan
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}
    if setup.dataset.token_bytes is not None:
        found["bpb"] = bits_per_byte(total)
    if setup.dataset.reports_accuracy:
        found["accuracy"] = float(total["right"]) / tokens if tokens else math.nan
    for name in total:
        _, _, view = name.partition("nats/")
        if view:
            found[f"loss/{view}"] = float(total[name]) / tokens if tokens else math.nan
            if "bpb" in found:
                found[f"bpb/{view}"] = bits_per_byte(total, name)
            if "accuracy" in found:
                found[f"accuracy/{view}"] = float(total[f"right/{view}"]) / tokens if tokens else math.nan
    return found


def bits_per_byte(total: dict[str, Any], nats: str = "nats") -> float:
    """Summed nats / ln 2 / bytes of raw text scored."""
    return float(total[nats]) / math.log(2) / float(total["bytes"]) if total["bytes"] else math.nan


def describe(found: dict[str, float]) -> str:
    """The numbers of an evaluation in one line."""
    words = [f"loss {found['loss']:.4f} nats/token", f"perplexity {found['perplexity']:.3f}"]
    words += [f"{found['bpb']:.4f} bits per byte"] if "bpb" in found else []
    words += [f"accuracy {found['accuracy']:.4f}"] if "accuracy" in found else []
    shown = "bpb/" if "bpb" in found else "loss/"
    words += [f"{name.removeprefix(shown)} {value:.4f}" for name, value in found.items() if name.startswith(shown)]
    return ", ".join([*words, f"{found['tokens']:,} tokens"])


STEP_HELP = "a checkpoint's step or name, best, or latest (default)"


def step_or_name(text: str) -> int | str:
    """`--step`: a number, or a word that `trainer.load` looks up in the run."""
    return int(text) if text.isdecimal() else text


def positive(text: str) -> int:
    """A whole number from 1 on that an int32 holds, for a flag."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {2**31 - 1:,}, not {text!r}")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """The command line; prints one line of words and one of JSON."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__)
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument("--step", type=step_or_name, default=None, help=STEP_HELP)
    parser.add_argument("--batches", type=positive, default=None, help="batches spread over the held-out data (default: all)")
    parser.add_argument("--depth", default=None, help="another way to run the same weights, as JSON with a name, or a name")
    parser.add_argument("--average", default=None, help="of the newest checkpoints: lawa:5, cma:6:0.2 or wsm:5:linear")
    arguments = parser.parse_args(argv)
    from strata import ConfigError, to_tree
    from trainer import averaging, devices, load

    if arguments.average is not None and arguments.step is not None:
        raise ConfigError("--average takes the newest checkpoints; leave out --step")
    weights = None if arguments.average is None else averaging.weights_of(arguments.average)
    devices.use_compilation_cache()
    run = load(arguments.run, arguments.step)
    for note in [*run.notes, *run.data_notes()]:
        print(f"note: {note}", file=sys.stderr)
    depth = read_depth(arguments.depth, run)
    step = run.setup.jitted_evaluation_step(depth=depth)
    params, which, words = run.params, {"step": run.step}, f"step {run.step}"
    if weights is not None:
        params, steps = averaging.averaged(run, weights)
        which |= {"average": arguments.average, "steps": steps, "weights": weights.tolist()}
        words = f"{arguments.average} of steps {', '.join(map(str, steps))}"
        if len({after - before for before, after in itertools.pairwise(steps)}) > 1:
            print(f"note: the checkpoints of steps {', '.join(map(str, steps))} are not evenly spaced", file=sys.stderr)
    with jax.set_mesh(run.setup.mesh):
        found = evaluate(run.setup, params, step, arguments.batches)
    if depth is not None:
        which |= {"depth": to_tree(depth)}
        words += f" by {describe_depth(depth)}"
    print(f"{run.directory} {words}: {describe(found)}")
    print(json.dumps({"run": str(run.directory)} | which | found))
    return 0


def describe_depth(depth: Any) -> str:
    """A depth strategy by its name and the fields that are not the default of its class."""
    usual = type(depth)()
    fields = {field.name: getattr(depth, field.name) for field in dataclasses.fields(depth)}
    return " ".join([depth.name, *(f"{name}={value}" for name, value in fields.items() if value != getattr(usual, name))])


def read_depth(text: str | None, run: Run, flag: str = "--depth") -> Any:
    """`--depth` to a depth strategy's options for the weights of a run: JSON, or a name alone. Raises `ConfigError`."""
    if text is None:
        return None
    from models.transformer import depth_options

    return depth_options(read_part(text, "model.depth", flag), run.model.options, flag)


def read_part(text: str, kind: str, flag: str) -> dict[str, Any]:
    """A component on the command line, JSON with a name or a name alone, as a dict. Raises `ConfigError`."""
    from strata import ConfigError, registry

    names = registry.names(kind)
    try:
        part = {"name": text} if text in names else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} = {text!r} is not JSON ({error}), nor one of {', '.join(names)}") from None
    if not isinstance(part, dict):
        raise ConfigError(f'{flag} = {text!r}: expected a dict with a name, such as \'{{"name": "{names[-1]}"}}\'')
    return part


if __name__ == "__main__":
    from trainer.command import run

    run(main)
