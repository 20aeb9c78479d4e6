"""A gradient of zeros must not freeze a matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from tests.optimizers.recorded_runs import follow
from tests.yardstick import yardstick


def movement(as_released, method):
    """How far w_square goes from step 10 to 50; its gradient is zero at step 7."""
    params, gradients = yardstick.make_problem()
    tx = method(1e-2, rank=1 if method is memopt.apollo_mini else 8, as_released=as_released)
    path = follow(tx, params, gradients)
    return np.abs(path[50]["w_square"] - path[10]["w_square"]).max()


@pytest.mark.parametrize("method", [memopt.apollo, memopt.apollo_mini])
def test_a_zero_gradient_freezes_the_released_code_but_not_ours(method):
    assert movement(True, method) < 1e-7
    assert movement(False, method) > 0.1


@pytest.mark.parametrize("vanishing", [0.0, 1e-20, 1e-6])
def test_an_update_that_all_but_vanishes_is_not_remembered(vanishing):
    tx = memopt.limit_norm_growth(1.01)
    state = tx.init(jnp.zeros((2, 3, 3)))
    both = jnp.ones((2, 3, 3))
    _, state = tx.update(both, state)
    _, state = tx.update(both.at[0].set(vanishing), state)
    updates, _ = tx.update(both, state)
    np.testing.assert_allclose(updates, both, rtol=1e-6)


def test_published_rule_is_an_option():
    tx = memopt.limit_norm_growth(1.01, as_released=True)
    state = tx.init(jnp.zeros((3, 3)))
    for g in [1.0, 0.0, 1.0]:
        updates, state = tx.update(jnp.full((3, 3), g), state)
    assert float(jnp.linalg.norm(updates)) == pytest.approx(1.01e-8, rel=1e-3)
