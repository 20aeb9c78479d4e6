"""Finds the k-th largest of many numbers by counting, without sorting or gathering."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from memopt.axis_types import varying_as_any
from memopt.reductions import total

_DIGIT = 3
"""Bits found in one pass. On a v5e chip seven comparisons of a float32 take about as long as
reading it: with more, fewer passes would take longer."""

_LARGE, _LOW = 2**31, 12
_MASK = 2**_LOW - 1
"""Entries of an array from which on they are counted by row; bits of the lower part of a sum."""


def share_of(fraction: float, size: int) -> int:
    """Computes ⌊fraction · size⌋ for the decimal number that the fraction is written as.

    Example:
        >>> share_of(0.29, 100), int(0.29 * 100)
        (29, 28)
    """
    return math.floor(Fraction(str(fraction)) * size)


def kth_largest(
    arrays: Sequence[Array],
    k: int | Array,
    bits: int,
    dtype: Any,
    *,
    at_least: Callable[[Array, Array], Array] = jnp.greater_equal,
    axes: tuple[int, ...] | None = None,
) -> Array:
    """The k-th largest of integers, from the highest bits down.

    Three bits at a time, by counting the entries that reach each of seven candidates, which reads
    the arrays ⌈bits/3⌉ times. On a mesh only counts are exchanged.

    Args:
        arrays: arrays of at least k entries together.
        k: counted from 1. With `axes`, also a number for each matrix, its axes kept with length
            one.
        bits: the bits of the integers, which are not negative; fewer than those of `dtype`.
        dtype: unsigned integers.
        at_least: which entries of an array reach an integer; for entries that are no integers
            themselves, but in their order.
        axes: for one array, the axes to search along, which the result keeps with length one; None
            searches all entries of all arrays.

    Example:
        >>> x = jnp.array([[5, 1, 3], [0, 2, 2]], jnp.uint32)
        >>> int(kth_largest([x], 2, 3, x.dtype))
        3
        >>> kth_largest([x], 2, 3, x.dtype, axes=(1,)).tolist()
        [[3], [2]]
    """

    def reached(candidate: Array) -> Array:
        reaching = [at_least(x, candidate).astype(jnp.int32) for x in arrays]
        if axes is None:
            return _sum_is_at_least(k, reaching)
        [each] = reaching
        return total(each, axes, keepdims=True) >= k

    def next_digit(step: Array, found: Array) -> Array:
        shift = jnp.maximum(bits - _DIGIT * (step + 1), 0).astype(dtype)
        candidates = (found + (jnp.asarray(i, dtype) << shift) for i in range(1, 2**_DIGIT))
        digit = sum(reached(candidate).astype(dtype) for candidate in candidates)
        return found + (digit << shift)

    shape = () if axes is None else [1 if a in axes else n for a, n in enumerate(arrays[0].shape)]
    start = varying_as_any(arrays, jnp.zeros(shape, dtype))
    return jax.lax.fori_loop(0, -(-bits // _DIGIT), next_digit, start)


def kth_magnitude(
    arrays: Sequence[Array], k: int | Array, axes: tuple[int, ...] | None = None
) -> Array:
    """The k-th largest magnitude of floats. Subnormal numbers count as zero.

    The bits of a positive float, read as an integer, are in the same order as the floats.

    Args:
        arrays: arrays of floats, with at least k entries together.
        k: counted from 1.
        axes: as in `kth_largest`.

    Example:
        >>> float(kth_magnitude([jnp.array([1.0, -8.0]), jnp.array([3.0, 0.5])], 2))
        3.0
    """
    dtype = jnp.result_type(*arrays)
    bits = jnp.finfo(dtype).bits

    def at_least(x: Array, candidate: Array) -> Array:
        # Without an absolute value: XLA would compute and store it once for all rounds of a loop.
        least = jax.lax.bitcast_convert_type(candidate, dtype)
        return (x.astype(dtype) >= least) | (x.astype(dtype) <= -least)

    found = kth_largest(arrays, k, bits - 1, jnp.dtype(f"uint{bits}"), at_least=at_least, axes=axes)
    value = jax.lax.bitcast_convert_type(found, dtype)
    # A comparison with a smaller number, which XLA takes for zero, holds for all.
    return jnp.where(value >= jnp.finfo(dtype).tiny, value, 0)


def _sum_is_at_least(k: int | Array, arrays: Sequence[Array]) -> Array:
    """Whether the sum of arrays of zeros and ones, which int32 may not hold, is at least `k`."""
    high, low = jnp.zeros((2,), jnp.int32)
    for x in arrays:
        part = total(x, tuple(range(x.ndim))[x.size >= _LARGE :])
        high += (part >> _LOW).sum()
        low += (part & _MASK).sum()
    high += low >> _LOW
    return (high > k >> _LOW) | ((high == k >> _LOW) & (low & _MASK >= k & _MASK))
