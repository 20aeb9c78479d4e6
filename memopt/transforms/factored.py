"""Factored second moments (Adafactor)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.reductions import total
from memopt.state.precision import statistics_dtype, zeros_of
from memopt.trees import NOTHING


class ScaleByFactoredRmsState(NamedTuple):
    """State of `scale_by_factored_rms`.

    Attributes:
      count: steps taken, int32.
      rows: of each matrix, the mean square over its columns: the array's axes less those;
        ``MaskedNode`` for a vector.
      cols: of each matrix, the mean square over its rows: the array's axes less those; of each
        vector, the second moment itself.
    """

    count: Array  # type: ignore[assignment]
    rows: Any
    cols: Any


def scale_by_factored_rms(
    decay_rate: float = 0.8,
    epsilon: float = 1e-30,
    *,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the root of a factored second moment.

    For each m×n matrix G of the stack, with β₂ₜ = 1 − t^−decay_rate::

        R ← β₂ₜ R + (1 − β₂ₜ) mean_cols(G² + ε)
        C ← β₂ₜ C + (1 − β₂ₜ) mean_rows(G² + ε)
        U = G / √(R C / mean(R))

    Vectors (and what `matrices` says is no matrix) keep a full second moment. State: m + n
    numbers a matrix, float32 or wider whatever the parameter's dtype.

    Args:
      decay_rate: the exponent of the decay's schedule.
      epsilon: added to the squared gradient.
      matrices: which leaves are matrices, and of which axes; see `memopt.matrices`. By default
        every array of two or more axes that is no norm or bias, embeddings included.

    Returns:
      A transformation whose state is a `ScaleByFactoredRmsState`.

    References:
      Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, Algorithms 1, 2 and
      section 7.2.

    Example:
      >>> tx = scale_by_factored_rms()
      >>> state = tx.init({"w": jnp.zeros((3, 6, 4)), "b": jnp.zeros((4,))})
      >>> state.rows["w"].shape, state.cols["w"].shape, state.rows["b"], state.cols["b"].shape
      ((3, 6), (3, 4), MaskedNode(), (4,))
    """

    def init(params: Any) -> ScaleByFactoredRmsState:
        start = lambda layout, p: zeros_of(lambda p: _mean_squares(layout, p, 1.0), p)
        rows, cols = map_matrices(start, params, matrices=matrices, default=every_matrix, outputs=2)
        return ScaleByFactoredRmsState(jnp.zeros((), jnp.int32), rows, cols)

    def update(updates: Any, state: ScaleByFactoredRmsState, params: Any = None, **_: Any) -> Any:
        count = optax.safe_increment(state.count)
        decay = 1.0 - count.astype(float) ** -decay_rate

        def step(layout: Layout, g: Array, *moments: Any) -> tuple[Array, Any, Array]:
            beta = decay.astype(statistics_dtype(g))
            new = _mean_squares(layout, g, 1 - beta)
            average = lambda old, new: beta * old + new + (1 - beta) * epsilon
            rows, cols = jax.tree.map(average, moments, new)
            return _over_root(layout, g, rows, cols), rows, cols

        updates, rows, cols = map_matrices(
            step,
            *(updates, state.rows, state.cols),
            matrices=matrices,
            default=every_matrix,
            outputs=3,
        )
        return updates, ScaleByFactoredRmsState(count, rows, cols)

    return optax.GradientTransformationExtraArgs(init, update)


def _mean_squares(layout: Layout, g: Array, weight: Any) -> tuple[Any, Array]:
    """The mean square over columns and over rows, times `weight`; a vector has no rows."""
    g = g.astype(statistics_dtype(g))
    if not layout.is_matrix:
        return NOTHING, weight * jnp.square(g)
    # The weight stands inside one of the two sums: XLA for CPUs would store a square they share.
    rows = weight * jnp.square(g).mean(layout.cols)
    return rows, total(weight * g * g, layout.rows) / layout.shape(g)[-2]


def _over_root(layout: Layout, g: Array, rows: Any, cols: Array) -> Array:
    """G / √(R C / mean(R)), from the inverse roots of the two short factors."""
    u = g * jax.lax.rsqrt(jnp.expand_dims(cols, layout.rows))
    if layout.is_matrix:
        rows = jnp.expand_dims(rows, layout.cols)
        u = u * jax.lax.rsqrt(rows / rows.mean(layout.rows, keepdims=True))
    return u.astype(g.dtype)
