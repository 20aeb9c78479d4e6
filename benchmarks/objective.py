"""A loss for updates that need one, as OASIS's, where gradients are drawn.

All other updates ignore it.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def objective(params: Any) -> jax.Array:
    """A bowl; below each key of a tree all entries, those of other layers too, are coupled."""
    bowl = jnp.zeros(())
    sums: dict[Any, jax.Array] = collections.defaultdict(lambda: jnp.zeros(()))
    for path, x in jax.tree.leaves_with_path(params):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        bowl += 0.5 * jnp.square(x).sum()
        sums[path[:1]] += x.sum()
    return sum((1e-3 * jnp.square(x) for x in sums.values()), bowl)


def with_objective(
    make: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The same function that makes a transformation, whose update is then given a loss.

    It is the bowl, tilted so that its gradient is the one that is given.
    """

    @functools.wraps(make)
    def making(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        tx = optax.with_extra_args_support(make(*args, **options))

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            tilt = jax.tree.map(jnp.subtract, updates, jax.grad(objective)(params))

            def tilted(params: Any) -> jax.Array:
                heights = jax.tree.map(lambda t, p: (t * p).sum(), tilt, params)
                return sum(jax.tree.leaves(heights), objective(params))

            return tx.update(updates, state, params, **{"obj_fn": tilted, **extra})

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return making
