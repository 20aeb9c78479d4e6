"""Limits the growth of each matrix's update norm."""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.matrices import Layout, Matrices
from memopt.reductions import total
from memopt.renamed import keywords
from memopt.state.precision import bounded, bounded_squares, statistics_dtype
from memopt.transforms.per_matrix import per_matrix

_TINY = float(jnp.finfo(jnp.float32).tiny)
_VANISHED = 1e-3


class GrowthLimiter(NamedTuple):
    """The rule of `limit_norm_growth`, for callers that know the norm without the array.

    Attributes:
        growth_limit: the largest ratio of a norm to the previous one, γ.
        as_released: store every norm, including zero, as the authors' code does.
    """

    growth_limit: float = 1.01
    as_released: bool = False

    def __call__(self, norm: Array, previous: Array) -> tuple[Array, Array]:
        """Returns the factor that limits an update of this norm, and the norm to store.

        Args:
            norm: the norm of the update.
            previous: the norm stored by the previous call; 0 for none.
        """
        excess = jnp.maximum(norm / (previous + 1e-8), self.growth_limit) / self.growth_limit
        factor = jnp.where(previous > 0, 1.0 / excess, 1.0)
        limited = norm * factor
        if self.as_released:
            return factor, jnp.maximum(limited, _TINY)
        # A nearly vanishing update does not predict the size of the next one.
        return factor, jnp.where(limited > _VANISHED * previous, limited, previous)


setattr(GrowthLimiter, "__new__", keywords(limit="growth_limit")(GrowthLimiter.__new__))  # noqa: B010


class LimitNormGrowthState(NamedTuple):
    """State of `limit_norm_growth`.

    Attributes:
        norm: the norm of each matrix's last update, in the shape of the stack.
    """

    norm: Any


@keywords(limit="growth_limit")
@checked
def limit_norm_growth(
    growth_limit: float = 1.01, *, matrices: Matrices = None, as_released: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Limits the growth of each matrix's update norm to a factor of `growth_limit` per step.

    With γ = growth_limit and ‖U‖_before the limited norm of the previous step::

        U ← U / (max(‖U‖ / (‖U‖_before + 1e-8), γ) / γ)

    The first step is not limited. An update smaller than a thousandth of the previous one, for
    example of an expert without tokens, is not limited and its norm is not stored: the published
    rule would keep the matrix at that size permanently. Entries beyond 2⁵⁰ ≈ 1e15 count as that.
    Place it before the learning rate: a warm-up grows faster than γ. State: one number per matrix.

    Args:
        growth_limit: the largest ratio of two successive norms, γ.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.
        as_released: store every norm, as the authors' code does, to reproduce its runs.

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
    """Scales each matrix down to its largest allowed norm, and returns the norms to store.

    Args:
        layout: the axes of the update.
        u: the update.
        previous: the norms stored by the previous step, in the shape of the stack.
        limiter: the rule.
    """
    factor, norm = limiter(matrix_norm(layout, u), previous)
    return (bounded(u) * jnp.expand_dims(factor, layout.core)).astype(u.dtype), norm


def matrix_norm(layout: Layout, x: Array) -> Array:
    """The Frobenius norm of each matrix, in the shape of the stack."""
    squares = total(jnp.square(x.astype(statistics_dtype(x))), layout.core)
    return jnp.sqrt(bounded_squares(squares, math.prod(x.shape[a] for a in layout.core)))
