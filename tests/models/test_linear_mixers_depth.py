"""Linear-attention mixers in hybrids, under every way to run a stack, and over a mesh of eight virtual devices."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import sharding
from models.construct import parameter_shardings

HYBRIDS = {
    "additive": ["retention", "gla", "attention"],
    "constant": [{"name": "linear_attention", "feature_map": "hedgehog"}, "lightning", "delta_net"],
    "learned": ["simple_gla", "kda", "lightnet"],
}


def hybrid(pattern: list, **fields) -> dict:
    mixers = [{"name": mixer} if isinstance(mixer, str) else mixer for mixer in pattern]
    return {"width": 16, "heads": 2, "layers": len(pattern), "mixer": {"name": "hybrid", "pattern": mixers}, **fields}


def jitted(model, call):
    """`call(model, ...)` with the parameters as arguments, compiled."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, *arguments: call(nnx.merge(graph, state), *arguments))
    return lambda *arguments: compiled(state, *arguments)


@pytest.mark.parametrize("pattern", HYBRIDS.values(), ids=HYBRIDS)
def test_as_many_sweeps_as_layers_are_the_sequential_hybrid(awake, tokens, pattern):
    depth = {"name": "layer_parallel", "layers": 3, "sweeps": 3}
    segments = jnp.array([[1] * 4 + [2] * 5, [1] * 9])

    def both(model, rows):
        return model(rows, segment_ids=segments), model(rows, segment_ids=segments, depth=depth)

    sequential, parallel = jitted(awake(hybrid(pattern)), both)(tokens(2, 9))
    assert np.ptp(sequential) > 0.1
    np.testing.assert_allclose(parallel, sequential, atol=1e-4)


@pytest.mark.parametrize("what", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_mixers_have_the_same_gradients_scanned_and_recomputed_as_written_out(awake, tokens, what):
    """One stack of them, each twice, so that there is something to scan over. `some` has one of each kind of decay."""
    every = ["retention", "gla", "lightnet", "gated_delta_net"]
    if what == "all":
        every = [mixer for pattern in HYBRIDS.values() for mixer in pattern] + every[-1:]
    rows, segments = tokens(2, 9), jnp.array([[1] * 4 + [2] * 5, [1] * 9])

    def gradients(unroll: bool, remat: str):
        config = hybrid(every, depth={"name": "sequential", "unroll": unroll}) | {"layers": 2 * len(every)}
        model = awake(config, remat=remat)
        graph, state = nnx.split(model)

        def nats(state):
            h, _ = nnx.merge(graph, state).hidden(rows, segment_ids=segments)
            return models.cross_entropy(h, model.output_kernel(), rows[:, ::-1], jnp.ones(rows.shape))[0]

        return jax.jit(jax.grad(nats))(state)

    plain, scanned = gradients(True, "none"), gradients(False, "full")
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4 * np.abs(one).max(), err_msg=jax.tree_util.keystr(path))


def test_states_after_layer_parallel_steps_are_those_of_the_sequential_model(awake, tokens):
    model, rows = awake(hybrid(["gated_delta_net", "lightnet"])), tokens(2, 7)
    depth = {"name": "layer_parallel", "layers": 2, "sweeps": 2}
    expected = jitted(model, lambda model, rows: model(rows))(rows)
    step = jitted(model, lambda model, rows, cache: model.step(rows, cache, depth=depth))
    prompt, cache = step(rows[:, :5], model.init_cache(2, 7))
    found = [prompt]
    for t in (5, 6):
        logits, cache = step(rows[:, t : t + 1], cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-4)


def test_looped_hybrids_with_adapters_decode_as_they_predict_and_keep_a_state_for_each_loop(awake, tokens):
    depth = {"name": "recursive", "loops": 2, "rank": 2, "share_norms": False}
    model, rows = awake(hybrid(["gated_delta_net", "attention"], depth=depth) | {"layers": 4}), tokens(2, 6)
    expected = jitted(model, lambda model, rows: model(rows))(rows)
    cache = model.init_cache(2, 6)
    states = [leaf for leaf in jax.tree.leaves(cache["layers"]) if leaf.dtype == jnp.float32 and leaf.ndim == 5]
    assert [state.shape[0] for state in states if state.shape[-2:] == (8, 16)] == [2]
    step = jitted(model, lambda model, rows, cache: model.step(rows, cache))
    logits, _ = step(rows, cache)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    loop = jax.tree.leaves(nnx.state(model.blocks["block0"].mixer.decay))
    assert all(leaf.shape[0] == 2 for leaf in loop)  # what is no matrix is each loop's own


def test_a_bfloat16_hybrid_decodes_in_bfloat16(awake, tokens):
    model, rows = awake(hybrid(["kda", "attention"]), precision="bfloat16"), tokens(2, 6)
    expected = jitted(model, lambda model, rows: model(rows))(rows)
    logits, cache = jitted(model, lambda model, rows, cache: model.step(rows, cache))(rows, model.init_cache(2, 6))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(logits, expected, atol=0.2)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(cache["layers"])}
    assert dtypes == {"bfloat16", "float32"}  # keys, values and taps; states


def all_forms():
    """The mixers of the other file, from its path: tests are no package."""
    path = Path(__file__).resolve().with_name("test_linear_mixers.py")
    spec = importlib.util.spec_from_file_location("linear_mixer_forms", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(mixers: dict, states: dict, x, ids) -> dict:
    found = {}
    for name, mixer in mixers.items():
        mixer = nnx.merge(nnx.graphdef(mixer), states[name])
        found[name] = mixer(x, mixer.prepare(x.shape[1], ids))
    return found


def on_a_mesh(what: str) -> None:
    """Mixers, their parameters split as their axes say, give what they give on one device. `some` have all that differs."""
    assert jax.device_count() == 8
    forms = all_forms()
    names = {"some": ("hedgehog", "retention", "simple_gla", "kda", "lightnet"), "all": forms.FORMS}.get(what)
    # Gradients of a mixer whose heads are split over devices, and of one whose single head is not.
    names = names or ("gla", "simple_gla")
    mixers = {name: forms.make(forms.FORMS[name]) for name in names}

    def call(states, x, ids):
        if what != "gradients":
            return outputs(mixers, states, x, ids)
        squares = lambda states: sum(jnp.sum(out**2) for out in outputs(mixers, states, x, ids).values())  # noqa: E731
        return jax.grad(squares)(states)

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    states, split = {}, {}
    for name, mixer in mixers.items():
        states[name] = nnx.to_pure_dict(nnx.state(mixer))
        split[name] = jax.device_put(states[name], parameter_shardings(mixer, mesh))
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split[name])), name
    states, split = ({name: nnx.State(state) for name, state in every.items()} for every in (states, split))
    x, ids = forms.drawn[:, :9], np.array([[1] * 9, [1] * 4 + [2] * 5] * 4, np.int32)
    single = jax.jit(call)(states, x, ids)
    with jax.set_mesh(mesh):
        batch = jax.NamedSharding(mesh, sharding.partition(("batch", None, None), x.shape, mesh))
        rows = jax.NamedSharding(mesh, sharding.partition(("batch", None), ids.shape, mesh))
        found = jax.jit(call)(split, jax.device_put(x, batch), jax.device_put(ids, rows))
    # The norm of each head divides by outputs that may be small: gradients on one device are 7e-5 off those in float64.
    tolerance = 5e-4 if what == "gradients" else 1e-5
    for expected, (path, leaf) in zip(jax.tree.leaves(single), jax.tree_util.tree_leaves_with_path(found), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(leaf, expected, atol=tolerance * max(1, scale), err_msg=jax.tree_util.keystr(path))


slow = pytest.mark.slow


@pytest.mark.parametrize("what", ["some", pytest.param("all", marks=slow), pytest.param("gradients", marks=slow)])
def test_every_mixer_is_the_same_over_a_mesh(what):
    here = Path(__file__).resolve()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(here.parents[2]),
    }
    done = subprocess.run([sys.executable, str(here), what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    on_a_mesh(sys.argv[1])
