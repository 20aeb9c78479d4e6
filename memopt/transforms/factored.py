"""Factored second moments (Adafactor)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.state.precision import statistics_dtype, zeros_of
from memopt.transforms.sums import total


class FactoredMoment(NamedTuple):
    """The second moment of a stack of m×n matrices, up to their product's scale.

    Attributes:
      rows: mean of g² over columns; the array's shape less its column axes.
      cols: mean of g² over rows; the array's shape less its row axes.
    """

    rows: Array
    cols: Array


class ScaleByFactoredRmsState(NamedTuple):
    """State of `scale_by_factored_rms`.

    Attributes:
      count: steps taken, int32.
      moments: a `FactoredMoment` for each matrix, a full second moment for each vector.
    """

    count: Array  # type: ignore[assignment]
    moments: Any


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
      >>> state.moments["w"].rows.shape, state.moments["w"].cols.shape, state.moments["b"].shape
      ((3, 6), (3, 4), (4,))
    """

    def init(params: Any) -> ScaleByFactoredRmsState:
        start = lambda layout, p: zeros_of(lambda p: _second_moment(layout, p, 0.0), p)
        moments = map_matrices(start, params, matrices=matrices, default=every_matrix)
        return ScaleByFactoredRmsState(jnp.zeros((), jnp.int32), moments)

    def update(updates: Any, state: ScaleByFactoredRmsState, params: Any = None, **_: Any) -> Any:
        count = optax.safe_increment(state.count)
        decay = 1.0 - count.astype(float) ** -decay_rate

        def step(layout: Layout, g: Array, moment: Any) -> tuple[Array, Any]:
            beta = decay.astype(statistics_dtype(g))
            new = _second_moment(layout, g, epsilon, 1 - beta)
            moment = jax.tree.map(lambda old, new: beta * old + new, moment, new)
            return _over_root(layout, g, moment), moment

        updates, moments = map_matrices(
            step, updates, state.moments, matrices=matrices, default=every_matrix, outputs=2
        )
        return updates, ScaleByFactoredRmsState(count, moments)

    return optax.GradientTransformationExtraArgs(init, update)


def _second_moment(
    layout: Layout, g: Array, epsilon: float, weight: Any = 1.0
) -> FactoredMoment | Array:
    """The second moment of one gradient, times `weight`."""
    g = g.astype(statistics_dtype(g))
    if not layout.is_matrix:
        return weight * (jnp.square(g) + epsilon)
    # The weight stands inside one of the two sums: XLA for CPUs would store a square they share.
    rows = weight * jnp.square(g).mean(layout.cols)
    cols = total(weight * g * g, layout.rows) / layout.shape(g)[-2]
    return FactoredMoment(rows + weight * epsilon, cols + weight * epsilon)


def _over_root(layout: Layout, g: Array, moment: FactoredMoment | Array) -> Array:
    """G / √(R C / mean(R)), from the inverse roots of the two short factors."""
    if isinstance(moment, FactoredMoment):
        rows = jnp.expand_dims(moment.rows, layout.cols)
        cols = jnp.expand_dims(moment.cols, layout.rows)
        over_rows = jax.lax.rsqrt(rows / rows.mean(layout.rows, keepdims=True))
        return (g * over_rows * jax.lax.rsqrt(cols)).astype(g.dtype)
    return (g * jax.lax.rsqrt(moment)).astype(g.dtype)
