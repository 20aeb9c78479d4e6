"""When a transformation stops to be applied."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt


def applied(losses, **options):
    """At which steps."""
    tx = memopt.while_loss_falls(optax.scale(2.0), **options)

    def step(state, loss):
        updates, state = tx.update(jnp.ones(1), state, value=loss)
        return state, updates[0] == 2

    losses = jnp.asarray(losses, jnp.float32)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.ones(1)), losses)[1])())


STEPS = np.arange(2000)


def test_it_is_applied_while_the_loss_falls_and_then_no_more():
    noise = 0.1 * np.random.default_rng(0).normal(size=2000)
    falls = 1 + 5 * np.exp(-STEPS / 200) + noise
    found = applied(falls)
    assert found[:300].all()  # to exp(−1.5) = 0.22 of the slope at the start
    assert not found[1200:].any()
    assert (np.diff(found.astype(int)) != 0).sum() == 1
    assert applied(10 - STEPS / 200 + noise).all()  # as fast as ever
    again = np.where(STEPS < 1500, falls, falls - (STEPS - 1500) / 100)
    assert not applied(again)[1200:].any()


def test_a_loss_that_never_falls_stops_it_after_the_first_averages():
    assert applied(np.ones(200)).tolist() == [True] * 100 + [False] * 100
    assert applied(STEPS[:200]).tolist() == [True] * 100 + [False] * 100


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_not_counted(value):
    losses = 10 - STEPS[:300] / 100
    losses[50] = value
    assert applied(losses).all()


def test_what_it_holds_rests_with_it():
    """MKOR-H becomes momentum; factors stay as they are."""
    tx = memopt.while_loss_falls(memopt.scale_by_kronecker_inverses(refresh_every=1), decay=0.5)
    g = {"w": jnp.ones((4, 6)).at[0].set(2.0)}
    seen = {"w": memopt.LayerStatistics(jnp.arange(4.0), jnp.arange(6.0), jnp.array(1.0))}
    state = tx.init(g)
    for _ in range(4):
        updates, state = tx.update(g, state, g, value=1.0, statistics=seen)
        assert jnp.abs(updates["w"] - g["w"]).max() > 0.1
    updates, after = tx.update(g, state, g, value=1.0, statistics=seen)
    jax.tree.map(np.testing.assert_array_equal, (updates, after.inner), (g, state.inner))
