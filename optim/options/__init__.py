"""Options of every optimizer part. Imports no JAX: a config is checked before JAX is loaded.

Each module holds one kind: `directions`, `newton_schulz` (how many steps each layer's matrices take), `layerwise` (rates by
layer), `sampling` (which layers an update touches), `schedules`; `recipe` puts them together.
"""

from optim.options.directions import LMO, SGD, AdamW, Muon, NorMuon, Optax
from optim.options.layerwise import LANTON, LLR, AlphaDecay, ByType, Frozen, Layerwise, TempBalance
from optim.options.newton_schulz import Measured, Predicted
from optim.options.recipe import Optimizer
from optim.options.roles import ROLES
from optim.options.sampling import DropMuon, Sampling
from optim.options.schedules import WSD, WSDS, Constant, Cosine, CyclicCosine, Infinite, InverseSqrt, Linear, Schedule, Warmup

__all__ = [
    "AdamW",
    "AlphaDecay",
    "ByType",
    "Constant",
    "Cosine",
    "CyclicCosine",
    "DropMuon",
    "Frozen",
    "Infinite",
    "InverseSqrt",
    "LANTON",
    "LLR",
    "LMO",
    "Layerwise",
    "Linear",
    "Measured",
    "Muon",
    "NorMuon",
    "Optax",
    "Optimizer",
    "Predicted",
    "ROLES",
    "SGD",
    "Sampling",
    "Schedule",
    "TempBalance",
    "WSD",
    "WSDS",
    "Warmup",
]
