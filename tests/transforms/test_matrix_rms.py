"""Clipping and scaling by root mean squares, per matrix of the stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt

G = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6)), jnp.float32)
    * jnp.array([0.1, 1.0, 10.0])[:, None, None],
    "scale": jnp.array([[3.0, 4.0], [0.3, 0.4]]),
}


def rms(x, axes):
    return np.sqrt(np.square(x).mean(axes))


def test_clip_by_matrix_rms_bounds_each_matrix():
    tx = memopt.clip_by_matrix_rms(0.5)
    clipped, _ = tx.update(G, tx.init(G))
    sizes = rms(G["w"], (1, 2))
    np.testing.assert_allclose(rms(clipped["w"], (1, 2)), np.minimum(sizes, 0.5), rtol=1e-5)
    np.testing.assert_allclose(rms(clipped["scale"], 1), [0.5, rms(G["scale"][1], 0)], rtol=1e-5)


def test_optax_pools_a_stack():
    """Why clip_by_matrix_rms exists: a large layer shrinks a small one."""
    tx = optax.clip_by_block_rms(0.5)
    pooled, _ = tx.update(G, tx.init(G))
    assert rms(pooled["w"][0], (0, 1)) < 0.1 * rms(G["w"][0], (0, 1))


def test_a_matrix_may_have_more_entries_than_an_int32_counts():
    tx, matrix = memopt.normalize_by_group(), jax.ShapeDtypeStruct((2**16, 2**16), "float32")
    updates, _ = jax.eval_shape(lambda g: tx.update(g, tx.init(g), g), matrix)
    assert updates.shape == matrix.shape


def test_normalize_by_group_is_clip_times_parameter_rms():
    params = jax.tree.map(lambda g: 0.01 * g[::-1], G)
    tx = memopt.normalize_by_group(0.5, 1e-2)
    updates, _ = tx.update(G, tx.init(G), params)
    size = np.minimum(rms(G["w"], (1, 2)), 0.5) * np.maximum(1e-2, rms(params["w"], (1, 2)))
    np.testing.assert_allclose(rms(updates["w"], (1, 2)), size, rtol=1e-5)
    with pytest.raises(ValueError, match="params must be given"):
        memopt.scale_by_parameter_rms().update(G, optax.EmptyState())
