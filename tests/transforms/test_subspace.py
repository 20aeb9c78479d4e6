"""What `in_subspace` does around projector, inner optimizer and recombination."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import projectors, recombine

IDENTITY = projectors.replay({"w": {1: np.eye(4)}}, side="left")


def updates_of(tx, gradients):
    state, seen = tx.init(gradients[0]), []
    for g in gradients:
        updates, state = jax.jit(tx.update)(g, state)
        seen.append(float(updates["w"][0, 0]))
    return seen


@pytest.mark.parametrize(
    ("on_refresh", "expected"),
    [("keep", [1.0, 1.5, 1.75, 1.875]), ("reset", [1.0, 1.5, 1.0, 1.5])],
)
def test_on_refresh(on_refresh, expected):
    """In the whole space the inner momentum is seen as it is; a refresh comes every 2 steps."""
    momentum = optax.trace(0.5)
    tx = memopt.in_subspace(momentum, IDENTITY, recombine.lift(), 2, on_refresh)
    assert updates_of(tx, [{"w": jnp.ones((4, 6))}] * 4) == pytest.approx(expected)


def test_in_the_whole_space_lifting_changes_nothing():
    adam = optax.scale_by_adam()
    gradients = [
        {"w": jnp.asarray(np.random.default_rng(t).normal(size=(4, 6)), jnp.float32)}
        for t in range(3)
    ]
    tx = memopt.in_subspace(adam, IDENTITY, recombine.lift())
    np.testing.assert_allclose(updates_of(tx, gradients), updates_of(adam, gradients), rtol=1e-5)


def test_what_is_no_matrix_goes_through_the_inner_optimizer():
    g = {"w": jnp.ones((4, 6)), "norm": jnp.arange(4.0), "embed": jnp.ones((8, 4))}
    tx = memopt.in_subspace(optax.scale(3.0), projectors.gaussian(2), recombine.lift())
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates["norm"], 3 * g["norm"])
    np.testing.assert_array_equal(updates["embed"], 3 * g["embed"])


def test_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = memopt.in_subspace(inner, IDENTITY, recombine.lift())
    g = {"w": jnp.ones((4, 6))}
    updates, _ = tx.update(g, tx.init(g), factor=2.0)
    np.testing.assert_array_equal(updates["w"], 2 * g["w"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
        ({"on_refresh": "rest"}, "did you mean 'reset'"),
    ],
)
def test_errors(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        memopt.in_subspace(optax.identity(), IDENTITY, recombine.lift(), **options)
