"""SNLP (arXiv:2605.17842) over four mHC residual streams, whose mixing matrices correct the sweep (HCN).

    python -m trainer --config configs/snlp_hcn.py

Evaluation also reports `loss/parallel` and `bpb/parallel`: one sweep over the last four of eight layers.

Cost: 1,000 steps in 9 1/2 minutes on two cores of an AMD EPYC (Zen 4), with other work beside it.
Result: 1.684 bits per byte in order and 1.728 with one sweep, on the held-out files (seed 0, Python 3.11.7, jax 0.10.2): worse
than `configs/snlp.py` (1.641 and 1.655). The two differ in streams, stride, detached targets and terms of the regulariser; the
correction itself plays no part in one sweep, whose summed streams are those of identity corrections. One seed each.
"""

from ml_collections import ConfigDict

from configs import snlp


def get_config(arg: str = "") -> ConfigDict:
    """`arg` as in `configs/snlp.py`."""
    config = snlp.get_config(arg)
    config.model.placement = dict(name="mhc", streams=4)
    # As in the released HCN runs: the corrected last state alone, and its target held.
    config.model.depth.correction = "hcn"
    config.model.depth.stride = 0
    config.model.depth.detach = True
    return config
