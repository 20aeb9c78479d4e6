"""Sums against numpy; maxima of what is not finite."""

import math

import jax
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


@pytest.mark.parametrize("shape", [(3,), (8, 16), (5, 7, 3), (24, 130), (129, 65)])
def test_no_place_of_a_nan_is_lost(shape):
    """Puts NaN at up to 64 places of arrays that XLA for CPUs reduces in different ways."""
    size, axes = math.prod(shape), tuple(range(len(shape)))[-2:]
    places = np.linspace(0, size - 1, 64).astype(int)
    arrays = np.ones((len(places), size), np.float32)
    arrays[np.arange(len(places)), places] = np.nan
    arrays = jnp.asarray(arrays.reshape(-1, *shape))

    @jax.jit
    def found(arrays):
        last = jax.lax.map(lambda x: reductions.largest_magnitude(x, -1).max(), arrays)
        whole = jax.lax.map(lambda x: reductions.largest_magnitude(x, axes).max(), arrays)
        factor, exists = jax.lax.map(lambda x: reductions.scale_to_one(x, axes), arrays)
        return last, whole, (factor == 1).reshape(len(arrays), -1).sum(1), exists

    last, whole, ones, exists = found(arrays)
    assert np.isinf(last).all()
    assert np.isinf(whole).all()
    assert (ones == 1).all()  # that of ones is a half
    assert (exists.reshape(len(arrays), -1).sum(1) == exists[0].size - 1).all()


def test_arrays_of_no_entries_have_a_largest_magnitude_of_0():
    assert reductions.largest_magnitude(jnp.zeros((2, 0)), 1).tolist() == [0, 0]
    factor, exists = reductions.scale_to_one(jnp.zeros((2, 0, 3)))
    assert factor.tolist() == [[[1]], [[1]]]
    assert exists.tolist() == [False, False]


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1.0, 1e200, 1e300])
def test_squares_of_scaled_float64_entries_neither_overflow_nor_vanish(size):
    with jax.enable_x64(True):
        x = size * jnp.ones((2, 2), jnp.float64)
        factor, exists = reductions.scale_to_one(x)
        assert bool(exists)
        assert 0.25 <= float(jnp.square(factor * x).max()) <= 1
