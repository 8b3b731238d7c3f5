"""Strata's own training step, put together as `trainer.train` does.

python -m benchmarks.steps.strata_step --size small [--without tune_cpu --without flat_products ...]
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.steps import ablations
from benchmarks.steps.sizes import B2, LEARNING_RATE, WEIGHT_DECAY, Size
from benchmarks.workers import serve


def config(size: Size, *, written_out: bool = True) -> Any:
    """A checked config of the shared model: no QK-norm, no clipping, which the other contestants lack."""
    from trainer.config import resolve_config

    return resolve_config(
        {
            "data": {
                "name": "bigram",
                "vocabulary": size.vocabulary,
                "sequence_length": size.length,
                "batch_size": size.batch,
            },
            "model": {
                "width": size.width,
                "layers": size.layers,
                "heads": size.heads,
                "mixer": {"name": "attention", "qk_norm": False},
                "depth": {"name": "sequential", "unroll": None if written_out else False},
            },
            "optimizer": {
                "direction": {"name": "adamw", "learning_rate": LEARNING_RATE, "b2": B2, "weight_decay": WEIGHT_DECAY},
                "schedule": {"name": "constant"},
                "clip_norm": None,
            },
        }
    )


def main() -> None:
    """Serve steps."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size", type=Size.parse, required=True)
    arguments.add_argument("--without", action="append", default=[], choices=ablations.NAMES)
    chosen = arguments.parse_args()
    size, without = chosen.size, set(chosen.without)
    from strata.cpu import tune_cpu

    if "tune_cpu" not in without:
        tune_cpu()
    import jax
    import numpy as np

    import optim
    from trainer.setup import assemble

    for name in without & ablations.FORMS.keys():
        ablations.FORMS[name][0]()
    options = config(size, written_out="written_out" not in without)
    setup = assemble(options)
    tokens, targets = size.rows()
    rows = {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens)}
    batch = setup.put_batch(rows | {"weights": np.ones(tokens.shape, np.float32)}, size.batch)
    rates = setup.put_scalars(optim.rates(options.optimizer, options.train.steps)(1))
    with jax.set_mesh(setup.mesh):
        state = setup.initial_state(setup.initial_params())
        jitted = setup.jitted_train_step()
        held = [state]

        def step() -> float:
            held[0], metrics = jitted(held[0], batch, rates)
            return float(metrics["nats"]) / size.tokens

        serve("Strata", size.tokens, step)


if __name__ == "__main__":
    main()
