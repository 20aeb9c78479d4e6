"""Sums, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from memopt import reductions


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 96), (5, 100)])
@pytest.mark.parametrize("axis", [0, -1])
def test_total(shape, axis):
    x = np.random.default_rng(0).normal(size=shape)
    axes = (axis % len(shape),)
    np.testing.assert_allclose(
        reductions.total(jnp.asarray(x), axes), x.sum(axes), rtol=0, atol=1e-4
    )
