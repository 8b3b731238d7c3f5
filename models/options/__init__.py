"""Options of every model part. Imports no JAX: a config is checked before JAX is loaded.

Each module holds one kind. What an options class may define beside its fields, all of it optional. `Placement`, `Mixer`, `FFN`
and `Depth` are what is asked of those kinds, with the defaults; placements and depth strategies have tables in their modules.

| attribute or method | kinds | says |
|---|---|---|
| `at(layer, layers)` | all but depth | the options of layer `layer` of `layers`; layers of equal options are stacked |
| `even_heads` | mixer | it needs an even head size |
| `problems_in(model)` | all | what cannot work in this `Model`, as `(field, sentence)` |
| `for_site(site)` | norm | the norm that feeds `mixer` or `ffn`, or at `mixer_out`, `ffn_out`, `embedding`, `final` |
| `projections(model)` | mixer, ffn | `{site: (units in, units out)}` of its linear layers |
| `flops(model, length)` | mixer | training FLOPs a token and layer beside its projections: `(all scores, causal ones)` |
"""

from models.options.activations import GELUActivation, SiLU, SquaredReLUActivation
from models.options.conversions import Looped
from models.options.depths import Depth, LayerParallelDepth, RecursiveDepth, SequentialDepth
from models.options.ffns import FFN, GELU, GLU, MLP, SquaredReLU, SwiGLU
from models.options.linear_mixers import (
    GLA,
    KDA,
    DeltaNet,
    GatedDeltaNet,
    LightNet,
    Lightning,
    LinearAttention,
    Retention,
    SimpleGLA,
    StepDecayMixer,
)
from models.options.linears import NOBLE, Dense, LoRA
from models.options.mixers import Attention, Hybrid, Mixer
from models.options.model import Model
from models.options.norms import DyT, LayerNorm, RMSNorm
from models.options.placements import (
    Blend,
    DeepNorm,
    HyperConnections,
    LayerNormScaling,
    MixLN,
    NoNorm,
    Parallel,
    PeriLN,
    Placement,
    PostNorm,
    PreNorm,
    Sandwich,
)

__all__ = [
    "Attention",
    "Blend",
    "DeepNorm",
    "DeltaNet",
    "Dense",
    "Depth",
    "DyT",
    "FFN",
    "GELU",
    "GELUActivation",
    "GLA",
    "GLU",
    "GatedDeltaNet",
    "Hybrid",
    "HyperConnections",
    "KDA",
    "LayerNorm",
    "LayerNormScaling",
    "LayerParallelDepth",
    "LightNet",
    "Lightning",
    "LinearAttention",
    "LoRA",
    "Looped",
    "MLP",
    "MixLN",
    "Mixer",
    "Model",
    "NOBLE",
    "NoNorm",
    "Parallel",
    "PeriLN",
    "Placement",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "RecursiveDepth",
    "Retention",
    "Sandwich",
    "SequentialDepth",
    "SiLU",
    "SimpleGLA",
    "SquaredReLU",
    "SquaredReLUActivation",
    "StepDecayMixer",
    "SwiGLU",
]
