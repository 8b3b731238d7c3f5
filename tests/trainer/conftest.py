"""Tiny runs for tests: a model of a few thousand parameters that trains in well under a second."""

import copy

import pytest

TINY = {
    "data": {"name": "bigram", "sequence_length": 16, "batch_size": 4, "vocabulary": 12, "validation_examples": 8},
    "model": {"width": 16, "layers": 2, "heads": 2},
    "optimizer": {"schedule": {"name": "cosine", "warmup": 2}},
    "train": {"steps": 8},
    "evaluate": {"every": 4, "batches": 1},
    "checkpoint": {"every": 3},
    "log": {"every": 1},
}


def merge(tree, changes):
    """`changes` with dotted paths, written into a copy of `tree`; a component's fields go when its name changes."""
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        at = tree
        for step in parents:
            at = at.setdefault(step, {})
        at[leaf] = value
    return tree


@pytest.fixture
def tiny():
    """A function from dotted changes to the dict of a tiny run."""
    return lambda **changes: merge(TINY, {path.replace("__", "."): value for path, value in changes.items()})
