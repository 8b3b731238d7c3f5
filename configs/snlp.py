"""SNLP (arXiv:2605.17842): eight layers, trained in order with a regulariser, so that the last four can run at once.

    python -m trainer --config configs/snlp.py
    python -m trainer --config configs/snlp.py:baseline       # without the regulariser
    python -m trainer.generate --run RUN --prompt 'def ' --depth '{"name": "layer_parallel", "layers": 4, "sweeps": 2}'

Evaluation also reports `loss/parallel` and `bpb/parallel`: one sweep over the suffix.

Cost: 1,000 steps in 6 1/2 minutes on two cores of an AMD EPYC (Zen 4), with other work beside it.
Result: 1.641 bits per byte in order and 1.655 with one sweep, on the held-out files (seed 0, Python 3.11.7, jax 0.10.2).
Without the regulariser (`:baseline`): 1.638 and 2.178. One seed each.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is empty, or `baseline`."""
    if arg not in ("", "baseline"):
        raise ValueError(f"configs/snlp.py takes no argument or :baseline, not :{arg}")
    config = tiny.get_config()
    config.optimizer.direction.learning_rate = 0.02  # of the results above
    weight = 0.0 if arg else 0.5
    # Two compared layers at 0.5: the whole weight is 1, about that of the released 0.5B IDN run (others have 0.5, 1.5 and 4.5).
    depth = dict(name="layer_parallel", layers=4, forward="sequential", regularizer=weight, stride=2)
    config.model = dict(width=96, layers=8, heads=3, depth=depth)
    return config
