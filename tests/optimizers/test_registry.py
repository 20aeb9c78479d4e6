"""Optimizers by name."""

import jax
import jax.numpy as jnp
import optax
import pytest

import memopt


def tree():
    return {"up": {"kernel": jnp.ones((8, 16))}, "norm": {"scale": jnp.ones(8)}}


@pytest.mark.parametrize("name", memopt.available())
def test_every_name_builds_and_moves(name):
    tx = memopt.optimizer(name, learning_rate=1e-2)
    params = tree()

    def loss(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    @jax.jit
    def step(params, state):
        g = jax.grad(loss)(params)
        updates, state = tx.update(g, state, params, obj_fn=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    assert float(loss(params)) < float(loss(tree()))


def test_a_name_means_its_function():
    by_name = memopt.optimizer("apollo", learning_rate=1e-2, rank=2, weight_decay=0.1)
    direct = memopt.apollo(1e-2, rank=2, weight_decay=0.1)
    assert jax.tree.structure(by_name.init(tree())) == jax.tree.structure(direct.init(tree()))
    assert memopt.state_bytes(by_name, tree()) == memopt.state_bytes(direct, tree())


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'apollo_mini'"):
        memopt.optimizer("apollo-mini", learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"option of apollo: 'rnak'.*did you mean 'rank'"):
        memopt.optimizer("apollo", learning_rate=1e-2, rnak=4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": -3}, "rank must be at least 1, got -3"),
        ({"rank": 1.5}, r"fractional rank must be in \(0, 1\], got 1.5"),
        ({"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
        ({"per": "row"}, "per 'row' is unknown"),
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"projector": "gausian"}, "did you mean 'gaussian'"),
    ],
)
def test_bad_options_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        memopt.apollo(1e-2, **options)


def test_a_rank_larger_than_a_matrix_names_the_matrix():
    with pytest.raises(ValueError, match=r"between 1 and 8 for 'up/kernel'.*8×16.*got 9"):
        memopt.apollo(1e-2, rank=9).init(tree())


def test_matrices_and_rest_are_replaceable():
    everything = lambda name, leaf: memopt.Matrix() if leaf.ndim > 1 else None
    params = {"embed": jnp.ones((8, 16)), "scale": jnp.ones(8)}
    tx = memopt.apollo_mini(1e-2, matrices=everything, rest=optax.sgd(1e-2))
    table = memopt.state_bytes(tx, params)
    assert (table["embed"], table["scale"]) == (4 * (2 * 16 + 1), 0)
    table = memopt.state_bytes(memopt.lion(1e-2, rest=optax.sgd(1e-2)), tree())
    assert (table["up/kernel"], table["norm/scale"]) == (4 * 128, 0)
