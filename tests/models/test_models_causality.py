"""Nothing before a token depends on it, documents in a row do not see each other, and every parameter learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

VARIANTS = {
    "default": {},
    "relu2": {"ffn": {"name": "relu2"}},
    "gelu_layer_norm_bias": {"ffn": {"name": "gelu"}, "norm": {"name": "layer_norm", "bias": True}},
    "multi_query": {"heads": 4, "kv_heads": 1},
    "window": {"mixer": {"name": "attention", "window": 3}},
    "no_qk_norm": {"mixer": {"name": "attention", "qk_norm": False}},
    "reference_grouped": {"heads": 4, "kv_heads": 2, "mixer": {"name": "attention", "implementation": "reference"}},
    "tied_capped": {"tie_embeddings": True, "logit_softcap": 3.0},
}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


@every_variant
def test_changing_a_token_changes_nothing_before_it_and_its_own_logits(config, awake, run, tokens, fields):
    length = 9
    base = tokens(1, length)
    changed = jnp.where(jnp.eye(length, dtype=bool), (base + 1) % 11, base)  # row t differs at t
    logits = np.asarray(run(awake(config(**fields)), jnp.concatenate([base, changed])))
    for t in range(length):
        np.testing.assert_allclose(logits[1 + t, :t], logits[0, :t], atol=1e-6)
        assert np.abs(logits[1 + t, t] - logits[0, t]).max() > 1e-3


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_window_bounds_how_far_a_token_reaches(config, awake, run, tokens, implementation):
    layers, window, length = 2, 3, 12
    mixer = {"name": "attention", "window": window, "implementation": implementation}
    base = tokens(1, length)
    changed = base.at[0, 1].set((base[0, 1] + 1) % 11)
    logits = np.asarray(run(awake(config(layers=layers, mixer=mixer)), jnp.concatenate([base, changed])))
    moved = np.abs(logits[1] - logits[0]).max(axis=-1) > 1e-6
    last = 1 + layers * (window - 1)
    assert moved.tolist() == [1 <= t <= last for t in range(length)]


@every_variant
def test_a_gradient_reaches_every_parameter_of_every_layer(config, awake, gradients, params, tokens, fields):
    model = awake(config(**fields))
    found = gradients(model, tokens(2, 9))
    assert found.keys() == params(model).keys()
    for path, gradient in found.items():
        layers = gradient if path.startswith("blocks") else gradient[None]
        for layer in layers:
            assert np.isfinite(layer).all(), path
            assert np.abs(layer).max() > 1e-4, path


def test_from_the_initial_zeros_exactly_the_head_learns_first(config, gradients, tokens):
    import models

    found = gradients(models.build(config(), vocab_size=11, seed=0), tokens(2, 9))
    assert [path for path, gradient in found.items() if np.any(gradient)] == ["head_kernel"]


@pytest.mark.parametrize("implementation", ["auto", "xla", "reference"])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_give_the_logits_they_give_apart(config, awake, run, tokens, implementation, window):
    mixer = {"name": "attention", "implementation": implementation, "window": window}
    model = awake(config(heads=4, kv_heads=2, mixer=mixer))
    row = tokens(1, 16)
    segments = jnp.array([[1] * 5 + [2] * 8 + [0] * 3])
    packed = run(model, row, segment_ids=segments)
    np.testing.assert_allclose(packed[:, :5], run(model, row[:, :5]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:13], run(model, row[:, 5:13]), atol=1e-5)
    assert np.abs(packed - run(model, row))[:, 5:].max() > 1e-2  # the mask is what does it


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_padding_never_gives_nan_and_never_reaches_a_document(config, awake, run, gradients, tokens, implementation):
    model = awake(config(mixer={"name": "attention", "implementation": implementation}))
    rows = tokens(3, 8)
    segments = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0], [0] * 8, [1, 2, 3, 4, 5, 6, 7, 8]])
    logits = run(model, rows, segment_ids=segments)
    assert np.isfinite(logits).all()
    other = jnp.where(segments == 0, (rows + 1) % 11, rows)
    np.testing.assert_allclose(run(model, other, segment_ids=segments)[0, :5], logits[0, :5], atol=1e-6)
    found = gradients(model, rows, segment_ids=segments)
    assert all(np.isfinite(gradient).all() for gradient in found.values())


def test_segment_ids_of_one_document_are_the_same_as_none(config, awake, run, tokens):
    model, rows = awake(config()), tokens(2, 8)
    ones = jnp.ones((2, 8), jnp.int32)
    np.testing.assert_allclose(run(model, rows, segment_ids=ones), run(model, rows), atol=1e-6)
    np.testing.assert_allclose(run(model, rows, segment_ids=7 * ones), run(model, rows), atol=1e-6)


def test_rows_of_a_batch_do_not_see_each_other(config, awake, run, tokens):
    model, rows = awake(config()), tokens(3, 8)
    together = run(model, rows)
    for i in range(3):
        np.testing.assert_allclose(together[i], jax.device_get(run(model, rows[i : i + 1]))[0], atol=1e-5)
