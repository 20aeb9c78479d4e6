"""Sums and maxima over the axes of a matrix, as each backend compiles them best.

XLA for CPUs stores an expression before it reduces it, and walks a wide matrix column by column,
at a fortieth of the memory's speed. To combine the halves of an axis with each other first, up to
four times, is one fused loop that leaves a sixteenth to reduce; of a maximum it is enough to store
a byte a number. Other backends do best with the plain reduction.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from memopt.matrices import shard_count


def total(x: Array, axes: tuple[int, ...], *, keepdims: bool = False) -> Array:
    """``x.sum(axes)`` of an expression that is cheap to compute, such as a square.

    Args:
      x: any array.
      axes: the axes to sum over, counted from the front.
      keepdims: keep them with length one.

    Example:
      >>> total(jnp.ones((2, 128, 3)), (1,)).tolist()
      [[128.0, 128.0, 128.0], [128.0, 128.0, 128.0]]
    """
    plain = lambda x: x.sum(axes, keepdims=keepdims)
    return _on_cpu(lambda x: plain(_folded(jnp.add, x, axes[0])), plain, x)


def octave(x: Array) -> Array:
    """The power of two up to the largest magnitude along the last axis, kept with length one.

    0 where all numbers are zeros, or subnormal; infinite where one is not finite.

    Args:
      x: float32, ``(..., n)``.

    Example:
      >>> octave(jnp.array([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]])).tolist()
      [[2.0], [0.0]]
    """
    words = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
    floats = lambda words: jax.lax.bitcast_convert_type(words, jnp.float32)

    def bytewise(x: Array) -> Array:
        # The sign is the ninth bit, and falls off.
        exponents = (words(x) >> 23).astype(jnp.uint8).max(-1, keepdims=True)
        return floats(exponents.astype(jnp.uint32) << 23)

    plain = lambda x: floats(words(jnp.abs(x).max(-1, keepdims=True)) >> 23 << 23)
    return _on_cpu(bytewise, plain, x)


def _on_cpu(cpu: Callable[[Array], Array], default: Callable[[Array], Array], x: Array) -> Array:
    return jax.lax.platform_dependent(x, cpu=cpu, default=default)


def _folded(combine: Callable[[Array, Array], Array], x: Array, axis: int) -> Array:
    """`x` with the halves of an axis combined, up to four times, where none is on other devices."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Auto in mesh.axis_types and mesh.size > 1:  # which axes are split is not known
        return x
    for _ in range(4):
        size = x.shape[axis]
        if size % (2 * shard_count(x, axis)) or size < 64:
            break
        halves = (jax.lax.slice_in_dim(x, i, i + size // 2, axis=axis) for i in (0, size // 2))
        x = combine(*halves)
    return x
