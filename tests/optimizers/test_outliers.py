"""A gradient with one entry far larger than all others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt

BEFORE, AFTER = 20, 50


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stack", [(), (2,)], ids=["alone", "stacked"])
def test_steps_after_an_outlier_are_of_the_usual_size_in_flora(stack, dtype):
    """In the paper's rule, which does not clip, they are not."""
    shape = (BEFORE + 1 + AFTER, *stack, 32, 48)
    g = np.random.default_rng(0).normal(size=shape)
    g[(BEFORE, *(0,) * len(stack), 3, 5)] = 7e3
    g = jnp.asarray(g, dtype)

    def growth(**options):
        tx = memopt.flora(1.0, rank=8, **options)
        params = {"w": jnp.zeros(shape[1:], dtype)}

        def step(state, g):
            updates, state = tx.update({"w": g}, state, params)
            first = updates["w"].reshape(-1, *shape[-2:])[0]
            return state, jnp.sqrt(jnp.square(first.astype(jnp.float32)).mean())

        sizes = jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g)[1])(g)
        return sizes[BEFORE + 1 :].mean() / sizes[BEFORE // 2 : BEFORE].mean()

    assert growth() < 1.1
    assert growth(clip_threshold=None) > 5
