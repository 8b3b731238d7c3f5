"""What diagnostics are made of, on its own: angles, effective ranks, the momentum in the state of an optimizer."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from optim.roles import parameters
from trainer import config as configuration
from trainer.diagnostics.angular_distance import angle
from trainer.diagnostics.effective_rank import exponential_entropy
from trainer.diagnostics.trace import momentum
from trainer.setup import assemble


def test_the_angle_is_exact_at_both_ends():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 7)), jnp.float32)
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    assert (angle(x, x) == 0).all() and (angle(x, -x) == 1).all()
    cosine = np.sum(np.asarray(x[:-1], float) * np.asarray(x[1:], float), axis=-1)
    np.testing.assert_allclose(angle(x[:-1], x[1:]), np.arccos(cosine) / np.pi, rtol=1e-4)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
def test_the_effective_rank_of_a_planted_spectrum_is_the_exponential_of_its_entropy(shape):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in shape)
    for values in ([1, 1, 1, 0, 0, 0], [5, 0, 0, 0, 0, 0], [4, 3, 2, 1, 0.5, 1e-3]):
        shares = np.array(values)[np.array(values) > 0] / np.sum(values)
        matrix = jnp.asarray(u * values @ v.T, jnp.float32)
        assert float(exponential_entropy(matrix)) == pytest.approx(math.exp(-np.sum(shares * np.log(shares))), rel=1e-3)


@pytest.mark.parametrize("direction", ["muon", "adamw", "sgd", "optax"])
def test_momentum_is_found_in_the_state_of_an_optimizer(tiny, direction):
    setup = assemble(configuration.resolve_config(tiny(optimizer__direction={"name": direction})))
    found = momentum(setup.abstract_state()["optimizer"], declared := parameters(setup.model))
    matrices = [path for path, parameter in declared.items() if parameter.role == "matrix"]
    assert set(matrices) <= set(found)
    assert all(found[path].shape == declared[path].shape for path in found)
