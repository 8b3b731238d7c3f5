"""Multi-query associative recall: a task whose optimum, a loss of 0, is known (arXiv:2312.04927).

    python -m trainer --config configs/recall.py

Two layers of attention solve it; one cannot. See CONTRIBUTING.md for how results in docstrings are made.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    del arg
    config = ConfigDict()
    config.data = dict(name="recall", sequence_length=64, batch_size=64, vocabulary=128, pairs=8)
    config.model = dict(width=64, layers=2, heads=1)
    config.optimizer = dict(direction=dict(name="adamw", learning_rate=3e-3), schedule=dict(name="cosine", warmup=50))
    config.train = dict(steps=1500)
    config.evaluate = dict(every=250, batches=8)
    config.checkpoint = dict(every=500)
    return config
