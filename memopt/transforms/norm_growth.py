"""Limits on the growth of each matrix's update."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from memopt.matrices import Layout, Matrices
from memopt.reductions import total
from memopt.renamed import keywords
from memopt.state.precision import statistics_dtype
from memopt.transforms.per_matrix import per_matrix

_TINY = float(jnp.finfo(jnp.float32).tiny)
_VANISHED = 1e-3


class GrowthLimiter(NamedTuple):
    """The rule of `limit_norm_growth`, for whoever knows a norm without the array.

    Attributes:
      growth_limit: the largest ratio of a norm to the one before, γ.
      as_released: store every norm, zero too, as the authors' code does.
    """

    growth_limit: float = 1.01
    as_released: bool = False

    def __call__(self, norm: Array, previous: Array) -> tuple[Array, Array]:
        """The factor that limits an update of this norm, and the norm to remember.

        Args:
          norm: of the update.
          previous: what the call before remembered; 0 stands for none.
        """
        excess = jnp.maximum(norm / (previous + 1e-8), self.growth_limit) / self.growth_limit
        factor = jnp.where(previous > 0, 1.0 / excess, 1.0)
        limited = norm * factor
        if self.as_released:
            return factor, jnp.maximum(limited, _TINY)
        # An update that all but vanishes says nothing of the next one's size.
        return factor, jnp.where(limited > _VANISHED * previous, limited, previous)


class LimitNormGrowthState(NamedTuple):
    """State of `limit_norm_growth`.

    Attributes:
      norm: the norm of each matrix's last update, with the axes of its stack.
    """

    norm: Any


@keywords(limit="growth_limit")
def limit_norm_growth(
    growth_limit: float = 1.01, *, matrices: Matrices = None, as_released: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Lets the norm of each matrix's update grow by at most a factor of `growth_limit` a step.

    With γ = growth_limit and ‖U‖ the norm that was let through the step before::

        U ← U / (max(‖U‖ / (‖U‖_before + 1e-8), γ) / γ)

    The first step passes as it is. An update smaller than a thousandth of the one before, an
    expert without tokens, say, is let through but not remembered: the published rule would
    hold the matrix at that size for ever. State: one number a matrix.

    Args:
      growth_limit: the largest ratio of two successive norms, γ.
      matrices: which leaves are matrices, and of which axes; see `memopt.matrices`.
      as_released: remember every norm, as the authors' code does; for replaying its runs.

    References:
      Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, section 4.2; Chen et al., Fira,
      2024, https://arxiv.org/abs/2410.01623.

    Example:
      >>> tx = limit_norm_growth(2.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in [1.0, 5.0, 0.0, 5.0]:
      ...     u, state = tx.update(jnp.array([g]), state)
      ...     print(round(float(u[0]), 4))
      1.0
      2.0
      0.0
      4.0
    """
    return per_matrix(
        functools.partial(limit_growth, limiter=GrowthLimiter(growth_limit, as_released)),
        LimitNormGrowthState,
        matrix_norm,
        matrices=matrices,
    )


def limit_growth(
    layout: Layout, u: Array, previous: Array, *, limiter: GrowthLimiter
) -> tuple[Array, Array]:
    """Scales each matrix down to the largest norm it may have, and returns the norms to remember.

    Args:
      layout: of the update.
      u: the update.
      previous: the norms remembered the step before, with the axes of the stack.
      limiter: what limits.
    """
    factor, norm = limiter(matrix_norm(layout, u), previous)
    return (u * jnp.expand_dims(factor, layout.core)).astype(u.dtype), norm


def matrix_norm(layout: Layout, x: Array) -> Array:
    """The Frobenius norm of each matrix, with the axes of the stack."""
    return jnp.sqrt(total(jnp.square(x.astype(statistics_dtype(x))), layout.core))
