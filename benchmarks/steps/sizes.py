"""The model and batch that all contestants share. Imports neither JAX nor PyTorch."""

from __future__ import annotations

import dataclasses
import json

import numpy as np


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama-style decoder (RMSNorm, RoPE, SwiGLU, untied head, no biases) and its batch."""

    width: int
    layers: int
    heads: int
    length: int  # tokens in a row
    batch: int  # rows
    vocabulary: int = 257

    @property
    def hidden(self) -> int:
        """SwiGLU units: 8/3 of the width, rounded up to a multiple of 16."""
        return -(-8 * self.width // (3 * 16)) * 16

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.length * self.batch

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int32 [batch, length], the same for everyone."""
        drawn = np.random.default_rng(0).integers(1, self.vocabulary, (self.batch, self.length + 1), np.int32)
        return np.ascontiguousarray(drawn[:, :-1]), np.ascontiguousarray(drawn[:, 1:])

    def to_json(self) -> str:
        """As a worker takes it on its command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, text: str) -> Size:
        """A name from `SIZES`, or JSON. Raises `ValueError`."""
        return SIZES[text] if text in SIZES else cls(**json.loads(text))


SIZES = {
    "small": Size(width=128, layers=4, heads=4, length=128, batch=8),
    "medium": Size(width=192, layers=6, heads=6, length=256, batch=8),
}
LEARNING_RATE, B2, WEIGHT_DECAY, ROPE_THETA, EPSILON = 1e-3, 0.95, 0.1, 10_000.0, 1e-6
