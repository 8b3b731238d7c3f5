"""What `models.build` accepts, and what it refuses with every mistake listed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import ml_collections
import numpy as np
import pytest

import models
from models import options
from strata import ConfigError


def shapes(config) -> list:
    return jax.tree.leaves(jax.tree.map(lambda x: x.shape, models.abstract(config, vocab_size=11)))


def test_a_dict_a_config_dict_and_options_give_the_same_model():
    tree = {"width": 32, "layers": 3, "heads": 4, "norm": {"name": "layer_norm", "bias": True}, "ffn": {"name": "relu2"}}
    option = options.Model(width=32, layers=3, heads=4, norm=options.LayerNorm(bias=True), ffn=options.SquaredReLU())
    made = [models.abstract(given, vocab_size=11) for given in (tree, ml_collections.ConfigDict(tree), option)]
    assert made[0].options == made[1].options == made[2].options == option
    assert shapes(tree) == shapes(ml_collections.ConfigDict(tree)) == shapes(option)


@pytest.mark.parametrize("size", [0, -1, 11.0, True, "11", None])
def test_a_vocabulary_has_a_whole_number_of_tokens(size):
    for make in (models.abstract, functools.partial(models.build, seed=0)):
        with pytest.raises(ConfigError, match=f"vocab_size = {size!r}: expected the whole number of token ids, at least 1"):
            make({"width": 16, "layers": 1, "heads": 2}, vocab_size=size)
    assert models.abstract({"width": 16, "layers": 1, "heads": 2}, vocab_size=np.int64(1)).vocab_size == 1


def test_every_mistake_of_a_wrong_dict_is_listed():
    wrong = {
        "widht": 32,
        "layers": 0,
        "heads": 2.5,
        "norm": {"name": "rsm_norm"},
        "ffn": {"name": "gelu", "hiden": 3},
        "mixer": {"name": "attention", "implementation": "cuddn"},
    }
    with pytest.raises(ConfigError) as error:
        models.build(wrong, vocab_size=11, seed=0)
    found = {problem.path for problem in error.value.problems}
    assert found == {
        "model.widht",
        "model.layers",
        "model.heads",
        "model.norm.name",
        "model.ffn.hiden",
        "model.mixer.implementation",
    }
    for hint in ("did you mean model.width", "rms_norm", "model.ffn.hidden", "'cudnn'"):
        assert hint in str(error.value)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"width": 16, "heads": 3}, "model.heads"),
        ({"width": 18, "heads": 6}, "model.head_size"),
        ({"width": 16, "heads": 4, "kv_heads": 3}, "model.kv_heads"),
        ({"width": 16, "layers": 0}, "model.layers"),
    ],
)
@pytest.mark.parametrize("kind", [dict, options.Model])
def test_sizes_that_cannot_work_are_refused_as_dict_and_as_options(fields, path, kind):
    with pytest.raises(ConfigError) as error:
        models.build(kind(**fields), vocab_size=11, seed=0)
    assert [problem.path for problem in error.value.problems] == [path]


@pytest.mark.parametrize("given", ["tiny", 3, [("width", 16)], {"width": object()}])
def test_what_is_no_dict_of_plain_values_is_refused(given):
    with pytest.raises(ConfigError):
        models.abstract(given, vocab_size=11)


@pytest.mark.parametrize("how", [{"precision": "float16"}, {"remat": "everything"}])
def test_an_unknown_precision_or_remat_is_refused(config, how):
    with pytest.raises(ConfigError, match=next(iter(how.values()))):
        models.abstract(config(), vocab_size=11, **how)


def test_options_are_frozen_and_hashable_so_that_they_can_be_static():
    option = options.Model(width=16)
    assert hash(option) == hash(options.Model(width=16))
    with pytest.raises(dataclasses.FrozenInstanceError):
        option.width = 32
