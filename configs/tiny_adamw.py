"""`configs/tiny.py` with AdamW throughout, for comparison.

    python -m trainer --config configs/tiny_adamw.py

Result: 1.844 bits per byte on the 35 held-out files, where Muon at 0.02 reaches 1.643 (seed 0, Python 3.11.7, jax 0.10.2; one
run each and rates that were not tuned, so no verdict; `experiments/recipes.py` has both tuned).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    config = tiny.get_config(arg)
    config.optimizer = dict(direction=dict(name="adamw", learning_rate=3e-3), schedule=dict(name="cosine", warmup=50))
    return config
