"""`python -m trainer.convert --run DIR --out DIR --loops B [--rank R]`: a sequential run as a looped one, ready to train on.

`--to` names another conversion."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.evaluate import STEP_HELP, positive, read_part, step_or_name
from trainer.generate import seed as seed_argument

if TYPE_CHECKING:
    from trainer.options import Config

FLAGS = ("loops", "rank", "initial", "adapters", "norms")  # of the conversion looped

EPILOG = """\
The new run directory is complete and stands at step 0: evaluate it, sample from it, or train it on with

    python -m trainer --config OUT/config.json --workdir OUT

Any field of its config can be changed here, such as --config.train.steps=300, or
--config.train.teacher.run=DIR to distil from the donor."""


def main(argv: Sequence[str]) -> int:
    """The command line; prints what was lost, and one line of JSON."""
    from models.options import Looped
    from strata.options import declaration

    among = {field.name: declaration(field).among for field in dataclasses.fields(Looped)}
    parser = argparse.ArgumentParser(
        prog="python -m trainer.convert", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", required=True, help="run directory of the donor")
    parser.add_argument("--step", type=step_or_name, default=None, help=STEP_HELP)
    parser.add_argument("--out", required=True, help="run directory to make")
    parser.add_argument("--seed", type=seed_argument, default=0, help="of what is drawn, such as adapters that start at zero")
    parser.add_argument(
        "--to",
        default="looped",
        help="the conversion, a name or JSON with a name (default looped, which the flags\nbelow belong to); "
        "the model that it makes is the donor's with --config.model... changed",
    )
    parser.add_argument("--loops", type=positive, default=None, help="times the blocks are run through (default 2)")
    parser.add_argument(
        "--rank", type=positive, default=None, help="of the low-rank matrix of each executed layer (default: none)"
    )
    parser.add_argument(
        "--initial",
        choices=among["initial"],
        default=None,
        help="shared blocks: default average with --rank, else stepwise",
    )
    parser.add_argument("--adapters", choices=among["adapters"], default=None, help="how low-rank matrices start (default svd)")
    parser.add_argument(
        "--norms", choices=("shared", "own"), default=None, help="of executed layers: default own with --rank, else shared"
    )
    arguments, rest = parser.parse_known_args(argv)
    changes = overrides(rest)
    from trainer import load

    donor = load(arguments.run, arguments.step)
    config, notes = converted_config(donor.directory, arguments, changes)
    conversion = chosen(arguments, config)
    for note in notes:
        print(f"note: {note}")
    lost, step = convert(donor, config, Path(arguments.out), conversion, arguments.seed)
    sizes = f"{config.model.layers} executed layers, {config.model.unique_layers} blocks"
    print(f"{arguments.out}: {sizes}, from {arguments.run} step {step}")
    if lost:
        print("share of each kind of matrix that the new model lacks, |W - W_eff| / |W|:")
    for name, share in sorted(lost.items()):
        print(f"  {name:24} {share:.4f}")
    print(json.dumps({"run": arguments.out, "donor": arguments.run, "step": step, "lost": lost}))
    return 0


def named(text: str) -> dict[str, Any]:
    """`--to` as a dict. A name alone may be of a module that the config has yet to load; `chosen` refuses one that is not."""
    return {"name": text} if text.isidentifier() else read_part(text, "model.conversion", "--to")


def is_looped(arguments: argparse.Namespace) -> bool:
    """Whether the model is made to loop, which has flags of its own. Raises `ConfigError` if another has them."""
    from strata import ConfigError

    if named(arguments.to).get("name") == "looped":
        return True
    given = [f"--{name}" for name in FLAGS if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(f"{', '.join(given)} belong to the conversion looped, and --to is {arguments.to}")
    return False


def chosen(arguments: argparse.Namespace, config: Config) -> Any:
    """The conversion's options. Raises `ConfigError`, also where it cannot make the model of `config`."""
    from strata import ConfigError, Problem, registry, resolve

    tree = named(arguments.to)
    if is_looped(arguments):
        given = {field: getattr(arguments, field) for field in ("initial", "adapters") if getattr(arguments, field)}
        for field, value in given.items():
            if tree.get(field, value) != value:
                raise ConfigError(f"--{field} is {value}, and --to has {field} = {tree[field]!r}: give one of them")
        tree = {"initial": "average" if arguments.rank else "stepwise"} | tree | given
    name = tree.pop("name", None)
    if name not in registry.names("model.conversion"):
        raise ConfigError(f"--to = {arguments.to!r}: registered are {', '.join(registry.names('model.conversion'))}")
    option, found = resolve(registry.lookup("model.conversion", name), tree, "--to")
    problems = found.problems
    if not problems and hasattr(option, "problems_in"):
        problems = [Problem(f"--to.{field}", message) for field, message in option.problems_in(config.model)]
    if problems:
        raise ConfigError(problems, "--to")
    return option


def overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--config.KEY=VALUE` arguments as pairs. Raises `ConfigError` for anything else."""
    from strata import ConfigError

    pairs = []
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--config.") or not equals:
            raise ConfigError(f"unknown argument {word!r}; fields of the new config are given as --config.KEY=VALUE")
        pairs.append((name.removeprefix("--config."), value))
    return pairs


def converted_config(
    directory: Path, arguments: argparse.Namespace, changes: Sequence[tuple[str, str]]
) -> tuple[Config, list[str]]:
    """The donor's config, with loops where those are asked for and what the command line changes, and notes on what no longer
    applies.

    Where the donor itself started, and what it was distilled from, are not taken over. Raises `ConfigError`.
    """
    from trainer import config as configuration

    depth = []
    if is_looped(arguments):
        own = {"shared": "true", "own": "false"}[arguments.norms or ("own" if arguments.rank else "shared")]
        depth = [
            ("model.depth.name", "recursive"),
            ("model.depth.loops", str(arguments.loops or 2)),
            ("model.depth.rank", str(arguments.rank or 0)),
            ("model.depth.share_norms", own),
        ]
    origin = [("init_from.run", "none"), ("init_from.convert", "none"), ("train.teacher.run", "none")]
    found = configuration.load(str(directory / "config.json"), [*origin, *depth, *changes])
    return found.config, found.notes


def convert(donor: Any, config: Config, out: Path, conversion: Any, seed: int = 0) -> tuple[dict[str, float], int]:
    """Write a run directory that stands at step 0 with the donor's weights in another shape.

    Args:
      donor: a `trainer.Run`.
      config: of the new run.
      out: its directory, which must not hold a run.
      conversion: options of kind `model.conversion`.
      seed: of whatever it draws.

    Returns:
      What was lost by name, and the donor's step.

    Raises:
      ConfigError: the directory holds a run, or the models do not match.
    """
    import jax

    from strata import ConfigError, to_tree
    from trainer import config as configuration
    from trainer.atomic_files import write_json_atomic
    from trainer.checkpoint import Checkpointer
    from trainer.environment import describe_environment
    from trainer.run_directory import RunDirectory
    from trainer.setup import assemble

    if (out / "config.json").exists() or any(out.glob("checkpoints/*")):
        raise ConfigError(f"--out = {str(out)!r} holds a run already; give a new directory")
    setup = assemble(config)
    params, lost = converted_params(donor, setup, conversion, seed)
    how = to_tree(conversion) | {"seed": seed}
    record = {"donor": str(donor.directory), "step": donor.step, "conversion": how, "lost": lost}
    with RunDirectory(out) as directory, jax.set_mesh(setup.mesh):
        state = setup.initial_state(params)
        rows = setup.dataset.train(**setup.share(config.data.batch_size))
        host = {"data": rows.get_state(), "metrics_offset": 0, "config": to_tree(config)}
        rows.close()
        directory.write_environment(describe_environment(modules=config.plugins) | {"data": setup.dataset.description})
        checkpointer = Checkpointer(directory.checkpoints, keep_latest=config.checkpoint.keep_latest)
        checkpointer.save(0, state, host, blocking=True)
        checkpointer.close()
        write_json_atomic(out / "conversion.json", record)
        directory.write_status("preempted", 0, f"converted from {donor.directory} step {donor.step}")
        # Last, since it makes the directory a run: one without the converted weights would begin from random ones.
        directory.write_config(configuration.canonical_json(config), {"name": out.name, "converted": record})
    return lost, donor.step


def converted_params(donor: Any, setup: Any, conversion: Any, seed: int) -> tuple[Any, dict[str, float]]:
    """A run's parameters as those of another model, laid out for it, and what was lost.

    Args:
      donor: a `trainer.Run`.
      setup: of the new model.
      conversion: options of kind `model.conversion`.
      seed: of whatever it draws.

    Raises:
      ConfigError: the models do not match, or the tokenizers.
    """
    import jax
    import numpy as np
    from flax import nnx

    from models.conversion import convert
    from trainer.runs import check_tokenizer

    check_tokenizer(setup, donor.directory, donor.config)
    fresh = nnx.to_flat_state(nnx.state(nnx.merge(setup.graph, nnx.State(setup.initial_params()))))
    old, new = nnx.to_flat_state(nnx.state(donor.model)), setup.config.model
    arrays = [{path: np.asarray(value[...]) for path, value in flat} for flat in (old, fresh)]
    found, lost = convert(conversion, donor.config.model, arrays[0], new, arrays[1], seed=seed)
    return jax.device_put(_nested(found), setup.shardings()), lost


def _nested(flat: dict[tuple[Any, ...], Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


if __name__ == "__main__":
    from trainer.command import run

    run(main)
