"""Extra arguments for updates that need them, where gradients are drawn: a loss, and statistics.

OASIS evaluates the loss, and MKOR needs statistics of each layer. All other updates ignore them.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memopt.matrices import map_matrices
from memopt.state.precision import to_float32
from memopt.transforms import LayerStatistics


def with_extra_arguments(
    make: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The same function that makes a transformation, whose update is then given what it may need.

    The loss is a bowl, tilted so that its gradient is the one that is given.
    """

    @functools.wraps(make)
    def making(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        tx = optax.with_extra_args_support(make(*args, **options))

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            def tilted(point: Any) -> jax.Array:
                tilt = jax.tree.map(jnp.subtract, updates, jax.grad(bowl)(params))
                heights = jax.tree.map(lambda t, p: (t * p).sum(), tilt, point)
                return sum(jax.tree.leaves(heights), bowl(point))

            given = {"value": 1.0, "obj_fn": tilted, "statistics": statistics_of(updates)}
            return tx.update(updates, state, params, **given | extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return making


def bowl(params: Any) -> jax.Array:
    """A loss in which, below each key of a tree, all entries are coupled, across layers too."""
    total = jnp.zeros(())
    sums: dict[Any, jax.Array] = collections.defaultdict(lambda: jnp.zeros(()))
    for path, x in jax.tree.leaves_with_path(params):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        total += 0.5 * jnp.square(x).sum()
        sums[path[:1]] += x.sum()
    return sum((1e-3 * jnp.square(x) for x in sums.values()), total)


def statistics_of(gradients: Any) -> Any:
    """Of each hidden matrix, sums over columns and over rows in place of inputs and gradients."""

    def one(layout: Any, g: Any) -> LayerStatistics | None:
        if not layout.is_matrix:
            return None
        g = to_float32(layout.to_matrices(g))
        return LayerStatistics(g.sum(-1), g.sum(-2), jnp.ones(g.shape[:-2], g.dtype))

    return map_matrices(one, gradients)
