"""Mix-LN (arXiv:2412.13795): post-LN in the first quarter of eight layers, pre-LN in the rest.

    python -m trainer --config configs/mix_ln.py
    python -m trainer --config configs/mix_ln.py:pre          # the same shape with pre-LN throughout; or any other placement

Cost: 1,000 steps in 4 1/2 minutes on two cores of an AMD EPYC (Zen 4), with other work beside it.
Result: 1.605 bits per byte on the held-out files (seed 0, Python 3.11.7, jax 0.10.2).
Pre-LN throughout (`:pre`) reached 1.638. One seed each; `experiments/mix_ln.py` compares with seeds, tuned rates and rivals.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config(arg: str = "") -> ConfigDict:
    """`arg` names another placement, for comparison."""
    config = tiny.get_config()
    config.optimizer.direction.learning_rate = 0.02  # of the results above
    config.model = dict(width=96, layers=8, heads=3, placement=dict(name=arg or "mix"))
    return config
