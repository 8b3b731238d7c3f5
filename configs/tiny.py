"""One.

python -m trainer --config configs/tiny.py
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.train = dict(steps=40)
    c.evaluate = dict(every=20, batches=2, final_batches=3)
    c.checkpoint = dict(every=20)
    c.data = ConfigDict(dict(name="python_source", sequence_length=256, batch_size=16))
    c.model = ConfigDict(dict(width=128, layers=4, heads=4))
    c.optimizer = ConfigDict(dict(direction=dict(name="adamw", learning_rate=3e-3, b2=0.95)))
    return c
