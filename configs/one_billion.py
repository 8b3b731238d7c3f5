"""A decoder of about one billion parameters at sequence length 2048, for measurements on one GPU of the Hopper class.

    python -m trainer --config configs/one_billion.py --dry_run
    python -m benchmarks.gpu_mfu --config configs/one_billion.py

A full run is beyond one GPU; on several, set `--config.mesh.fsdp=-1`. Builds on `configs/gpt2_small.py`. Not yet run.
"""

from ml_collections import ConfigDict

from configs import gpt2_small


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    config = gpt2_small.get_config(arg)
    config.data.update(sequence_length=2048, batch_size=256)
    config.model.update(width=2048, layers=20, heads=16)
    config.train.update(accumulation=32, remat="dots")
    return config
