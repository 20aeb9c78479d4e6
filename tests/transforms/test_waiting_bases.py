"""Bases made from gradients: a gradient of zeros chooses none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import projectors, recombine

RANK, EVERY = 2, 3
MAKES = {
    "svd": projectors.svd,
    "randomized_svd": projectors.randomized_svd,
    "online_pca": projectors.online_pca,
    "power_iteration": projectors.power_iteration,
    "dct": projectors.dct,
    "lazy_svd": projectors.lazy_svd,
    "coap": projectors.coap,
    "grassmann": projectors.grassmann,
}
each = pytest.mark.parametrize("name", MAKES)


REFRESHED = ("svd", "randomized_svd", "dct", "lazy_svd")
"""Projectors that choose a new basis at each refresh, rather than move the old one."""

SPEC = projectors.MatrixSpec("w", (2, 8, 12), jnp.float32)


def gradients(name):
    """Gradients of rank 2, or with two cosines, for each step and two matrices; some are zero."""
    draw = np.random.default_rng(0)
    columns = draw.normal(size=(6, 2, 8, RANK))
    if name == "dct":
        chosen = draw.permuted(np.tile(np.arange(1, 9), (6, 2, 1)), axis=-1)[..., :RANK, None]
        columns = np.asarray(projectors.dct(RANK).expand(SPEC, jnp.asarray(chosen)))
    g = columns @ draw.normal(size=(6, 2, RANK, 12))
    g[0, 1] = g[1, 1] = 0.0  # the first two of one matrix
    g[3, 0] = 0.0  # the other's, when all are refreshed
    return jnp.asarray(g, jnp.float32)


@functools.cache
def compiled(name):
    """A run that gives the basis and the update of each step."""
    projector = MAKES[name](RANK)
    tx = memopt.in_subspace(optax.identity(), projector, recombine.lift(), EVERY)

    def step(state, g):
        updates, state = tx.update({"w": g}, state)
        return state, (projector.expand(SPEC, state.projector[0]["w"]), updates["w"])

    return jax.jit(lambda g: jax.lax.scan(step, tx.init({"w": g[0]}), g)[1])


def follow(name, gradients):
    return compiled(name)(gradients)


@each
def test_a_matrix_waits_for_its_first_gradient_that_is_not_zero(name):
    """In a stack each matrix by itself."""
    g = gradients(name)
    bases, updates = follow(name, g)
    assert not bases[:2, 1].any()
    for step, matrix in ((0, 0), (2, 1)):
        np.testing.assert_allclose(updates[step, matrix], g[step, matrix], atol=1e-4)
    later, _ = follow(name, jnp.roll(g, -2, axis=0))
    angle = np.linalg.svd(bases[2, 1].T @ later[0, 1], compute_uv=False)
    np.testing.assert_allclose(angle, 1.0, atol=1e-5)


@each
def test_a_gradient_of_zeros_at_a_refresh_chooses_nothing(name):
    """The basis is refreshed at the next gradient, or stays if it follows the gradients."""
    g = gradients(name)
    bases, updates = follow(name, g)
    assert not updates[3, 0].any()
    if name in REFRESHED:
        assert not bases[3, 0].any()
        np.testing.assert_allclose(updates[4, 0], g[4, 0], atol=1e-4)
        np.testing.assert_array_equal(bases[5, 0], bases[4, 0])
    else:
        np.testing.assert_array_equal(bases[3, 0], bases[2, 0])


@each
@pytest.mark.parametrize("size", [2.0**-110, 2.0**100])
def test_a_basis_does_not_depend_on_the_size_of_gradients(name, size):
    """Their squares would vanish, or overflow."""
    bases, _ = follow(name, gradients(name))
    np.testing.assert_allclose(follow(name, size * gradients(name))[0], bases, atol=1e-5)


def test_a_product_with_a_factor_of_zeros_trains_all_its_columns():
    """In LoRA the factor beside the zeros has a gradient of zeros in the first step."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (256, 32))
    y = x @ jax.random.normal(keys[1], (32, 32)) / 6
    params = {"a": jax.random.normal(keys[2], (32, 8)) / 6, "b": jnp.zeros((8, 32))}
    tx = memopt.galore(3e-2, rank=2, matrices=memopt.every_matrix)
    loss = lambda p: jnp.square(x @ p["a"] @ p["b"] - y).mean()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, None, 190)[0])
    trained, _ = run((params, tx.init(params)))
    moved = jnp.abs(trained["a"] - params["a"]).max(0)
    assert (moved > 1e-2).all(), moved
