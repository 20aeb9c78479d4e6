"""Weight decay as in released code."""

import jax.numpy as jnp
import numpy as np
import optax

import memopt
from memopt.transforms.decay import as_schedule


def test_a_mask_does_not_change_how_the_other_parameters_are_read():
    """The heads of a query are known from the output kernel, masked or not."""
    draw = np.random.default_rng(0)
    params = {
        "q": jnp.asarray(draw.normal(size=(64, 4, 16)), jnp.float32),
        "o": jnp.asarray(draw.normal(size=(4, 16, 64)), jnp.float32),
    }
    options = {"weight_decay": 1.0, "as_released": True}
    some = memopt.adafactor(1e-2, weight_decay_mask={"q": True, "o": False}, **options)
    every = memopt.adafactor(1e-2, **options)
    updates = [tx.update(params, tx.init(params), params)[0] for tx in (some, every)]
    np.testing.assert_array_equal(updates[0]["q"], updates[1]["q"])
    assert not np.array_equal(updates[0]["o"], updates[1]["o"])


def test_a_number_is_the_schedule_that_is_always_this_number():
    assert as_schedule(0.5)(7) == 0.5
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    assert as_schedule(schedule) is schedule
