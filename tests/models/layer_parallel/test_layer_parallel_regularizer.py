"""The layer-parallel regulariser: how far one sweep is from the sequential states, against plain loops over layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.depth.regularizer import positions
from models.placements.placement import Context

LENGTH = 4
HYBRID = {"name": "hybrid", "pattern": [{"name": "attention", "window": 2}, {"name": "attention"}]}


def small(config: Any, **fields: Any) -> dict:
    """Norms with an offset, so that a gain of zero leaves branches that are constant and not zero."""
    norm, ffn = {"name": "layer_norm", "bias": True}, {"name": "gelu", "hidden": 8}
    return config(**{"width": 8, "heads": 1, "norm": norm, "ffn": ffn} | fields)


def changed(model: nnx.Module, change: Any) -> nnx.Module:
    """A model with `change(dotted path, value)` for every parameter, a NumPy array."""
    graph, state = nnx.split(model)
    flat = {p: jnp.asarray(change(".".join(map(str, p)), np.asarray(v[...]))) for p, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.State(nnx.to_pure_dict(nnx.from_flat_state(flat))))


def constant_branches(path: str, value: np.ndarray) -> np.ndarray:
    return 0 * value if path.endswith(("mixer_norm.scale", "ffn_norm.scale")) else value


def regularised_by(**fields: Any) -> dict[str, Any]:
    return {"name": "layer_parallel", "forward": "sequential", "unroll": False, **fields}


def objective_text(config: dict, depth: dict, tokens: jax.Array) -> str:
    model = models.abstract(config | {"depth": depth}, vocab_size=11)
    graph, state = nnx.split(model)

    def objective(state: Any, tokens: jax.Array, progress: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        h, extra = model.hidden(tokens, progress=progress)
        nats, _ = models.cross_entropy(h, model.output_kernel(), tokens, jnp.ones(tokens.shape))
        return nats + sum(extra.get("losses", {}).values())

    return jax.jit(jax.value_and_grad(objective)).lower(state, tokens, jax.ShapeDtypeStruct((), jnp.float32)).as_text()


def test_without_a_weight_the_regulariser_leaves_the_program_of_the_baseline(config, tokens):
    sequential = {"name": "sequential", "unroll": False}
    off = regularised_by(layers=2, regularizer=0.0, suffixes=[1, 2], stride=3)
    fields = small(config, layers=2)
    baseline = objective_text(fields, sequential, tokens(2, 4))
    assert objective_text(fields, off, tokens(2, 4)) == baseline
    assert objective_text(fields, off | {"regularizer": 0.1}, tokens(2, 4)) != baseline


def compared(count: int, stride: int) -> list[int]:
    """The first is exact, and left out."""
    return [j for j in range(1, count) if j == count - 1 or (stride and (j + 1) % stride == 0)]


def test_terms_are_as_many_as_the_papers_runs_have():
    for stride, terms in ((3, 17), (6, 9), (0, 3)):
        assert sum(len(positions(n, stride)) for n in (8, 16, 24)) == terms
        assert all(positions(n, stride) == compared(n, stride) for n in (1, 2, 8, 16, 24))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean(np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-6)))


@functools.cache
def of_layer(graph: Any, jit: Callable) -> Callable:
    def call(state: Any, h: jax.Array, e: jax.Array, number: jax.Array) -> jax.Array:
        block = nnx.merge(graph, state)
        return block(h, Context(block.mixer.prepare(h.shape[1], None), number, e))

    return jit(call)


def functions(model: nnx.Module, tokens: jax.Array, jit: Callable) -> tuple[np.ndarray, list[Callable]]:
    """The state before the stack, and every layer as a function of the state."""
    stack, e, found = model.stack(), model.embedding.table[...][tokens], []
    for number, place in enumerate(stack.places):
        block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
        graph, state = nnx.split(block)
        call = functools.partial(of_layer(graph, jit), state)
        number = jnp.int32(number)
        found.append(lambda h, call=call, number=number: np.asarray(call(jnp.asarray(h, jnp.float32), e, number), np.float64))
    return np.asarray(e, np.float64), found


def in_order(e: np.ndarray, layers: list[Callable]) -> list[np.ndarray]:
    states = [e]
    for layer in layers:
        states.append(layer(states[-1]))
    return states


def errors_by_loops(
    states: list[np.ndarray], layers: list[Callable], forms: dict[str, dict], matrices: list | None, held: list
) -> dict[str, float]:
    """The regulariser of every form with a loop over suffixes and one over layers.

    `matrices` correct along streams [S, S], None: by the identity; `held` are the targets of held forms.
    """
    found = {}
    at_once = {}  # by length of the suffix: what each of its layers makes of the state before the suffix
    for count in {n for fields in forms.values() for n in fields["suffixes"]}:
        at_once[count] = [layer(states[-1 - count]) for layer in layers[-count:]]
    for name, fields in forms.items():
        stride, total = fields.get("stride", 0), 0.0
        targets = held if fields.get("detach") else states
        for count in fields["suffixes"]:
            swept = h = states[-1 - count]
            for j, out in enumerate(at_once[count]):
                moved = swept - h  # one sweep, every layer of which reads h
                swept = out + (moved if matrices is None else np.einsum("ij,btjd->btid", matrices[j - count], moved))
                if j in compared(count, stride):
                    alone = stride == 0 and fields.get("form", "code") == "code" and matrices is None
                    total += relative(out if alone else swept, targets[len(states) - count + j])
        found[name] = total
    return found


FORMS = {
    "code": {"suffixes": [1, 3]},
    "code_held": {"suffixes": [1, 3], "detach": True},
    "paper": {"suffixes": [3, 2], "form": "paper"},
    "stride_2": {"suffixes": [3, 2], "stride": 2},
    "stride_3_held": {"suffixes": [3], "stride": 3, "detach": True},
}
MIXTURE = {"stride_3_held": 1.0, "stride_2": 3.0}

PUBLISHED_HCN = {"suffixes": [2, 3], "correction": "hcn", "detach": True}


def check_by_loops(model: nnx.Module, rows: jax.Array, forms: dict, mixture: dict, jit: Callable) -> dict[str, float]:
    """Values in every form, and the slope of a sum of some along a random direction, a held target staying where it is."""
    graph, state = nnx.split(model)

    def mixed(state: Any) -> Any:
        found = {}
        for name, fields in forms.items():
            depth = regularised_by(layers=3, regularizer=0.5, **fields)
            extra = nnx.merge(graph, state).hidden(rows, depth=depth, progress=jnp.float32(0.3))[1]
            found[name] = extra["losses"]["layer_parallel"]
        return sum(weight * found[name] for name, weight in mixture.items()), found

    def by_loops(model: nnx.Module, held: list | None = None) -> tuple[dict[str, float], list[np.ndarray]]:
        e, layers = functions(model, rows, jit)
        streams = model.options.placement.streams
        states = in_order(e if streams is None else np.stack([e] * streams, axis=2), layers)
        values = errors_by_loops(states, layers, forms, matrices(model), held or states)
        return {name: 0.5 * value for name, value in values.items()}, states

    (_, found), gradient = jit(jax.value_and_grad(mixed, has_aux=True))(state)
    expected, targets = by_loops(model)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-5)

    rng, size = np.random.default_rng(1), 5e-4
    direction = {p: rng.standard_normal(v.shape) for p, v in nnx.to_flat_state(state)}
    slope = sum(np.sum(direction[p] * np.asarray(v[...], np.float64)) for p, v in nnx.to_flat_state(gradient))
    moved = []
    for sign in (1, -1):
        flat = {p: jnp.asarray(v[...] + sign * size * direction[p], jnp.float32) for p, v in nnx.to_flat_state(state)}
        there = nnx.merge(graph, nnx.State(nnx.to_pure_dict(nnx.from_flat_state(flat))))
        values, _ = by_loops(there, targets)
        moved.append(sum(weight * values[name] for name, weight in mixture.items()))
    assert abs(slope) > 0.1
    assert slope == pytest.approx((moved[0] - moved[1]) / (2 * size), rel=2e-2)
    return {name: float(value) for name, value in found.items()}


def matrices(model: nnx.Module) -> list[np.ndarray] | None:
    """H_ffn H_mixer of every layer; None without streams."""
    if model.options.placement.streams is None:
        return None
    stack, found = model.stack(), []
    for place in stack.places:
        block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
        mixer, ffn = (np.asarray(getattr(block.placement, f"{site}_weights").residual(None)) for site in ("mixer", "ffn"))
        found.append(ffn @ mixer)
    return found


def test_the_regulariser_and_its_gradient_are_those_of_plain_loops(config, awake, tokens, jit):
    model = awake(small(config, layers=4, mixer=HYBRID))
    found = check_by_loops(model, tokens(2, LENGTH), FORMS, MIXTURE, jit)
    assert found["code"] == found["code_held"]
    assert len({round(value, 4) for value in found.values()}) == len(FORMS) - 1


def test_over_streams_the_last_state_is_compared_with_the_corrected_one(config, awake, tokens, jit):
    """As in the published HCN runs: stride 0 and held targets."""
    model = awake(small(config, layers=3, placement={"name": "mhc", "streams": 2}))
    found = check_by_loops(model, tokens(2, LENGTH), {"published": PUBLISHED_HCN}, {"published": 4.0}, jit)
    assert found["published"] > 0.1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_first_layer_of_a_suffix_is_exact_and_rounding_pushes_nothing(config, awake, tokens, jit, precision):
    """What its term would be of is rounding, whose direction is of length one however small it is."""
    model, rows = awake(small(config, layers=2), precision=precision), tokens(2, LENGTH)
    graph, state = nnx.split(model)

    def error(state: Any, **fields: Any) -> jax.Array:
        depth = regularised_by(layers=2, regularizer=1.0, ramp=0.0, detach=True, **fields)
        return nnx.merge(graph, state).hidden(rows, depth=depth, progress=jnp.float32(1))[1]["losses"]["layer_parallel"]

    def found(state: Any) -> Any:
        forms = {"alone": {"suffixes": [1]}, "every": {"stride": 1}, "last": {"stride": 2}}
        return {name: jax.value_and_grad(error)(state, **fields) for name, fields in forms.items()}

    found = jit(found)(state)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(found["alone"]))
    assert found["last"][0] > 0.01
    for every, last in zip(jax.tree.leaves(found["every"]), jax.tree.leaves(found["last"]), strict=True):
        np.testing.assert_array_equal(every, last)


def test_a_held_target_has_no_gradient(config, awake, tokens, jit):
    """The first layer is in the sequential state alone: what is compared with it is the last layer at the embedding."""
    model, rows = awake(small(config, layers=2)), tokens(2, LENGTH)
    graph, state = nnx.split(model)

    def error(state: Any, detach: bool) -> jax.Array:
        depth = regularised_by(layers=2, regularizer=0.5, detach=detach)
        return nnx.merge(graph, state).hidden(rows, depth=depth, progress=jnp.float32(1))[1]["losses"]["layer_parallel"]

    found = jit(lambda state: [jax.grad(error)(state, detach) for detach in (False, True)])(state)
    free, held = (np.abs(g["blocks"]["block0"]["ffn"]["up"]["kernel"][...][0]).max() for g in found)
    assert free > 1e-3 and held == 0


def test_the_weight_grows_over_the_ramp_and_outside_training_there_is_none(config, awake, tokens, jit):
    model, rows = awake(small(config, layers=2)), tokens(2, LENGTH)
    graph, state = nnx.split(model)

    def loss(state: Any, progress: jax.Array, ramp: float) -> Any:
        depth = regularised_by(layers=2, regularizer=0.5, ramp=ramp)
        return nnx.merge(graph, state).hidden(rows, depth=depth, progress=progress)[1]["losses"]["layer_parallel"]

    ramped = jit(lambda state, progress: (loss(state, progress, 0.2), loss(state, progress, 0.0)))
    found = {p: [float(x) for x in ramped(state, jnp.float32(p))] for p in (0.0, 0.05, 0.2, 0.9)}
    whole = found[0.0][1]
    assert whole > 0
    assert [found[p][0] / whole for p in found] == pytest.approx([0.0, 0.25, 1.0, 1.0], rel=1e-5)
    assert all(constant == pytest.approx(whole) for _, constant in found.values())
    depth = regularised_by(layers=2, regularizer=0.5)
    assert jax.eval_shape(lambda: model.hidden(rows, depth=depth)[1]) == {}


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_exact_sweep_costs_nothing_and_has_a_finite_gradient(config, awake, tokens, jit, precision):
    """One layer, and branches that do not depend on their input: nothing to correct, and no NaN where a root is at zero."""
    model = changed(awake(small(config, layers=2), precision=precision), constant_branches)
    graph, state = nnx.split(model)

    def error(state: Any) -> jax.Array:
        depth = regularised_by(layers=2, regularizer=1.0, ramp=0.0, suffixes=[1, 2], form="paper")
        found = nnx.merge(graph, state).hidden(tokens(2, LENGTH), depth=depth, progress=jnp.float32(0))
        return found[1]["losses"]["layer_parallel"]

    value, gradient = jit(jax.value_and_grad(error))(state)
    assert float(value) < (1e-5 if precision == "float32" else 0.05)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_state_of_zeros_has_a_finite_gradient(config, awake, tokens, jit):
    """Zero embedding, no norm: every state is zero, and so is its size."""
    fields = {"placement": {"name": "none"}, "layers": 2, "norm": {"name": "rms_norm"}}
    model = changed(awake(small(config, **fields)), lambda path, v: 0 * v if "table" in path else v)
    graph, state = nnx.split(model)

    def error(state: Any) -> jax.Array:
        depth = regularised_by(layers=2, regularizer=1.0)
        return nnx.merge(graph, state).hidden(tokens(1, 2), depth=depth, progress=jnp.float32(1))[1]["losses"]["layer_parallel"]

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jit(jax.grad(error))(state)))
