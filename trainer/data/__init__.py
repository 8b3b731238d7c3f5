"""Data: deterministic, resumable batches from text, token shards, mixtures and two tasks with a known optimum.

`build` makes a `Dataset` from options; `trainer.data.dataset` holds the protocol. Importing this package, or
`trainer.data.options`, imports neither JAX nor NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import strata
from trainer.data import options as options

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset


def build(options: Any, seed: int = 0) -> Dataset:
    """The data set that `options`, an object of registry kind `"data"`, describes.

    Args:
      options: an options object, such as the `data` of a resolved config.
      seed: the top-level seed, used unless `options.seed` is given.

    Raises:
      strata.DataError: a file is missing, empty, damaged, or does not fit the tokenizer; the message names it.
      strata.ConfigError: an optional package is needed and not installed.
    """
    return strata.implementation(options)(options, seed)


__all__ = ["build", "options"]
