"""The finite difference of DiagN, in every compute type and at every size of the residual stream (arXiv:2605.17842)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.depth import corrections
from models.options import LayerParallelDepth


@pytest.mark.parametrize("size", [0.01, 1.0, 16.0, 300.0])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_planted_diagonal_is_found_at_any_size_and_in_any_type(size, dtype, error):
    def rounded(x):
        return jnp.asarray(x, jnp.float32).astype(dtype).astype(jnp.float32)

    keys = jax.random.split(jax.random.key(0), 3)
    inputs = rounded(size * jax.random.normal(keys[0], (2, 1, 64, 32)))
    planted = jax.random.uniform(keys[1], (1, 1, 1, 32), minval=-1.5, maxval=1.5)
    signs = jax.random.rademacher(keys[2], (1, 1, 1, 32), jnp.float32)
    length = LayerParallelDepth(correction="diagonal").probe_length(jnp.dtype(dtype))
    probed = rounded(corrections.probed(inputs, signs, length))
    results = rounded(planted * inputs)
    # The first layer is exact; what it moved by is what the slope of the second is applied to.
    corrected = corrections.diagonal(results, inputs, rounded(planted * probed), probed, limit=2.0)
    slope = (corrected[1] - results[1]) / (results[0] - inputs[1])
    assert np.mean(np.abs(slope - planted[0])) < error


def test_a_state_of_zeros_has_no_slope():
    zeros = jnp.zeros((2, 1, 3, 4))
    probed = corrections.probed(zeros, jnp.ones((1, 1, 1, 4)), 0.01)
    found = corrections.diagonal(zeros + 1.0, zeros, zeros + 1.0, probed, limit=2.0)
    np.testing.assert_array_equal(found, zeros + 1.0)
