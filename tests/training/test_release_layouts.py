"""Reads and writes of a layer in the released step, each by itself: none changes a number."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt.training.release import layouts

STACK = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6)), jnp.float32)
STACKS = {"dense": STACK, "int8": memopt.quantize_params({"up": STACK}, "int8")["up"]}
each_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


@each_stack
def test_a_layer_is_reloaded_and_written_back_where_it_was(stack):
    def move(stack, layer, x):
        part, at = layouts.reload_after(stack, x, layer)
        part = jax.tree.map(lambda x: x + 1, part)
        return layouts.pin_layout(layouts.write_layer(stack, part, at, 0))

    moved = jax.jit(move)(stack, jnp.int32(1), jnp.ones(()))
    expected = jax.tree.map(lambda x: x.at[1].set(x[1] + 1), stack)
    chex.assert_trees_all_equal(moved, expected)


@each_stack
def test_without_a_layer_or_an_axis_the_whole_array_is_read_and_written(stack):
    for layer, axis in ((None, 0), (jnp.int32(1), None)):
        assert layouts.read_layer(stack, layer, axis) is stack
        assert layouts.write_layer(None, stack, layer, axis) is stack


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("x", [1.0, np.nan, np.inf, -np.inf])
def test_a_delayed_flag_is_the_flag(flag, x):
    assert jax.jit(layouts.delay_flag)(jnp.array(flag), jnp.array([0.5, x])) == flag


@pytest.mark.parametrize("condition", [True, False])
def test_an_update_in_place_is_the_update_or_the_old(condition):
    condition = jnp.array(condition)
    update = lambda: jnp.where(condition, 2.0, 1.0)
    found = jax.jit(lambda: layouts.update_in_place(condition, update, jnp.array(1.0)))()
    assert found == 1 + condition
