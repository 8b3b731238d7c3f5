"""Which run a config is: its id, and whether a longer run is the same one."""

from __future__ import annotations

import pytest

from strata import registry
from trainer import config as configuration

BASE = {"data": {"name": "bigram"}, "train": {"steps": 1000}}
BUDGETS = {"budgets": [500, 1000]}
SAMPLED = {"name": "drop_muon", "buckets": 2}
REGULARIZED = {"name": "layer_parallel", "layers": 2, "forward": "sequential", "regularizer": 0.1}
IDS = [
    # The section, the part, the id of the run, and the part in words where it reads the length of the run.
    ("optimizer.schedule", {"name": "constant"}, "d5b99202-s0", []),
    ("optimizer.schedule", {"name": "linear"}, "f3c5b7c1-s0", ["linear schedule"]),
    ("optimizer.schedule", {"name": "cosine"}, "aecfb494-s0", ["cosine schedule"]),
    ("optimizer.schedule", {"name": "cosine", "warmup": 3}, "c9985dea-s0", ["cosine schedule"]),
    ("optimizer.schedule", {"name": "inverse_sqrt", "plateau": 9}, "66d7414a-s0", []),
    ("optimizer.schedule", {"name": "wsd"}, "65afc269-s0", ["wsd schedule"]),
    ("optimizer.schedule", {"name": "wsd_s"} | BUDGETS, "d5b81d24-s0", []),
    ("optimizer.schedule", {"name": "cyclic_cosine"} | BUDGETS, "55ac0964-s0", []),
    ("optimizer.schedule", {"name": "infinite", "cooldown": 10}, "c9b7229f-s0", []),
    ("optimizer.schedule", {"name": "infinite", "cooldown": 10, "anneal": 10}, "3fc27031-s0", ["infinite schedule"]),
    ("optimizer.layerwise", {"name": "llr"}, "e53ea890-s0", ["llr layerwise rate"]),
    ("optimizer.layerwise", {"name": "frozen"}, "6741a2cd-s0", []),
    ("optimizer.layerwise", {"name": "temp_balance"}, "bec879fe-s0", []),
    ("optimizer.layerwise", {"name": "alpha_decay"}, "943ab82f-s0", []),
    ("optimizer.layerwise", {"name": "by_type"}, "51dca75d-s0", []),
    ("optimizer.layerwise", {"name": "lanton"}, "ca5b58e6-s0", []),
    ("optimizer.sampling", SAMPLED, "70f5ea87-s0", []),
    ("optimizer.sampling", SAMPLED | {"distribution": "full"}, "7a0604ba-s0", []),
    ("optimizer.sampling", SAMPLED | {"distribution": "optimal", "smoothness": [1.0, 2.0]}, "31c0a184-s0", []),
    ("optimizer.sampling", SAMPLED | {"distribution": "shifted"}, "4dd7c075-s0", ["drop_muon layer sampling"]),
    ("optimizer.direction", {"name": "muon"}, "25993290-s0", []),
    ("optimizer.direction", {"name": "adamw", "schedule": {"name": "linear"}}, "d4cc933c-s0", ["linear schedule"]),
    (
        "optimizer.direction",
        {"name": "muon", "rest": {"name": "adamw", "schedule": {"name": "cosine"}}},
        "fba3233e-s0",
        ["cosine schedule"],
    ),
    ("model.depth", {"name": "sequential"}, "d5b99202-s0", []),
    ("model.depth", {"name": "recursive"}, "7f51deb6-s0", []),
    ("model.depth", {"name": "layer_parallel", "layers": 2}, "b24b0fba-s0", []),
    ("model.depth", REGULARIZED, "fa1d74c3-s0", ["layer_parallel depth strategy"]),
    ("model.depth", REGULARIZED | {"ramp": 0.0}, "624219c8-s0", []),
]


def config(section, part, steps=1000):
    tree = {"optimizer": {"schedule": {"name": "constant"}}, "model": {}}
    tree[section.split(".")[0]][section.split(".")[1]] = part
    return configuration.resolve_config(BASE | tree | {"train": {"steps": steps}})


@pytest.mark.parametrize(("section", "part", "known", "words"), IDS)
def test_ids_of_runs_stay_and_tell_lengths_apart_only_where_a_part_reads_them(section, part, known, words):
    chosen, longer = config(section, part), config(section, part, 500 if "budgets" in part else 2000)
    assert configuration.run_id(chosen) == known
    assert configuration.depends_on_steps(chosen) == words
    assert (configuration.run_id(longer) == known) == (not words)


def test_the_ids_above_are_of_every_part_that_is_told_the_length_of_a_run():
    told = {kind for kind, base in registry._bases.items() if getattr(base, "depends_on_steps", False)}
    assert told == {"optimizer.schedule", "optimizer.layerwise", "optimizer.sampling", "model.depth"}
    for kind in told:
        assert {part["name"] for section, part, *_ in IDS if section == kind} == set(registry.names(kind))
        for name in registry.names(kind):
            own = [cls for cls in registry.lookup(kind, name).__mro__ if "depends_on_steps" in vars(cls)]
            assert own[0] is not registry._bases[kind], f"{kind} {name} does not say whether it depends on the steps"
