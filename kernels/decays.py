"""Decays that are not learned: one number a head, the same for every token. Natural logarithms, float64 numpy."""

from __future__ import annotations

import numpy as np

from strata.errors import ConfigError


def retention_decay(heads: int) -> np.ndarray:
    """log(1 - 2^(-5-h)) for h = 0 .. heads-1: float64 [heads]. RetNet, Sun et al. 2023, equation 8."""
    return np.log1p(-np.exp2(-5.0 - np.arange(heads)))


def lightning_decay(heads: int, layer: int = 0, layers: int = 1) -> np.ndarray:
    """-(8 / heads) (1 - layer / layers) h for h = 0 .. heads-1: float64 [heads]. Lightning Attention-2, Qin et al. 2024.

    `layer` counts from 0, so deeper layers forget less; head 0 never forgets.

    Raises:
      ConfigError: `layer` is not one of the `layers`.
    """
    if not 0 <= layer < layers:
        raise ConfigError(f"kernels.lightning_decay: layer = {layer}; expected 0 <= layer < layers = {layers}")
    return -(8.0 / heads) * (1.0 - layer / layers) * np.arange(heads)
