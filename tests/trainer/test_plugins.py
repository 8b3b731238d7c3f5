"""The least that a part of one's own can be, from CONTRIBUTING.md alone: it trains, or is refused before JAX is loaded."""

from __future__ import annotations

import json
import re
import sys

import pytest

import optim
import trainer
from strata import ConfigError, registry
from trainer import config as configuration
from trainer.dry_run import dry_run

MODEL = '''
import jax.numpy as jnp
from flax import nnx

from models.depth.sequential import run, step
from models.layers.linear import projection
from models.layers.parameter import parameter
from models.placements.placement import Placement
from strata import options, register


def part(kind):
    """Options without fields, which say nothing of themselves."""
    def add(implementation):
        cls = options(type(implementation.__name__ + "Options", (), {"__module__": __name__}))
        register(kind, "mine", implementation=f"{__name__}:{implementation.__name__}")(cls)
        return implementation
    return add


@part("model.norm")
class Norm(nnx.Module):
    def __init__(self, option, size, *, axis, rngs):
        self.scale = parameter(rngs, (size,), nnx.initializers.ones, role="vector", axes=(axis,))

    def __call__(self, x):
        return x * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))


@part("model.linear")
class Linear(nnx.Module):
    def __init__(self, option, units_in, units_out, *, axes, std, rngs):
        self.kernel = parameter(rngs, (units_in, units_out), nnx.initializers.normal(0.02), role="matrix", axes=axes)

    def __call__(self, x):
        return x @ self.kernel[...]


@part("model.activation")
class Sine(nnx.Module):
    def __init__(self, option, units, *, axis, rngs):
        pass

    def __call__(self, x):
        return jnp.sin(x)


@part("model.ffn")
class FFN(nnx.Module):
    def __init__(self, option, model, *, rngs):
        self.up = projection(model, "up", ("embed", "mlp"), (model.width, 16), rngs=rngs)
        self.down = projection(model, "down", ("mlp", "embed"), (16, model.width), rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


@part("model.mixer")
class Sum(nnx.Module):
    def __init__(self, option, model, *, rngs):
        self.width = model.width
        self.out = projection(model, "out", ("embed", "embed"), (model.width, model.width), rngs=rngs)

    def prepare(self, length, segment_ids):
        return None

    def __call__(self, x, shared):
        return self.out(jnp.cumsum(x, 1))

    def init_cache(self, batch, length, dtype):
        return jnp.zeros((batch, self.width), dtype)

    def prepare_step(self, new, cache, index, start):
        return None

    def step(self, x, shared, cache):
        sums = cache[:, None] + jnp.cumsum(x, 1)
        return self.out(sums), sums[:, -1]


@part("model.placement")
class Half(Placement):
    def mixer_update(self, h, mix, context):
        return 0.5 * mix(self.mixer_norm(h))


@part("model.depth")
class Depth:
    def __init__(self, option):
        pass

    def __call__(self, stack, h, forward, progress):
        return run(stack, h, forward)[0], {}

    def step(self, stack, h, forward, caches):
        return step(stack, h, forward, caches)
'''
RECIPE = """
import jax.numpy as jnp
import numpy as np
import optax

from optim.directions.blocks import Orthogonalizer
from optim.layerwise.multipliers import Layerwise, LayerwiseState, ones
from optim.options import ROLES
from optim.roles import depth_of
from optim.rules import Rule
from optim.sampling import Cuts
from strata import option, options, register
from trainer.data.corpus import Document, pack
from trainer.data.dataset import Dataset
from trainer.data.options import Batches


@register("optimizer.direction", "mine", implementation=f"{__name__}:sign")
@options
class Sign:
    pass


def sign(option, *, roles=ROLES, name="all"):
    direction = lambda group: optax.scale_by_sign()
    return (Rule(name=name, roles=roles, direction=direction, learning_rate=1e-3, weight_decay=0.0, decay_roles=()),)


@register("optimizer.newton_schulz", "mine", implementation=f"{__name__}:nothing")
@options
class Nothing:
    pass


def nothing(option, parameters):
    return Orthogonalizer(lambda matrices: (), lambda matrices, momentum, state: (matrices, state))


@register("optimizer.schedule", "mine", implementation=f"{__name__}:rising")
@options
class Rising:
    pass


def rising(option, steps):
    return lambda step, xp: xp.minimum(step / steps, 1.0)


@register("optimizer.schedule", "level", implementation=f"{__name__}:level")
@options
class Level:
    depends_on_steps = False


def level(option, steps):
    return lambda step, xp: xp.ones_like(step, dtype=float)


@register("optimizer.layerwise", "mine", implementation=f"{__name__}:late")
@options
class Late:
    pass


def late(option, declared, groups, steps):
    def update(seen, state):
        factor = jnp.where(seen.count > steps // 2, 2.0, 1.0)
        return state._replace(rate={path: jnp.full_like(rate, factor) for path, rate in state.rate.items()})

    return Layerwise(lambda weights: LayerwiseState(ones(declared, declared), {}, ()), update, {})


@register("optimizer.sampling", "mine", implementation=f"{__name__}:cuts")
@options
class Half:
    buckets: int = option(2, "first layers that can be drawn", least=1)

    def probabilities(self, progress):
        return [1 / self.buckets] * self.buckets


@register("optimizer.sampling", "bare", implementation=f"{__name__}:cuts")
@options
class Bare:
    pass


def cuts(option, declared, steps):
    return Cuts(option, depth_of(declared), steps)


@register("data", "mine", implementation=f"{__name__}:zeros")
@options
class Zeros(Batches):
    pass


@register("data", "bare", implementation=f"{__name__}:zeros")
@options
class BareData:
    pass


@register("data.source", "mine", implementation=f"{__name__}:lines")
@options
class Lines:
    count: int = option(8, "documents", least=2)


def lines(option, tokenizer):
    documents = [Document(f"line {i}", b"a line of text " * 4, held_out=i == 0) for i in range(option.count)]
    return pack(documents, tokenizer, "lines", {"kind": "lines"})


def zeros(option, seed):
    class Rows:
        def __len__(self):
            return 4

        def read(self, indices):
            rows = np.zeros((len(indices), option.sequence_length), np.int32)
            return {"tokens": rows, "targets": rows, "segment_ids": rows + 1, "weights": np.ones(rows.shape, np.float32)}

    rows = {"examples": Rows(), "held_out": Rows()}
    return Dataset(options=option, vocab_size=8, description={"kind": "zeros"}, fingerprint="0", **rows)
"""
MINE = {"name": "mine"}
BIGRAM = {"name": "bigram", "sequence_length": 8, "batch_size": 2, "vocabulary": 8, "validation_examples": 2}


@pytest.fixture(autouse=True)
def plugins(tmp_path, monkeypatch):
    """The modules, where Python finds them; what they register is forgotten after the test."""
    monkeypatch.setattr(registry, "_components", {kind: dict(known) for kind, known in registry._components.items()})
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("model_for_test", MODEL), ("recipe_for_test", RECIPE)):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("model_for_test", "recipe_for_test"):
        sys.modules.pop(name, None)


def tree(steps=2, model=(), optimizer=(), data=BIGRAM):
    return {
        "plugins": ["model_for_test", "recipe_for_test"],
        "data": data,
        "model": {"width": 8, "layers": 2, "heads": 1, **dict(model)},
        "optimizer": {"schedule": {"name": "constant"}, **dict(optimizer)},
        "train": {"steps": steps},
        "log": {"every": 1},
    }


def losses(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


MODEL_PARTS = {kind: MINE for kind in ("mixer", "norm", "linear", "ffn", "placement", "depth")}
RUNS = {
    "model": {"model": MODEL_PARTS},
    "beside others": {
        "model": {
            "mixer": {"name": "hybrid", "pattern": [MINE, {"name": "attention"}]},
            "placement": {"name": "mix", "first": "mine", "alpha": 0.5},
            "linear": {"name": "noble", "rank": 2},
            "ffn": {"name": "mlp", "activation": MINE},
            "depth": {"name": "layer_parallel", "layers": 2},
        },
        "optimizer": {"direction": {"name": "muon", "newton_schulz": MINE, "rest": MINE}},
    },
    "recipe": {"optimizer": {kind: MINE for kind in ("direction", "schedule", "layerwise", "sampling")}},
    "source": {"data": {"name": "mixture", "sources": [MINE], "sequence_length": 8, "batch_size": 2}},
    "data": {"data": {"name": "mine", "sequence_length": 8, "batch_size": 2}, "model": {"depth": MINE}},
}


@pytest.mark.parametrize("name", RUNS)
def test_parts_that_say_nothing_of_themselves_are_listed_trained_and_evaluated(name, tmp_path, capsys):
    config = configuration.resolve_config(tree(**RUNS[name]))
    dry_run(config)
    assert "MFLOP a token" in capsys.readouterr().out
    result = trainer.train(tree(**RUNS[name]), tmp_path / "run")
    assert result.step == 2 and set(losses(tmp_path / "run")) == {1, 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"sampling": {"name": "bare"}}}, r"Bare lacks buckets and probabilities"),
        ({"data": {"name": "bare"}}, r"BareData lacks sequence_length.*trainer\.data\.options\.Batches"),
        ({"model": {"placement": MINE, "depth": {"name": "layer_parallel", "layers": 2, "fused": 2}}}, r"model\.depth\.fused"),
        (
            {"model": {"placement": MINE, "depth": {"name": "layer_parallel", "layers": 2, "correction": "scaled"}}},
            r"model\.depth\.correction",
        ),
    ],
)
def test_what_has_no_default_and_what_no_default_promises_is_refused_in_the_config(changes, words):
    with pytest.raises(ConfigError, match=words):
        configuration.resolve_config(tree(**changes))


def test_a_mixer_that_cannot_decode_trains_on_text_and_says_why_it_draws_none(tmp_path, capsys, monkeypatch):
    config = configuration.resolve_config(tree(model={"mixer": MINE}))
    monkeypatch.delattr(sys.modules["model_for_test"].Sum, "init_cache")
    (tmp_path / "text.txt").write_text("a line\n" * 99)
    text = {"name": "text_files", "files": [str(tmp_path / "*.txt")], "split": "tail", "sequence_length": 8, "batch_size": 2}
    result = trainer.train(tree(data=text, model={"mixer": MINE}), tmp_path / "run")
    assert result.step == 2 and "no sample: model_for_test.Sum has no init_cache" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="trains but does not generate"):
        trainer.setup.assemble(config).model.init_cache(1, 4)


TOLD = {
    "optimizer.schedule": "mine schedule",
    "optimizer.layerwise": "mine layerwise rate",
    "optimizer.sampling": "mine layer sampling",
    "model.depth": "mine depth strategy",
}


@pytest.mark.parametrize("kind", TOLD)
def test_a_part_that_is_told_the_length_of_the_run_depends_on_it_unless_it_says_otherwise(kind, monkeypatch):
    section, _, name = kind.partition(".")
    changes = {section: {name: MINE}}
    short, long = (configuration.resolve_config(tree(steps, **changes)) for steps in (2, 4))
    assert configuration.depends_on_steps(short) == [TOLD[kind]]
    assert configuration.run_id(short) != configuration.run_id(long)
    monkeypatch.setattr(registry.lookup(kind, "mine"), "depends_on_steps", False)
    assert configuration.depends_on_steps(short) == []
    assert configuration.run_id(short) == configuration.run_id(long)


def test_such_a_run_is_extended_only_where_the_part_says_that_it_may_be(tmp_path):
    level = {"schedule": {"name": "level"}}
    for steps in (2, 4):
        trainer.train(tree(steps, optimizer=level), tmp_path / "level")
    trainer.train(tree(4, optimizer=level), tmp_path / "at once")
    assert losses(tmp_path / "level") == losses(tmp_path / "at once")
    trainer.train(tree(2, optimizer={"layerwise": MINE}), tmp_path / "late")
    with pytest.raises(ConfigError, match=r"train\.steps: 2 -> 4 \(the mine layerwise rate depends on train\.steps"):
        trainer.train(tree(4, optimizer={"layerwise": MINE}), tmp_path / "late")


@pytest.mark.parametrize("part", ["schedule", "layerwise", "sampling"])
def test_such_a_part_is_not_built_for_a_run_of_unknown_length(part):
    configuration.resolve_config(tree())
    model = trainer.setup.assemble(configuration.resolve_config(tree())).model
    with pytest.raises(ConfigError, match="depends on the length of the run"):
        optim.build({"schedule": {"name": "constant"}, part: MINE}, model)


def test_the_table_of_calls_names_every_kind_that_is_told_the_length_of_a_run(root):
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", (root / "CONTRIBUTING.md").read_text(), re.M)
    told = {kind for kind, call in rows if re.search(r"\b(steps|progress)\)", call)}
    assert told == {kind for kind, base in registry._bases.items() if getattr(base, "depends_on_steps", False)} == set(TOLD)
