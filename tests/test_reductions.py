"""Reductions, each backend's way, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import reductions

ROWS = np.array(
    [
        [1.0, -3.0, 2.0],
        [0.25, 0.1, 0.0],
        [-(2.0**127), 1.0, 0.0],
        [2.0**-126, -(2.0**-126), 0.0],
        [2.0**-130, 0.0, -(2.0**-127)],
        [0.0, -0.0, 0.0],
        [1.0, np.inf, 0.0],
        [1.0, -np.inf, np.nan],
        [np.nan, 0.0, 0.0],
    ],
    np.float32,
)
EXPECTED = [2, 0.25, 2.0**127, 2.0**-126, 0, 0, np.inf, np.inf, np.inf]


@pytest.mark.parametrize("backend", ["cpu", "default"])
def test_octave(backend, monkeypatch):
    here = lambda x, cpu, default: {"cpu": cpu, "default": default}[backend](x)
    monkeypatch.setattr(jax.lax, "platform_dependent", here)
    assert reductions.octave(jnp.asarray(ROWS)).tolist() == [[x] for x in EXPECTED]


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 96), (5, 100)])
@pytest.mark.parametrize("axis", [0, -1])
def test_total(shape, axis):
    x = np.random.default_rng(0).normal(size=shape)
    axes = (axis % len(shape),)
    np.testing.assert_allclose(
        reductions.total(jnp.asarray(x), axes), x.sum(axes), rtol=0, atol=1e-4
    )
