"""Limits on the growth of updates, per matrix of the stack."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import GrowthLimiter, projectors, recombine

W = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6)), jnp.float32)
G = {"w": W * jnp.array([0.1, 1.0, 10.0])[:, None, None]}


@pytest.mark.parametrize("per", ["channel", "matrix"])
@pytest.mark.parametrize("as_released", [False, True])
def test_a_limiter_inside_the_recombination_is_the_one_after_it(per, as_released):
    """scale_gradient knows the norm of its update without forming it."""
    inner = memopt.scale_by_uncorrected_adam()
    limiter = GrowthLimiter(1.01, as_released)
    project = lambda limiter: memopt.in_subspace(
        inner, projectors.gaussian(2), recombine.scale_gradient(per, limiter)
    )
    inside = project(limiter)
    after = optax.chain(project(None), memopt.limit_norm_growth(1.01, as_released=as_released))
    a, b = inside.init(G), after.init(G)
    for size in [1.0, 3.0, 0.0, 2.0, 5.0]:
        g = {"w": size * G["w"]}
        a = inside.init(g) if size == 1.0 else a
        b = after.init(g) if size == 1.0 else b
        one, a = inside.update(g, a)
        two, b = after.update(g, b)
        np.testing.assert_allclose(one["w"], two["w"], rtol=1e-4, atol=1e-12)
