"""ADOPT's parts in chains of others, and its first step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt


def updates(tx, gradients, w):
    def step(state, g):
        u, state = tx.update(g, state, w)
        return state, u

    return jax.jit(lambda g: jax.lax.scan(step, tx.init(w), g)[1])(jnp.asarray(gradients))


def test_the_bound_of_a_step_holds_in_any_chain():
    tx = optax.chain(optax.scale(10.0), memopt.clip_by_step(0.25))
    found = updates(tx, np.full((16, 2), [1.0, -1.0]), jnp.zeros(2))
    np.testing.assert_allclose(found[:, 0], np.arange(1, 17) ** 0.25, rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], -found[:, 0])
    later = updates(memopt.clip_by_step(1.0, delay=2), np.full((4, 1), 9.0), jnp.zeros(1))
    assert later[:, 0].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("options", [{"exponent": -1.0}, {"delay": -1}])
def test_a_bound_that_falls_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        memopt.clip_by_step(**options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decay", [0.5, jnp.float32(0.5)], ids=["number", "array"])
def test_adopt_neither_moves_nor_decays_in_its_first_step(decay, dtype):
    w = jnp.array([2.0, -3.0], dtype)
    found = updates(memopt.adopt(0.1, weight_decay=decay), jnp.ones((2, 2), dtype), w)
    assert found.dtype == dtype
    assert not found[0].any()
    np.testing.assert_allclose(found[1], -0.1 * (0.1 + 0.5 * w), rtol=2e-2)


def test_gradients_that_begin_with_zero_are_bounded_from_then_on():
    found = updates(memopt.adopt(1.0), [[0.0], [0.0], [1.0], [1.0]], jnp.zeros(1))
    bounds = np.array([0.0, 0.0, 2**0.25, 3**0.25])  # of what is averaged
    expected = [0.1 * sum(bounds[: t + 1] * 0.9 ** np.arange(t, -1, -1)) for t in range(4)]
    np.testing.assert_allclose(-found[:, 0], expected, rtol=1e-5)
