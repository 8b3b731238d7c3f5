"""Forms that Strata's CPU step gave up, each put back by name, so that what code comments call measured can be run.

Each entry replaces one form by the plainer one before the step is traced; `tune_cpu` and `written_out` are settings
and are handled by the worker.
"""

from __future__ import annotations

from collections.abc import Callable


def several_axes() -> None:
    """`models.layers.linear.product` without flattening: the weight gradient contracts over batch and time apart."""
    from models.layers import linear

    linear.product = lambda x, kernel: x @ kernel


def one_query_block() -> None:
    """`models.mixers.softmax.xla` with all queries in one block: the masked half of the scores is computed too."""
    from models.mixers import softmax

    softmax.MOST_BLOCKS = 1


def derived_attention_gradient() -> None:
    """`models.mixers.softmax._weighted` without its own derivative: JAX derives it."""
    from models.mixers import softmax

    softmax._weighted = lambda q, k, v, mask: softmax._weighted_forward(q, k, v, mask)[0]


SETTINGS = {
    "tune_cpu": "default allocator and asynchronous dispatch (strata.cpu.tune_cpu off)",
    "written_out": "a scan over the layers instead of every layer written out (models.depth.sequential)",
}
FORMS: dict[str, tuple[Callable[[], None], str]] = {
    "flat_products": (several_axes, "weight gradient over several axes (models.layers.linear)"),
    "query_blocks": (one_query_block, "attention over all keys in one block (models.mixers.softmax)"),
    "attention_gradient": (derived_attention_gradient, "attention's gradient derived by JAX (models.mixers.softmax)"),
}
NAMES = (*SETTINGS, *FORMS)
"""Everything that can be left out of Strata's step."""


def meaning(name: str) -> str:
    """What the step runs without it."""
    return SETTINGS[name] if name in SETTINGS else FORMS[name][1]
