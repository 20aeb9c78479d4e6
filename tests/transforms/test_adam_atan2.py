"""Adam's arctangent: bounds, scales, and state in fewer bits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt


def draw(seed):
    normal = np.random.default_rng(seed).normal
    return {"up": jnp.asarray(normal(size=(2, 32, 64)), jnp.float32), "norm": jnp.ones(64)}


@functools.partial(jax.jit, static_argnums=0)
def updates_of(tx, gradients):
    """The updates of some steps, stacked."""
    like = jax.tree.map(lambda g: g[0], gradients)

    def step(state, g):
        updates, state = tx.update(g, state, like)
        return state, updates

    return jax.lax.scan(step, tx.init(like), gradients)[1]


GRADIENTS = jax.tree.map(lambda *g: jnp.stack(g), *map(draw, range(6)))


def test_the_scale_of_gradients_does_not_matter_and_updates_are_bounded():
    tx = memopt.scale_by_adam_atan2(a=2.0)
    usual = updates_of(tx, GRADIENTS)
    small = updates_of(tx, jax.tree.map(lambda g: 2.0**-40 * g, GRADIENTS))
    chex.assert_trees_all_close(small, usual, rtol=1e-6)
    # Their squares are zero in float32.
    vanishing = updates_of(tx, jax.tree.map(lambda g: 2.0**-100 * g, GRADIENTS))
    for u in jax.tree.leaves((usual, vanishing)):
        assert jnp.abs(u).max() <= 2.0 * np.pi / 2 * (1 + 1e-6)


def test_zero_moments_give_zero_updates():
    zeros = jax.tree.map(jnp.zeros_like, GRADIENTS)
    chex.assert_trees_all_equal(updates_of(memopt.scale_by_adam_atan2(), zeros), zeros)


def test_without_a_second_moment_it_is_the_sign():
    tx = memopt.scale_by_adam_atan2(a=2 / np.pi, b=0.0, b1=0.0)
    signs = jax.tree.map(jnp.sign, GRADIENTS)
    chex.assert_trees_all_close(updates_of(tx, GRADIENTS), signs, rtol=1e-6)
    with pytest.raises(ValueError, match="b must be at least 0, got -1"):
        memopt.scale_by_adam_atan2(b=-1.0)


@pytest.mark.parametrize(("codec", "part"), [("int8", 0.1), ("int4", 0.3), ("bfloat16", 0.02)])
def test_state_in_fewer_bits_gives_nearly_the_same_updates(codec, part):
    inner = memopt.scale_by_adam_atan2()
    tx = memopt.quantize_state(inner, codec, min_size=1000)
    codes = jax.eval_shape(tx.init, draw(0)).codes
    assert all(x["up"].dtype != jnp.float32 for x in (codes.mu, codes.nu))
    found, exact = (updates_of(t, GRADIENTS)["up"] for t in (tx, inner))
    assert jnp.abs(found - exact).mean() <= part * jnp.abs(exact).mean()
