"""A relaxed recursive transformer (arXiv:2410.20672) from scratch: `configs/tiny.py` with two blocks looped twice.

    python -m trainer --config configs/relaxed.py

Every executed layer has low-rank matrices of rank 8 beside each of its seven projections; the first loop is trained to predict
as well, with a tenth of the weight.

Cost: 1,000 steps in 4 minutes on two cores of an AMD EPYC (Zen 4), with other work beside it.
Result: 1.720 bits per byte on the held-out files with 547 k parameters (seed 0, Python 3.11.7, jax 0.10.2), 2.084 after the
first loop; `configs/tiny.py`, which shares nothing and has 870 k, reached 1.643 at this rate. One seed each.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    config = tiny.get_config(arg)
    config.optimizer.direction.learning_rate = 0.02  # of the results above
    config.model.depth = dict(name="recursive", loops=2, rank=8, exits="aggressive")
    return config
