"""`configs/tiny.py` with AdamW throughout, for comparison.

    python -m trainer --config configs/tiny_adamw.py

RESULT
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    config = tiny.get_config(arg)
    config.optimizer = dict(direction=dict(name="adamw", learning_rate=3e-3), schedule=dict(name="cosine", warmup=50))
    return config
