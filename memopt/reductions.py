"""Sums over the axes of a matrix, as each backend compiles them best.

XLA for CPUs stores an expression before it reduces it, and walks a wide matrix column by column,
at a fortieth of the memory's speed. To add the halves of an axis to each other first, up to four
times, is one fused loop that leaves a sixteenth to reduce. Other backends do best with the plain
reduction.
"""

import jax
from jax import Array


def total(x: Array, axes: tuple[int, ...], *, keepdims: bool = False) -> Array:
    """``x.sum(axes)`` of an expression that is cheap to compute, such as a square.

    Args:
      x: any array.
      axes: the axes to sum over, counted from the front.
      keepdims: keep them with length one.

    Example:
      >>> import jax.numpy as jnp
      >>> total(jnp.ones((2, 128, 3)), (1,)).tolist()
      [[128.0, 128.0, 128.0], [128.0, 128.0, 128.0]]
    """
    plain = lambda x: x.sum(axes, keepdims=keepdims)
    folded = lambda x: plain(_folded(x, axes[0]))
    return jax.lax.platform_dependent(x, cpu=folded, default=plain)


def _folded(x: Array, axis: int) -> Array:
    """`x` with the halves of an axis added to each other, up to four times.

    Not on several devices, which may split the axis.
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
