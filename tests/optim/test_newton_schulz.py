"""Newton-Schulz applies one scalar polynomial to the singular values and leaves everything else alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim
from optim.directions.newton_schulz import (
    SCHEMES,
    _of_norm_one,
    flops,
    gram_is_cheaper,
    newton_schulz_leaves,
    polynomials,
    scalar_map,
)
from strata import ConfigError

shapes = [(16, 16), (12, 20), (20, 12), (8, 40), (40, 8), (1, 7), (3, 12, 30), (2, 2, 10, 6)]


def gaussian(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def with_spectrum(s: np.ndarray, columns: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(len(s), len(s))))
    v, _ = np.linalg.qr(rng.normal(size=(columns, len(s))))
    return jnp.asarray((u * s) @ v.T, jnp.float32)


def singular_values(x: jax.Array) -> np.ndarray:
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def normalised(x: jax.Array) -> np.ndarray:
    s = singular_values(x)
    return s / np.sqrt((s**2).sum(-1, keepdims=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", shapes)
def test_singular_values_follow_the_scalar_polynomial(scheme, shape):
    x = gaussian(*shape)
    expected = np.sort(scalar_map(normalised(x), scheme))
    np.testing.assert_allclose(np.sort(singular_values(optim.newton_schulz(x, scheme))), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_any_number_of_steps_follows_the_scalar_polynomial(steps):
    x = gaussian(10, 30)
    expected = np.sort(scalar_map(normalised(x), "jordan", steps))
    for form in ("plain", "gram"):
        found = np.sort(singular_values(optim.newton_schulz(x, "jordan", steps, form=form)))
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "spectrum",
    [np.logspace(0, -3, 24), np.logspace(0, -6, 24), np.r_[1, 1e-3 * np.ones(23)]],
    ids=["three decades", "six decades", "one large value"],
)
def test_the_gram_form_equals_the_plain_one_on_hard_spectra(scheme, spectrum):
    x = with_spectrum(spectrum, 60)
    plain, gram = (optim.newton_schulz(x, scheme, form=form) for form in ("plain", "gram"))
    # Ten steps amplify float32 rounding of the smallest directions by their slope of 8e4, in both forms.
    np.testing.assert_allclose(gram, plain, atol=3e-4 if scheme == "deepseek" else 3e-5)


def test_the_gram_form_stays_finite_on_a_singular_matrix():
    x = with_spectrum(np.r_[np.ones(4), np.zeros(20)], 60)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = singular_values(optim.newton_schulz(x, "deepseek", form="gram", dtype=dtype))
        np.testing.assert_allclose(found[:4], 1.0, atol=0.03)
        assert found[4:].max() < 1.1


@pytest.mark.parametrize("shape", [(3, 12, 30), (3, 30, 12), (2, 2, 8, 8)])
def test_a_batch_equals_its_matrices_one_by_one(shape):
    x = gaussian(*shape)
    flat = x.reshape(-1, *shape[-2:])
    single = jnp.stack([optim.newton_schulz(matrix) for matrix in flat]).reshape(shape)
    np.testing.assert_allclose(optim.newton_schulz(x), single, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(optim.newton_schulz)(flat).reshape(shape), single, atol=2e-6)


@pytest.mark.parametrize("shape", [(12, 30), (9, 9), (2, 12, 14)])
def test_the_transpose_commutes(shape):
    x = gaussian(*shape)
    np.testing.assert_allclose(optim.newton_schulz(x.mT), optim.newton_schulz(x).mT, atol=2e-6)


def test_rotations_commute():
    x = gaussian(10, 24)
    p, _ = np.linalg.qr(np.asarray(gaussian(10, 10, seed=1)))
    r, _ = np.linalg.qr(np.asarray(gaussian(24, 24, seed=2)))
    np.testing.assert_allclose(optim.newton_schulz(p @ x @ r), p @ optim.newton_schulz(x) @ r, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-19, 1e-12, 1e-3, 1e6, 1e19, 1e37])
def test_the_scale_of_the_input_does_not_matter(scale):
    x = gaussian(10, 24)
    np.testing.assert_allclose(optim.newton_schulz(scale * x), optim.newton_schulz(x), atol=2e-6)


@pytest.mark.parametrize(("dtype", "scales"), [("bfloat16", (1e-25, 1.0, 1e25)), ("float16", (2.0**-10, 1.0, 2.0**13))])
def test_each_matrix_of_a_batch_has_a_scale_of_its_own_in_16_bits_too(dtype, scales):
    x = gaussian(10, 24).astype(dtype)
    batch = jnp.stack([x * jnp.asarray(scale, dtype) for scale in (*scales, 0.0)])
    found = np.asarray(jax.jit(optim.newton_schulz)(batch), np.float32)
    for one in found[:3]:
        np.testing.assert_allclose(one, np.asarray(optim.newton_schulz(x), np.float32), atol=0.01)
    assert not np.any(found[3])


def test_the_largest_numbers_are_mapped_and_nan_is_not_hidden():
    found = optim.newton_schulz(jnp.full((4, 4), 3e38))
    np.testing.assert_allclose(found, optim.newton_schulz(jnp.ones((4, 4))), atol=2e-6)
    for wrong in (jnp.nan, jnp.inf):
        assert np.isnan(optim.newton_schulz(gaussian(4, 4).at[1, 2].set(wrong))).any()


def test_an_ordinary_matrix_is_divided_by_its_norm_with_the_same_bits_as_ever_and_any_other_to_rounding():
    x = gaussian(5, 4, 6)
    for scale in (1e-12, 1.0, 1e12):
        y = scale * x
        assert np.array_equal(_of_norm_one(y), y * jax.lax.rsqrt(jnp.sum(y * y, axis=(-2, -1), keepdims=True)))
    for scale in (2.0**-110, 2.0**-60, 2.0**60, 2.0**120):
        np.testing.assert_allclose(_of_norm_one(scale * x), _of_norm_one(x), rtol=1e-6)


def test_zero_stays_zero():
    assert not np.any(optim.newton_schulz(jnp.zeros((2, 4, 6))))


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0), (0, 3), (0, 0), (2, 3, 0)])
def test_an_empty_array_stays_empty(shape):
    assert optim.newton_schulz(jnp.zeros(shape)).shape == shape
    assert [x.shape for x in newton_schulz_leaves([jnp.zeros(shape)], group=True)] == [shape]


@pytest.mark.parametrize(
    ("scheme", "low", "high"), [("jordan", 0.68, 1.21), ("you5", 0.69, 1.15), ("polar_express", 0.69, 1.15)]
)
def test_five_steps_reach_the_band_from_1p6e_3(scheme, low, high):
    s = np.geomspace(1.6e-3, 1, 20_000)
    assert low < scalar_map(s, scheme).min() and scalar_map(s, scheme).max() < high


def test_you6_never_exceeds_one():
    assert scalar_map(np.linspace(0, 1, 20_001), "you6").max() < 1


def test_slopes_at_zero_are_those_of_the_reference_table():
    for scheme, slope in (("jordan", 485), ("you5", 493), ("you6", 1138), ("polar_express", 990), ("deepseek", 7.9e4)):
        assert np.prod([a for a, _, _ in SCHEMES[scheme]]) == pytest.approx(slope, rel=6e-3)


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize(
    ("scheme", "low", "high"), [("jordan", 0.65, 1.23), ("you5", 0.95, 1.09), ("polar_express", 0.79, 1.18)]
)
def test_bfloat16_inside_stays_near_the_band(scheme, low, high, form):
    x = gaussian(32, 128)
    y = optim.newton_schulz(x, scheme, dtype=jnp.bfloat16, form=form)
    found = singular_values(y)
    assert y.dtype == jnp.float32
    assert low < found.min() and found.max() < high


def test_leaves_of_one_shape_batched_together_equal_each_by_itself():
    leaves = [gaussian(*shape, seed=i) for i, shape in enumerate([(3, 6, 10), (10, 6), (6, 6), (2, 1, 6, 10), (6, 6)])]
    apart = newton_schulz_leaves(leaves, group=False)
    together = newton_schulz_leaves(leaves, group=True)
    assert [x.shape for x in together] == [x.shape for x in leaves]
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_the_gram_form_is_chosen_beyond_three_to_two():
    assert [gram_is_cheaper(64, n, 5) for n in (64, 96, 97, 256)] == [False, False, True, True]
    assert gram_is_cheaper(256, 64, 5) and not gram_is_cheaper(64, 256, 1)


def test_steps_repeat_what_can_be_repeated():
    assert polynomials("jordan", 7) == (SCHEMES["jordan"][0],) * 7
    assert polynomials([(2, -1.5, 0.5)], 4) == ((2.0, -1.5, 0.5),) * 4
    assert polynomials("polar_express", 7)[4:] == (SCHEMES["polar_express"][4],) * 3
    assert len(polynomials("deepseek")) == 10


@pytest.mark.parametrize(
    ("coefficients", "steps", "sentence"),
    [
        ("jordna", None, "known: jordan"),
        ("you6", 5, "steps=6 or None"),
        ("polar_express", 3, "steps=5 or None"),
        ([(2, -1.5, 0.5), (2, -1.5, 0.4)], 5, "steps=2 or None"),
        ([(2, -1.5, 0.5)] * 3, 5, "steps=3 or None"),
        ([(1.0, 2.0)], None, "list of \\(a, b, c\\)"),
        ([], None, "list of \\(a, b, c\\)"),
        ("jordan", 0, "at least one step"),
    ],
)
def test_impossible_coefficients_are_refused(coefficients, steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        optim.newton_schulz(gaussian(3, 4), coefficients, steps)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="matrices"):
        optim.newton_schulz(jnp.ones(3))


@pytest.mark.parametrize(
    ("x", "found"), [(jnp.ones((3, 3), int), "int32"), (jnp.ones((3, 3), complex), "complex64"), ([[1.0]], "list")]
)
def test_what_is_no_array_of_floating_numbers_is_refused(x, found):
    with pytest.raises(ConfigError, match=f"array of floating numbers, not {found}"):
        optim.newton_schulz(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "n", "steps"), [(16, 16, 3), (16, 40, 1), (16, 64, 5), (64, 16, 10), (24, 32, 2)])
def test_flops_are_those_of_the_products_that_are_traced(m, n, steps, dtype):
    def call(x):
        return optim.newton_schulz(x, [(3.0, -3.0, 1.0)], steps, dtype=jnp.dtype(dtype))

    total = 0
    for equation in jax.make_jaxpr(call)(jnp.ones((m, n))).jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (inner,), _ = equation.params["dimension_numbers"][0]
            total += 2 * equation.invars[0].aval.shape[inner] * equation.outvars[0].aval.size
    assert total == flops(m, n, steps, dtype) > 0
