"""Transformations made of a rule for one parameter, and the rules by themselves."""

import collections
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.matrices import layout_of
from memopt.transforms import per_matrix
from memopt.transforms.decay import subtract_decay, updated_weights
from memopt.transforms.factored import divide_by_factored_rms, second_moment_decay
from memopt.transforms.matrix_rms import clip_rms, scale_by_rms_of
from memopt.transforms.norm_growth import limit_growth
from memopt.transforms.orthogonalization import SHAPE_SCALES, multiply_by_shape
from memopt.trees import NOTHING

G = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
LAYOUT = layout_of("w", G, memopt.Matrix(-2, -1))


class SumState(NamedTuple):
    count: Any
    squares: Any
    total: Any


def add_up(layout, u, squares, total, w, *, rate):
    total = total + u
    return rate * total + w, squares + jnp.square(u).sum(layout.core), total


def test_the_state_has_a_count_and_an_array_for_each_parameter():
    tx = per_matrix(
        add_up,
        SumState,
        lambda layout, p: (p.sum(layout.core), p),
        schedules={"rate": lambda count: 10.0**count},
        reads_params=True,
    )
    params = {"w": G, "b": jnp.ones(3), "none": None, "masked": optax.MaskedNode()}
    state = tx.init(params)
    like = SumState(jnp.int32(0), params | {"w": jnp.zeros(2), "b": jnp.zeros(())}, params)
    chex.assert_trees_all_equal(state, jax.tree.map(jnp.zeros_like, like))
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert state.count == 2
    np.testing.assert_array_equal(updates["b"], jnp.full(3, 10.0 * 2 + 1))
    np.testing.assert_allclose(state.squares["w"], 2 * np.square(G).sum((1, 2)), rtol=1e-6)


def test_rules_say_what_becomes_of_one_parameter():
    ones, jordan = jnp.ones(2), SHAPE_SCALES["jordan"]
    rms = lambda x: np.sqrt(np.square(x).mean((1, 2), keepdims=True))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    close(clip_rms(LAYOUT, G, clip_threshold=0.5), G / np.maximum(1, rms(G) / 0.5))
    close(scale_by_rms_of(LAYOUT, G, 3 * G, min_scale=0.1), G * 3 * rms(G))
    close(multiply_by_shape(LAYOUT, G, consistent_rms=None, factor=jordan), G * np.sqrt(6 / 4))
    close(subtract_decay(LAYOUT, G, G, decayed=updated_weights, strength=0.25), 0.5 * G)
    limited, norms = limit_growth(LAYOUT, G, ones, limiter=memopt.GrowthLimiter(1.5))
    close(norms, 1.5 * ones)
    close(np.square(limited).sum((1, 2)), 1.5**2 * ones)


def test_a_factored_second_moment_is_the_product_of_its_means():
    squares = np.square(G)
    rows, cols = squares.mean(2), squares.mean(1)
    moment = rows[:, :, None] * cols[:, None] / rows.mean(1)[:, None, None]
    zeros = jax.tree.map(jnp.zeros_like, (rows, cols))
    first = {"decay": second_moment_decay(jnp.int32(0), 0.8), "eps": 0.0}
    update, *new = divide_by_factored_rms(LAYOUT, G, *zeros, **first)
    chex.assert_trees_all_close((update, *new), (G / np.sqrt(moment), rows, cols), rtol=1e-5)
    vector = layout_of("b", G[0, 0], None)
    update, *new = divide_by_factored_rms(vector, G[0, 0], NOTHING, jnp.zeros(6), **first)
    chex.assert_trees_all_close((update, *new), (np.sign(G[0, 0]), NOTHING, squares[0, 0]))


def test_a_count_that_is_not_the_first_field_is_refused():
    state = collections.namedtuple("State", ("mu", "count"))
    with pytest.raises(ValueError, match="count as its first field"):
        per_matrix(lambda layout, u, mu: (u, mu), state, lambda layout, p: p)
