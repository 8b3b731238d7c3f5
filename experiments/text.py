"""The text that experiments train on, by scale. Every evaluation scores the same held-out batches, so that steps and seconds to
a loss compare like with like; nothing is sampled at the end, and checkpoints are written at the end alone.

| scale | data | model | a run |
|---|---|---|---|
| `SMOKE` | 200 kB of the standard library, rows of 32 bytes | width 16, 4 layers | a few steps: it works, and decides nothing |
| `LAPTOP` | the standard library, 8 x 128 bytes a step | width 128, 4 layers, 0.87 M parameters | 600 steps, 0.6 M bytes |
| `GPU` | 100 MB of installed packages, 64 x 512 bytes a step | width 384, 8 layers, 14 M parameters | 800 steps, 26 M bytes |

Bytes are tokens in all of them. A file overrides what its paper is about. `corpus` is the data of papers' own scales.
"""

from typing import Any

QUIET = {"checkpoint.every": 0, "log.sample_tokens": 0}

SMOKE: dict[str, Any] = QUIET | {
    "data.max_bytes": 200_000,
    "data.sequence_length": 32,
    "data.batch_size": 4,
    "model.width": 16,
    "model.layers": 4,
    "model.heads": 2,
    "train.steps": 12,
    "evaluate.every": 3,
    "evaluate.batches": 2,
    "evaluate.final_batches": 2,
    "log.every": 1,
}
LAPTOP: dict[str, Any] = QUIET | {
    "data.sequence_length": 128,
    "data.batch_size": 8,
    "model.width": 128,
    "model.layers": 4,
    "model.heads": 4,
    "train.steps": 600,
    "evaluate.every": 50,
    "evaluate.batches": 16,
    "evaluate.final_batches": 16,
    "evaluate.batch_size": 16,
}
GPU: dict[str, Any] = QUIET | {
    "data.which": "all",
    "data.max_bytes": 100_000_000,
    "data.sequence_length": 512,
    "data.batch_size": 64,
    "data.workers": 2,
    "model.width": 384,
    "model.layers": 8,
    "model.heads": 6,
    "train.steps": 800,
    "train.precision": "bfloat16",
    "evaluate.every": 50,
    "evaluate.batches": 8,
    "evaluate.final_batches": 8,
}


def shape(width: int, layers: int, heads: int, hidden: int | None = None) -> dict[str, Any]:
    """Another size of the model; `hidden` units of its SwiGLU, where they do not follow from the width."""
    found: dict[str, Any] = {"model.width": width, "model.layers": layers, "model.heads": heads}
    return found | ({"model.ffn": {"name": "swiglu", "hidden": hidden}} if hidden else {})


def corpus(name: str, batch_size: int, sequence_length: int, micro_batches: int = 1) -> dict[str, Any]:
    """A paper's corpus as token shards in `data/NAME` (`python -m trainer.data write`), its tokenizer beside them.

    Args:
      name: of the directory.
      batch_size: sequences an update, over all devices.
      sequence_length: tokens in a row.
      micro_batches: that an update is split into.
    """
    return QUIET | {
        "data": {
            "name": "tokens",
            "directory": f"data/{name}",
            "tokenizer": f"data/{name}/tokenizer.json",
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "workers": 2,
        },
        "train.accumulation": micro_batches,
        "train.precision": "bfloat16",
        "evaluate.every": 500,
        "evaluate.batches": 64,
        "evaluate.final_batches": 64,
        "checkpoint.every": 1000,
        "mesh.data": -1,
    }
