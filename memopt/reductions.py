"""Sums and maxima over the axes of a matrix, in the form that each backend compiles best.

XLA for CPUs stores an expression before reducing it, and reads a wide matrix column by column, at
1/40 of the memory's bandwidth. Adding the two halves of an axis first, up to four times, is one
fused loop that leaves 1/16 to reduce. On other backends the plain reduction is best.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def total(x: Array, axes: tuple[int, ...], *, keepdims: bool = False) -> Array:
    """Computes ``x.sum(axes)`` for an expression that is cheap to compute, such as a square.

    Args:
      x: any array.
      axes: the axes to sum over, counted from the front; none for a scalar.
      keepdims: whether to keep these axes with length one.

    Example:
      >>> total(jnp.ones((2, 128, 3)), (1,)).tolist()
      [[128.0, 128.0, 128.0], [128.0, 128.0, 128.0]]
    """
    if not axes:
        return x
    plain = lambda x: x.sum(axes, keepdims=keepdims)
    folded = lambda x: plain(_folded(x, axes[0]))
    return jax.lax.platform_dependent(x, cpu=folded, default=plain)


def largest_magnitude(x: Array, axes: int | tuple[int, ...], *, keepdims: bool = False) -> Array:
    """Computes ``abs(x).max(axes)``, which is infinite, not NaN, if an entry is NaN.

    XLA's reduction for CPUs loses NaN, except in some small arrays.

    Args:
      x: any real array, of no entries too: their largest magnitude is 0.
      axes: the axes to reduce.
      keepdims: whether to keep these axes with length one.

    Example:
      >>> largest_magnitude(jnp.array([[1.0, -2.0], [jnp.nan, 1.0]]), 1).tolist()
      [2.0, inf]
    """
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)).max(axes, keepdims=keepdims, initial=0)


def scale_to_one(x: Array, axes: tuple[int, ...] = (-2, -1)) -> tuple[Array, Array]:
    """The power of two that brings each matrix's largest entry near one.

    Squares of the scaled entries neither overflow nor vanish, and no digit changes.

    Args:
      x: any real array, float32 or wider.
      axes: the axes of a matrix.

    Returns:
      The factors, with these axes of length one, and whether each matrix is finite and not zero,
      without them; the factor of another matrix is one.

    Example:
      >>> factor, exists = scale_to_one(jnp.stack([jnp.full((1, 2), 3.0), jnp.zeros((1, 2))]))
      >>> factor.ravel().tolist(), exists.tolist()
      ([0.25, 1.0], [True, False])
    """
    largest = largest_magnitude(x, axes)
    exists = (largest > 0) & jnp.isfinite(largest)
    exponent = jnp.where(exists, jnp.frexp(largest)[1], 0)
    most = -int(jnp.finfo(largest.dtype).minexp)
    factor = jnp.ldexp(jnp.ones_like(largest), jnp.clip(-exponent, -most, most))
    return jnp.expand_dims(factor, axes), exists


def total_over_trees(f: Callable[..., Array], *trees: Any) -> Array:
    """Sums ``f(*arrays)`` over all entries of all arrays of trees, in float32 or wider.

    Args:
      f: an expression of an array of each tree, cheap to compute.
      *trees: trees of one structure.

    Example:
      >>> float(total_over_trees(jnp.multiply, {"a": jnp.ones(2)}, {"a": jnp.array([1.0, 2.0])}))
      3.0
    """
    entries = jax.tree.leaves(jax.tree.map(f, *trees))
    totals = (total(x, tuple(range(x.ndim))) for x in entries)
    return sum(totals, jnp.zeros((), jnp.float32))


def _folded(x: Array, axis: int) -> Array:
    """Adds the two halves of an axis, up to four times.

    On a mesh of several devices, which may split the axis, `x` is returned unchanged.
    """
    if jax.typeof(x).sharding.mesh.size > 1:
        return x
    for _ in range(4):
        size = x.shape[axis]
        if size % 2 or size < 64:
            break
        half = lambda i: jax.lax.slice_in_dim(x, i, i + size // 2, axis=axis)  # noqa: B023
        x = half(0) + half(size // 2)
    return x


@jax.jit
def for_any(wanted: Array) -> Array:
    """Whether any matrix of a stack wants what `jax.lax.cond` computes for the whole stack.

    Only for a choice that saves work: for a matrix that does not want it, both branches must return
    the same. The stack may then be cut into layers; a released step knows the function by its name.

    Args:
      wanted: a bool for each matrix.

    Example:
      >>> bool(for_any(jnp.array([False, True])))
      True
    """
    return wanted.any()
