"""Factored second moments (Adafactor)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.errors import check_precision
from memopt.matrices import Layout, Matrices
from memopt.reductions import total
from memopt.renamed import keywords
from memopt.state.precision import bounded, bounded_squares, statistics_dtype
from memopt.transforms.per_matrix import per_matrix
from memopt.trees import NOTHING


class ScaleByFactoredMatrixRmsState(NamedTuple):
    """State of `scale_by_factored_matrix_rms`.

    Attributes:
        count: steps taken, int32.
        rows: for each matrix, the mean square over its columns, with the array's other axes;
            ``MaskedNode`` for a vector.
        cols: for each matrix, the mean square over its rows, with the array's other axes; for a
            vector, its full second moment.
    """

    count: Array  # type: ignore[assignment]
    rows: Any
    cols: Any


@keywords(epsilon="eps")
def scale_by_factored_matrix_rms(
    decay_rate: float = 0.8, eps: float = 1e-30, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the square root of a factored second moment.

    For each m×n matrix G of the stack, with β₂ₜ = 1 − t^−decay_rate::

        R ← β₂ₜ R + (1 − β₂ₜ) mean_cols(G² + ε)
        C ← β₂ₜ C + (1 − β₂ₜ) mean_rows(G² + ε)
        U = G / √(R C / mean(R))

    Entries beyond 2⁵⁰ ≈ 1e15 count as that, so that R and C are finite in float32. Vectors, and
    leaves that `matrices` excludes, keep a full second moment. State: m + n numbers
    per matrix, in float32 or wider, whatever the parameter's dtype.

    Args:
        decay_rate: the exponent of the decay's schedule.
        eps: ε, added to the squared gradient.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. By default every array of two or more axes except norms and biases,
            embeddings included.

    Returns:
        A transformation whose state is a `ScaleByFactoredMatrixRmsState`.

    References:
        Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, Algorithms 1, 2 and
        section 7.2.

    Example:
        >>> tx = scale_by_factored_matrix_rms()
        >>> state = tx.init({"w": jnp.zeros((3, 6, 4)), "b": jnp.zeros((4,))})
        >>> state.rows["w"].shape, state.cols["w"].shape, state.rows["b"], state.cols["b"].shape
        ((3, 6), (3, 4), MaskedNode(), (4,))
    """
    check_precision(decay_rate=decay_rate, eps=eps)
    return per_matrix(
        functools.partial(divide_by_factored_rms, eps=eps),
        ScaleByFactoredMatrixRmsState,
        functools.partial(mean_squares, weight=1.0),
        schedules={"decay": functools.partial(second_moment_decay, exponent=decay_rate)},
        matrices=matrices,
    )


def second_moment_decay(count: Array, exponent: float) -> Array:
    """Computes 1 − t^−exponent at step t = count + 1."""
    return 1.0 - optax.safe_increment(count).astype(float) ** -exponent


def divide_by_factored_rms(
    layout: Layout, g: Array, rows: Any, cols: Array, *, decay: Array, eps: float
) -> tuple[Array, Any, Array]:
    """Returns the update of `scale_by_factored_matrix_rms`, and the new moments.

    Args:
        layout: the axes of the gradient.
        g: the gradient.
        rows: the mean squares over columns; `NOTHING` for a vector.
        cols: the mean squares over rows; the second moment of a vector.
        decay: β₂ₜ.
        eps: ε.
    """
    beta = decay.astype(statistics_dtype(g))
    new = mean_squares(layout, g, 1 - beta)
    average = lambda old, new: bounded_squares(beta * old + new + (1 - beta) * eps)
    rows, cols = jax.tree.map(average, (rows, cols), new)
    return _over_root(layout, g, rows, cols), rows, cols


def mean_squares(layout: Layout, g: Array, weight: Any) -> tuple[Any, Array]:
    """The mean squares over columns and over rows, times `weight`; a vector has no rows."""
    g = g.astype(statistics_dtype(g))
    if not layout.is_matrix:
        return NOTHING, weight * jnp.square(g)
    # The weight is inside one of the two sums, because XLA for CPUs would store a shared square.
    rows = weight * jnp.square(g).mean(layout.cols)
    return rows, total(weight * g * g, layout.rows) / layout.shape(g)[-2]


def _over_root(layout: Layout, g: Array, rows: Any, cols: Array) -> Array:
    """Computes G / √(R C / mean(R)) from the inverse roots of the two small factors."""
    u = bounded(g) * jax.lax.rsqrt(jnp.expand_dims(cols, layout.rows))
    if layout.is_matrix:
        rows = jnp.expand_dims(rows, layout.cols)
        share = rows / rows.mean(layout.rows, keepdims=True)
        # Beside a row of 1e30, the share of another may be below the smallest number.
        u = u * jax.lax.rsqrt(jnp.maximum(share, jnp.finfo(share.dtype).tiny))
    return u.astype(g.dtype)
