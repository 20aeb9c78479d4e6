"""A loss for updates that need one, as OASIS's; all others ignore it."""

import collections
import functools

import jax
import jax.numpy as jnp
import optax


def objective(params):
    """A bowl; below each key of a tree all entries, those of other layers too, are coupled."""
    bowl, sums = 0.0, collections.defaultdict(float)
    for path, x in jax.tree.leaves_with_path(params):
        x = x.astype(jnp.float32)
        bowl += 0.5 * jnp.square(x).sum()
        sums[path[:1]] += x.sum()
    return bowl + 1e-3 * sum(jnp.square(x) for x in sums.values())


def with_objective(make):
    """The same function that makes a transformation, whose update is then given the loss."""

    @functools.wraps(make)
    def making(*args, **options):
        tx = optax.with_extra_args_support(make(*args, **options))

        def update(updates, state, params=None, **extra):
            return tx.update(updates, state, params, **{"obj_fn": objective, **extra})

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return making
