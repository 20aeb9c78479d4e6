"""Statistics of layers where there are no layers, for optimizers that must be given them."""

import jax.numpy as jnp
import optax

from memopt.matrices import map_matrices
from memopt.state.precision import to_float32
from memopt.transforms import LayerStatistics


def statistics_of(gradients, matrices=None):
    """Of each hidden matrix, sums over columns and over rows in place of inputs and gradients."""

    def one(layout, g):
        if not layout.is_matrix:
            return None
        g = layout.to_matrices(to_float32(g))
        return LayerStatistics(g.sum(-1), g.sum(-2), jnp.ones(g.shape[:-2], g.dtype))

    return map_matrices(one, gradients, matrices=matrices)


def with_statistics(tx, matrices=None):
    """Gives a transformation such statistics at each step, and a loss of 1."""
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        seen = statistics_of(updates, matrices)
        return tx.update(updates, state, params, **{"value": 1.0, "statistics": seen, **extra})

    return optax.GradientTransformationExtraArgs(tx.init, update)
