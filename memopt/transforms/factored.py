"""Factored second moments (Adafactor, CAME)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_above_zero, check_unused
from memopt.matrices import Layout, Matrices
from memopt.reductions import total
from memopt.renamed import keywords
from memopt.state.precision import (
    average,
    bounded,
    bounded_squares,
    statistics_dtype,
    to_float32,
)
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


class ScaleByConfidenceState(NamedTuple):
    """State of `scale_by_confidence`.

    Attributes:
        mu: M, the average of updates.
        rows: for each matrix, the mean of (U − M)² over its columns, with the array's other axes;
            ``MaskedNode`` for a vector.
        cols: for each matrix, the mean over its rows.
    """

    mu: Any
    rows: Any
    cols: Any


@keywords(epsilon="eps")
@checked
def scale_by_factored_matrix_rms(
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    *,
    b2: float | None = None,
    matrices: Matrices = None,
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
        b2: a constant decay in place of the schedule, without a correction of the start.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. By default every array of two or more axes except norms and biases,
            embeddings included.

    Returns:
        A transformation whose state is a `ScaleByFactoredMatrixRmsState`.

    Raises:
        ValueError: if `eps` is not above 0, as a gradient of zeros is divided by its root, or
            `decay_rate` is given with `b2`.

    References:
        Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, Algorithms 1, 2 and
        section 7.2.

    Example:
        >>> tx = scale_by_factored_matrix_rms()
        >>> state = tx.init({"w": jnp.zeros((3, 6, 4)), "b": jnp.zeros((4,))})
        >>> state.rows["w"].shape, state.cols["w"].shape, state.rows["b"], state.cols["b"].shape
        ((3, 6), (3, 4), MaskedNode(), (4,))
    """
    check_above_zero("eps", eps)
    decay = functools.partial(second_moment_decay, exponent=decay_rate)
    if b2 is not None:
        check_unused(scale_by_factored_matrix_rms, "b2 is the decay", decay_rate=decay_rate)
        decay = optax.constant_schedule(b2)
    return per_matrix(
        functools.partial(divide_by_factored_rms, eps=eps),
        ScaleByFactoredMatrixRmsState,
        functools.partial(mean_squares, weight=1.0),
        schedules={"decay": decay},
        matrices=matrices,
    )


@checked
def scale_by_confidence(
    b1: float = 0.9, b3: float = 0.9999, eps: float = 1e-16, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Divides the average of updates by how far updates are from it, factored.

    For each m×n matrix U of the stack::

        M ← β₁ M + (1 − β₁) U
        r ← β₃ r + (1 − β₃) mean_cols((U − M)² + ε)
        c ← β₃ c + (1 − β₃) mean_rows((U − M)² + ε)
        U = M / √(r c / mean(r))

    The averages are not corrected for their start, so that the first steps of β₃ = 0.9999 are a
    hundred times as long as later ones. Of vectors, and of leaves that `matrices` excludes, U = M.
    State: mn + m + n numbers per matrix.

    Args:
        b1: β₁, the decay of the average update.
        b3: β₃, the decay of its squared distances.
        eps: ε, added to them.
        matrices: as in `scale_by_factored_matrix_rms`.

    Returns:
        A transformation whose state is a `ScaleByConfidenceState`.

    Raises:
        ValueError: if `eps` is not above 0.

    References:
        Luo et al., CAME: Confidence-guided Adaptive Memory Efficient Optimization, 2023,
        https://arxiv.org/abs/2307.02047, Algorithm 2.

    Example:
        >>> state = scale_by_confidence().init({"w": jnp.zeros((3, 6, 4)), "b": jnp.zeros(4)})
        >>> state.mu["w"].shape, state.rows["w"].shape, state.cols["w"].shape, state.cols["b"]
        ((3, 6, 4), (3, 6), (3, 4), MaskedNode())
    """
    check_above_zero("eps", eps)

    def rule(layout: Layout, u: Array, mu: Array, rows: Any, cols: Any) -> Any:
        mu = average(b1, mu, bounded(u))
        if not layout.is_matrix:
            return mu.astype(u.dtype), mu, rows, cols
        rows, cols = average_squares(layout, bounded(u) - mu, rows, cols, decay=b3, eps=eps)
        return _over_root(layout, mu, rows, cols).astype(u.dtype), mu, rows, cols

    def like(layout: Layout, p: Array) -> Any:
        factors = mean_squares(layout, p, 1.0) if layout.is_matrix else (NOTHING, NOTHING)
        return (to_float32(p), *factors)

    return per_matrix(rule, ScaleByConfidenceState, like, matrices=matrices)


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
    rows, cols = average_squares(layout, g, rows, cols, decay=decay, eps=eps)
    return _over_root(layout, g, rows, cols), rows, cols


def average_squares(
    layout: Layout, g: Array, rows: Any, cols: Array, *, decay: Any, eps: float
) -> tuple[Any, Array]:
    """Averages the mean squares of a gradient; arguments as of `divide_by_factored_rms`."""
    beta = jnp.asarray(decay, statistics_dtype(g))
    new = mean_squares(layout, g, 1 - beta)
    add = lambda old, new: bounded_squares(beta * old + new + (1 - beta) * eps)
    averaged: tuple[Any, Array] = jax.tree.map(add, (rows, cols), new)
    return averaged


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
