"""Statistics of layers for updates that need them, as MKOR's, where gradients are drawn.

All other updates ignore them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from memopt.matrices import map_matrices
from memopt.state.precision import to_float32
from memopt.transforms import LayerStatistics


def statistics_of(gradients: Any) -> Any:
    """Of each hidden matrix, sums over columns and over rows in place of inputs and gradients."""

    def one(layout: Any, g: Any) -> LayerStatistics | None:
        if not layout.is_matrix:
            return None
        g = to_float32(layout.to_matrices(g))
        return LayerStatistics(g.sum(-1), g.sum(-2), jnp.ones(g.shape[:-2], g.dtype))

    return map_matrices(one, gradients)


def with_statistics(
    make: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The same function that makes a transformation, whose update is then given statistics."""

    @functools.wraps(make)
    def making(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        tx = optax.with_extra_args_support(make(*args, **options))

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            extra = {"value": 1.0, "statistics": statistics_of(updates), **extra}
            return tx.update(updates, state, params, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return making
