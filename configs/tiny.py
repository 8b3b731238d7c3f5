"""A byte-level transformer of 0.87 M parameters on the source of Python's own standard library (11.7 MB, 704 files).

    python -m trainer --config configs/tiny.py

Cost: 1,000 steps of 4,096 bytes, 5 minutes of training on two cores of an AMD EPYC (Zen 4), 14 k bytes/s; 2 min 40 s on a
faster one, 25 k bytes/s.
Result: 1.6375 bits per byte on the 35 held-out files (seed 0, Python 3.11.7, jax 0.10.2); `xz -9` needs 1.733 for the same
files as one stream. The recipe is the best of `experiments/recipes.py`: 1.657 [1.614, 1.700] over three seeds; at half the rate
seed 0 ends at 1.643.

The data depends on the Python version, so compare results within one; its fingerprint is printed and recorded.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    del arg
    config = ConfigDict()
    config.data = dict(name="python_source", sequence_length=256, batch_size=16)
    config.model = dict(width=128, layers=4, heads=4)
    config.optimizer = dict(
        direction=dict(name="muon", learning_rate=0.04, rest=dict(name="adamw", learning_rate=3e-3, weight_decay=0.0)),
        schedule=dict(name="linear"),
    )
    config.train = dict(steps=1000)
    config.evaluate = dict(every=250, batches=8)
    config.checkpoint = dict(every=250)
    config.log = dict(sample="def ", sample_tokens=250)
    return config
