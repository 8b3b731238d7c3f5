"""`python -m trainer.mirror --run DIR [--wandb MODE] [--tensorboard]`: rebuild a mirror of a run from its `metrics.jsonl`."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """The command line. W&B gets a fresh run each time: it has no way to take rows back."""
    parser = argparse.ArgumentParser(prog="python -m trainer.mirror", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run directory")
    parser.add_argument("--wandb", choices=("auto", "offline", "online"), default=None, help="rebuild the W&B mirror")
    parser.add_argument("--tensorboard", action="store_true", help="rebuild the TensorBoard event files")
    arguments = parser.parse_args(argv)
    from strata import ConfigError, to_tree
    from trainer import config as configuration
    from trainer.metrics import tensorboard_mirror, wandb_mirror

    run, metrics = arguments.run, arguments.run / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"{run} has no metrics.jsonl, so it is not a run directory")
    if not (arguments.wandb or arguments.tensorboard):
        raise ConfigError("nothing to rebuild: give --wandb or --tensorboard")
    if arguments.tensorboard:
        tensorboard_mirror.rebuild(metrics, run)
        print(f"TensorBoard event files of {run} are rebuilt in {run / tensorboard_mirror.DIRECTORY}")
    if arguments.wandb:
        config = to_tree(configuration.load(str(run / "config.json")).config)
        wandb_mirror.rebuild(
            metrics,
            run,
            mode=arguments.wandb,
            run_id=uuid.uuid4().hex[:12],
            project=config["log"]["wandb_project"],
            group=config["log"]["wandb_group"],
            name=run.resolve().name,
            config=config,
        )
        print(f"the W&B mirror of {run} is rebuilt ({wandb_mirror.resolve_mode(arguments.wandb)})")
    return 0


if __name__ == "__main__":
    from trainer.command import run

    run(main)
