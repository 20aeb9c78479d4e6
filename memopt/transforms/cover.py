"""AdaGrad's sums of squares, bounded by maxima over rows and columns (SM3)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from memopt.matrices import Layout, Matrices
from memopt.reductions import largest_magnitude
from memopt.state.precision import bounded, statistics_dtype
from memopt.transforms.per_matrix import per_matrix
from memopt.trees import NOTHING


class ScaleByMatrixSm3State(NamedTuple):
    """State of `scale_by_matrix_sm3`.

    Attributes:
        rows: for each matrix, the largest sum of squares of each row, with the array's other axes;
            ``MaskedNode`` for a vector.
        cols: for each matrix, that of each column, with the array's other axes; for a vector, its
            sums of squares.
    """

    rows: Any
    cols: Any


def scale_by_matrix_sm3(*, matrices: Matrices = None) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the root of SM3's bound on their sums of squares (SM3-II).

    For each m×n matrix G of the stack, from R = C = 0::

        V = min(R, C) + G²                  the smaller of an entry's row and column
        R, C ← max_cols(V), max_rows(V)
        U = G / √V                          with 0 / 0 = 0

    No entry of V is below the sum of all its squared gradients, AdaGrad's. Vectors, and leaves that
    `matrices` excludes, keep these sums. `optax.scale_by_sm3` adds 1e-8 to V, which shortens the
    steps of entries whose gradients are below 1e-4, and takes a stack as one array of three axes.
    Entries beyond 2⁵⁰ ≈ 1e15 count as that. State: m + n numbers per matrix, in float32 or wider.

    Args:
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. By default every array of two or more axes except norms and biases,
            embeddings included.

    Returns:
        A transformation whose state is a `ScaleByMatrixSm3State`.

    References:
        Anil et al., Memory-Efficient Adaptive Optimization, 2019, https://arxiv.org/abs/1901.11150,
        Algorithm SM3-II.

    Example:
        >>> tx = scale_by_matrix_sm3()
        >>> g = jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> u, state = tx.update(g, tx.init(g))
        >>> u.tolist(), state.rows.tolist(), state.cols.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [9.0, 16.0], [9.0, 16.0])
    """
    return per_matrix(divide_by_cover, ScaleByMatrixSm3State, largest_squares, matrices=matrices)


def largest_squares(layout: Layout, g: Array) -> tuple[Any, Array]:
    """The largest square of each row and each column; a vector has no rows, and all squares."""
    return _maxima(layout, jnp.square(g.astype(statistics_dtype(g))))


def divide_by_cover(layout: Layout, g: Array, rows: Any, cols: Array) -> tuple[Array, Any, Array]:
    """Returns the update of `scale_by_matrix_sm3`, and the new maxima."""
    sums = jnp.expand_dims(cols, layout.rows)
    if layout.is_matrix:
        sums = jnp.minimum(jnp.expand_dims(rows, layout.cols), sums)
    sums = sums + jnp.square(bounded(g))
    least = jnp.finfo(sums.dtype).tiny
    root = jnp.where(sums < least, 1, jnp.sqrt(jnp.maximum(sums, least)))
    u = jnp.where(sums < least, 0, bounded(g) / root)
    return u.astype(g.dtype), *_maxima(layout, sums)


def _maxima(layout: Layout, sums: Array) -> tuple[Any, Array]:
    if not layout.is_matrix:
        return NOTHING, sums
    return largest_magnitude(sums, layout.cols), largest_magnitude(sums, layout.rows)
