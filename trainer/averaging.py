"""`--average NAME:COUNT`: the weights of a run as an average of its newest checkpoints, in place of a decay of the rate.

| written | weights of the checkpoints, oldest first |
|---|---|
| `lawa:5` | the mean of the newest five (arXiv:2209.14981) |
| `cma:6`, `cma:6:0.2` | running mean with alpha 0.2 over the newest six (arXiv:2511.18903) |
| `wsm:5`, `wsm:5:sqrt` | those that decay the updates between them: linear, sqrt, cosine or square (arXiv:2507.17634) |

The run is read only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from optim import average
from optim.averaging import decay_weights, exponential_weights, uniform_weights
from optim.schedules import decay_shape
from strata import ConfigError

if TYPE_CHECKING:
    from trainer.runs import Run

FORMS = {"lawa": "lawa:COUNT", "cma": "cma:COUNT[:ALPHA]", "wsm": "wsm:COUNT[:SHAPE]"}
MOST = 10_000
"""Checkpoints in an average."""
SHAPES = ("linear", "sqrt", "cosine", "square")
"""Of a decay that ends at 0."""


def weights_of(text: str) -> np.ndarray:
    """The weights that an average in words gives its checkpoints, oldest first, float64 [count].

    With k checkpoints WSM leaves `decay_shape(i / k)` of the updates between the i-th and the next one, so that a linear decay
    is the plain mean.

    Raises:
      ConfigError: it is none of the forms.
    """
    name, *arguments = text.split(":")
    expected = f"--average = {text!r}: expected {', '.join(FORMS.values())}"
    if name not in FORMS or not 1 <= len(arguments) <= 1 + FORMS[name].count("["):
        raise ConfigError(expected)
    if not arguments[0].isdecimal() or not 1 <= int(arguments[0]) <= MOST:
        raise ConfigError(f"{expected} with a COUNT from 1 to {MOST:,}, not {arguments[0]!r}")
    count, *rest = int(arguments[0]), *arguments[1:]
    if name == "lawa":
        return uniform_weights(count)
    if name == "cma":
        try:
            return exponential_weights(count, *map(float, rest))
        except ValueError:
            raise ConfigError(f"{expected} with an ALPHA above 0 and at most 1, not {rest[0]!r}") from None
    shape = rest[0] if rest else SHAPES[0]
    if shape not in SHAPES:
        raise ConfigError(f"{expected} with a SHAPE among {', '.join(SHAPES)}, not {shape!r}")
    fractions = [float(decay_shape(i / count, shape, 0.0)) for i in range(1, count)]
    return decay_weights(fractions) if fractions else uniform_weights(1)


def averaged(run: Run, weights: np.ndarray) -> tuple[Any, list[int]]:
    """The average of a run's newest good checkpoints, as many as weights: its parameters, laid out as the run's, and the steps.

    Raises:
      ConfigError: the run has too few checkpoints.
      StrataError: a checkpoint is damaged.
    """
    import jax

    from trainer.checkpoint import Checkpointer
    from trainer.runs import restore_params

    steps = Checkpointer(run.directory / "checkpoints").steps()
    if len(steps) < len(weights):
        raise ConfigError(
            f"--average of {len(weights)} checkpoints: {run.directory} has {len(steps)}, of steps "
            f"{', '.join(map(str, steps))}; checkpoint.keep_latest and keep_every say how many a run keeps"
        )
    chosen = steps[-len(weights) :]
    mean = average((restore_params(run.directory, run.setup, step)[0] for step in chosen), weights)
    return jax.device_put(mean, run.setup.shardings()), chosen
