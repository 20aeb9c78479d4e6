"""AdaGrad's sums of squares, one for each matrix (AdaGrad-Norm)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_above_zero
from memopt.matrices import Layout, Matrices
from memopt.reductions import total
from memopt.state.precision import bounded
from memopt.transforms.per_matrix import per_matrix


class ScaleByPastNormsState(NamedTuple):
    """State of `scale_by_past_norms`.

    Attributes:
        sums: the sum of each matrix's squared gradients, without `initial`, in the shape of the
            stack; of each column with `per_column`.
    """

    sums: Any


@checked
def scale_by_past_norms(
    initial: float = 1e-2, *, per_column: bool = False, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Divides each matrix's gradient by the root of the sum of its squared norms, AdaGrad-Norm.

    For each matrix G of the stack::

        S ← S + ‖G‖²                        from S = initial
        U = G / √S

    Entries beyond 2⁵⁰ ≈ 1e15 count as that. State: one number per matrix, in float32 or wider, or
    one per column.

    Args:
        initial: the sum before the first step.
        per_column: keep a sum for each column, an output of the matrix; of vectors for each entry.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. A vector has a sum of its own.

    Raises:
        ValueError: if `initial` is not above 0.

    References:
        Ward et al., AdaGrad Stepsizes: Sharp Convergence over Nonconvex Landscapes, 2018,
        https://arxiv.org/abs/1806.01811, Algorithm 1.

    Example:
        >>> tx = scale_by_past_norms(11.0)
        >>> g = jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> u, state = tx.update(g, tx.init(g))
        >>> print(u[0, 0], state.sums)                              # 3 / √(11 + 9 + 16)
        0.5 25.0
    """
    check_above_zero("initial", initial)
    axes = lambda layout: layout.rows if per_column else layout.core
    squares = lambda layout, g: total(jnp.square(bounded(g)), axes(layout))

    def rule(layout: Layout, g: Array, sums: Array) -> tuple[Array, Array]:
        sums = sums + squares(layout, g)
        root = jnp.sqrt(jnp.expand_dims(sums + initial, axes(layout)))
        return (bounded(g) / root).astype(g.dtype), sums

    return per_matrix(rule, ScaleByPastNormsState, squares, matrices=matrices)
