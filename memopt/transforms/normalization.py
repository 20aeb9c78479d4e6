"""Normalises each matrix's updates by their rows and columns."""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_at_least, check_choice, check_static
from memopt.matrices import Layout, Matrices
from memopt.reductions import total
from memopt.state.precision import (
    average,
    bounded,
    bounded_squares,
    statistics_dtype,
    to_float32,
)
from memopt.transforms.grouped import group_means, spread
from memopt.transforms.per_matrix import per_matrix
from memopt.trees import NOTHING


@checked
def normalize_neurons(
    axis: int = -2, norm: str = "rms", eps: float = 1e-8, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Divides the update of each neuron's weights by its norm.

    For each m×n matrix of the stack and each of its n outputs g, a vector of m inputs::

        u = g / max(‖g‖, ε)

    The scale of a neuron's gradient has no effect, and a gradient of zeros stays zero. A vector is
    the weights of one neuron. Entries beyond 2⁵⁰ ≈ 1e15 count as that. No state.

    Args:
        axis: the axis of ``(*stack, m, n)`` over which norms are taken: -2, the inputs of each
            output, or -1, the outputs of each input.
        norm: "rms", the root mean square, after which entries are about 1; or "l2", the root of the
            sum of squares.
        eps: ε, the smallest norm to divide by.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. Rows are inputs, see `memopt.out_in`.

    Raises:
        ValueError: if `axis` or `norm` is unknown, or `eps` is negative.

    References:
        Glentis et al., A Minimalist Optimizer Design for LLM Pretraining, 2025,
        https://arxiv.org/abs/2506.16659, section 3.

    Example:
        >>> tx = normalize_neurons(norm="l2")
        >>> g = jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])
        >>> print(tx.update(g, tx.init(g))[0])
        [[0.6 0.  1. ]
         [0.8 0.  0. ]]
    """
    rule = functools.partial(divide_by_norms, **_checked(axis, norm, eps))
    return per_matrix(rule, matrices=matrices)


@checked
def sinkhorn(
    iterations: int = 5,
    axis: int = -2,
    norm: str = "rms",
    eps: float = 1e-8,
    *,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Normalises the rows and the columns of each matrix in turns, until both have one norm.

    For each matrix G of the stack, from X = G::

        x ← x / max(‖x‖, ε)          for each row x of X        `iterations` times
        x ← x / max(‖x‖, ε)          for each column x of X

    The limit is D G E, with diagonal D and E, whose rows and columns have norm 1; so scaling any
    row or column of G has no effect on it. A vector is normalised once. Entries beyond 2⁵⁰ ≈ 1e15
    count as that. No state.

    Args:
        iterations: the number of iterations.
        axis: the axis of ``(*stack, m, n)`` over which the last norms are taken, which are exact:
            -2, as above, or -1.
        norm: "rms", the root mean square, or "l2", the root of the sum of squares. They differ by a
            factor, the root of the length of the last axis.
        eps: ε, the smallest norm to divide by.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    Raises:
        ValueError: if `iterations` is below 1, `axis` or `norm` is unknown, or `eps` is negative.

    References:
        Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training, 2025,
        https://arxiv.org/abs/2502.06742, Algorithm 3.

    Example:
        >>> tx = sinkhorn()
        >>> g = jnp.array([[1.0, 100.0], [2.0, -200.0]])
        >>> print(tx.update(g, tx.init(g))[0].round(3))
        [[ 1.  1.]
         [ 1. -1.]]
    """
    check_static("iterations", iterations)
    check_at_least("iterations", iterations, 1)
    options = _checked(axis, norm, eps)
    rule = functools.partial(divide_in_turns, iterations=iterations, **options)
    return per_matrix(rule, matrices=matrices)


def _checked(axis: int, norm: str, eps: float) -> dict[str, Any]:
    check_choice("axis", axis, (-2, -1))
    check_choice("norm", norm, ("rms", "l2"))
    check_at_least("eps", eps, 0)
    return {"axis": axis, "norm": norm, "eps": eps}


def divide_by_norms(layout: Layout, u: Array, *, axis: int, norm: str, eps: float) -> Array:
    """Computes the update of `normalize_neurons`."""
    axes = (layout.rows or layout.cols, layout.cols)[axis]  # a vector is one neuron
    norms = _norms(u, axes, norm)
    return (bounded(u) / jnp.maximum(norms, eps)).astype(u.dtype)


def divide_in_turns(
    layout: Layout, u: Array, *, iterations: int, axis: int, norm: str, eps: float
) -> Array:
    """Computes the update of `sinkhorn`, from factors of the rows and of the columns."""
    if not layout.is_matrix:
        return divide_by_norms(layout, u, axis=axis, norm=norm, eps=eps)
    sides = (layout.rows, layout.cols)
    x = bounded(u)
    scales: list[Any] = [1.0, 1.0]
    for _ in range(iterations):
        for i in (1 + axis, axis):
            norms = _norms(x * scales[0] * scales[1], sides[i], norm)
            # Zeros stay zeros, and must not get ever larger factors.
            scales[i] = scales[i] / jnp.where(norms > 0, jnp.maximum(norms, eps), 1)
    return (x * scales[0] * scales[1]).astype(u.dtype)


def _norms(x: Array, axes: tuple[int, ...], norm: str) -> Array:
    """The norms over the given axes, which are kept with length one."""
    size = math.prod(x.shape[a] for a in axes)
    squares = total(jnp.square(x.astype(statistics_dtype(x))), axes, keepdims=True)
    return jnp.sqrt(bounded_squares(squares, size) / (size if norm == "rms" else 1))


class ScaleByRowsAndColumnsState(NamedTuple):
    """State of `scale_by_rows_and_columns`.

    Attributes:
        rows: for each matrix, the average factor of each row, with the array's other axes;
            ``MaskedNode`` for a vector.
        cols: that of each column; for a vector, its average squares.
    """

    rows: Any
    cols: Any


@checked
def scale_by_rows_and_columns(
    decay: float = 0.9, iterations: int = 5, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Divides each matrix by the roots of two factors, one for its rows and one for its columns.

    For each m×n matrix G of the stack, from q = 1, and from R = C = 0 at the first step::

        s = (G²)ᵀ q / ‖q‖²                          `iterations` times
        q = G² s / ‖s‖²
        R ← β R + (1 − β) q
        C ← β C + (1 − β) s
        U = G / √(R Cᵀ)                             with 0 / 0 = 0

    q sᵀ approaches the rank-one matrix that is closest to G², whose factors are positive. The
    moments are not corrected for their start, as published, so the first updates are larger. The
    same is done for a vector with its squares. Entries beyond 2⁵⁰ ≈ 1e15 count as that. State:
    m + n numbers per matrix.

    Args:
        decay: β, the decay of the averages.
        iterations: the number of iterations towards q and s.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    Returns:
        A transformation whose state is a `ScaleByRowsAndColumnsState`.

    Raises:
        ValueError: if `iterations` is below 1.

    References:
        Gong et al., Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation,
        2025, https://arxiv.org/abs/2502.07752, Algorithm 1.

    Example:
        >>> tx = scale_by_rows_and_columns(decay=0.0)
        >>> g = jnp.outer(jnp.array([1.0, 10.0]), jnp.array([2.0, -3.0, 0.0]))
        >>> print(tx.update(g, tx.init(g))[0])
        [[ 1. -1.  0.]
         [ 1. -1.  0.]]
    """
    check_static("iterations", iterations)
    check_at_least("iterations", iterations, 1)
    return per_matrix(
        functools.partial(divide_by_factors, decay=decay, iterations=iterations),
        ScaleByRowsAndColumnsState,
        functools.partial(rank_one_factors, iterations=1),
        matrices=matrices,
    )


def divide_by_factors(
    layout: Layout, g: Array, rows: Any, cols: Array, *, decay: float, iterations: int
) -> tuple[Array, Any, Array]:
    """Returns the update of `scale_by_rows_and_columns`, and the new averages."""
    q, s = rank_one_factors(layout, g, iterations)
    cols = average(decay, cols, s)
    u = bounded(g) * _inverse_root(jnp.expand_dims(cols, layout.rows))
    if layout.is_matrix:
        rows = average(decay, rows, q)
        u = u * _inverse_root(jnp.expand_dims(rows, layout.cols))
    return u.astype(g.dtype), rows, cols


def rank_one_factors(layout: Layout, g: Array, iterations: int) -> tuple[Any, Array]:
    """The factors q of the rows and s of the columns; a vector has no rows, and its squares."""
    squares = jnp.square(bounded(g))
    if not layout.is_matrix:
        return NOTHING, squares
    q = jnp.ones_like(squares, shape=_without(squares.shape, layout.cols))
    for _ in range(iterations):
        s = total(squares * _projecting(q, layout.rows), layout.rows, keepdims=True)
        q = total(squares * _projecting(s, layout.cols), layout.cols, keepdims=True)
    return q.squeeze(layout.cols), s.squeeze(layout.rows)


def _projecting(x: Array, axes: tuple[int, ...]) -> Array:
    """Computes x / ‖x‖², which does not overflow if ‖x‖² does; 0 for x = 0."""
    largest = x.max(axes, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    square = jnp.square(x).sum(axes, keepdims=True)
    return x / jnp.where(largest > 0, square * largest, 1)


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with the given axes of length one."""
    return tuple(1 if i in axes else n for i, n in enumerate(shape))


def _inverse_root(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).tiny)), 0)


class ScaleByNeuronRmsState(NamedTuple):
    """State of `scale_by_neuron_rms`.

    Attributes:
        nu: for each matrix, the average square of each output's update, with the array's other
            axes.
    """

    nu: Any


@checked
def scale_by_neuron_rms(
    decay: float = 0.95,
    eps: float = 1e-8,
    consistent_rms: float | None = None,
    *,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides the update of each neuron by the root of its average square, and keeps the norm.

    For each m×n matrix O of the stack, with one number V for each output, from V = 0::

        V ← β V + (1 − β) mean_inputs(O²)
        P = O / (√V + ε)
        U = P · ‖O‖ / ‖P‖

    P is that of `memopt.scale_by_grouped_rms` for columns. V needs no correction for its start,
    since a common factor cancels. An update of zeros stays zero. A vector has one number for each
    entry. Entries beyond 2⁵⁰ ≈ 1e15 count as that. State: n numbers per matrix.

    Args:
        decay: β, the decay of the average.
        eps: ε, added to its root.
        consistent_rms: U = P · consistent_rms / RMS(P) instead, whatever the size of O.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. Rows are inputs, see `memopt.out_in`.

    Returns:
        A transformation whose state is a `ScaleByNeuronRmsState`.

    Raises:
        ValueError: if `eps` or `consistent_rms` is negative.

    References:
        Li et al., NorMuon, 2025, https://arxiv.org/abs/2510.05491, Algorithm 1.

    Example:
        >>> tx = scale_by_neuron_rms(consistent_rms=1.0)
        >>> g = jnp.array([[3.0, 0.1], [3.0, 0.1]])
        >>> print(tx.update(g, tx.init(g))[0].round(3))
        [[1. 1.]
         [1. 1.]]
    """
    check_at_least("eps", eps, 0)
    check_at_least("consistent_rms", consistent_rms, 0)
    options: dict[str, Any] = {"eps": eps, "consistent_rms": consistent_rms}
    return per_matrix(
        functools.partial(divide_by_neuron_rms, decay=decay, **options),
        ScaleByNeuronRmsState,
        lambda layout, p: group_means(layout, to_float32(p), "column"),
        matrices=matrices,
    )


def divide_by_neuron_rms(
    layout: Layout, u: Array, nu: Array, *, decay: float, eps: float, consistent_rms: float | None
) -> tuple[Array, Array]:
    """Returns the update of `scale_by_neuron_rms`, and the new average.

    The norms of O and P follow from those of the neurons, so O is read only once more.
    """
    squares = group_means(layout, jnp.square(bounded(u)), "column")
    nu = average(decay, nu, squares)
    factors = spread(layout, 1 / (jnp.sqrt(nu) + eps), "column")
    squares = spread(layout, squares, "column")
    size = lambda squares: jnp.sqrt(squares.mean(layout.core, keepdims=True))
    before, after = size(squares), size(squares * jnp.square(factors))
    wanted = before if consistent_rms is None else consistent_rms
    factors = factors * jnp.where(after > 0, wanted / jnp.where(after > 0, after, 1), 0)
    return (bounded(u) * factors).astype(u.dtype), nu
