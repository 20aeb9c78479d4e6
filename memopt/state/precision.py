"""The precision in which state is kept and statistics are computed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.trees import named_leaves, open_box


def statistics_dtype(x: Any) -> Any:
    """The dtype in which statistics of `x` are computed and kept: float32, or wider if `x` is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def to_float32(x: Array) -> Array:
    """Casts `x` to float32, unless it is wider."""
    return x.astype(statistics_dtype(x))


def check_real(params: Any) -> None:
    """Raises if a parameter is complex; squares, signs and transposes of matrices would be wrong.

    Raises:
        ValueError: names the parameter and its dtype.

    Example:
        >>> check_real({"w": jnp.zeros((2, 2), complex)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: params must be real, got 'w' of dtype complex64; wrap the optimizer in ...
    """
    for name, leaf in named_leaves(params)[0]:
        dtype = getattr(open_box(leaf), "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"params must be real, got {name!r} of dtype {dtype}; wrap the optimizer in "
                "optax.contrib.split_real_and_imaginary."
            )


def largest_squared(dtype: Any) -> float:
    """The largest magnitude that is squared: 2⁵⁰ ≈ 1.1e15 in float32.

    The sum of 2²⁸ such squares, a matrix of 16,384×16,384, is finite.
    """
    return 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 14)


def bounded(x: Array) -> Array:
    """Casts `x` to float32 or wider; numbers too large to be squared become `largest_squared`.

    It is elementwise and so costs no pass over memory, unlike a scale by the largest entry. NaN
    stays NaN, and complex numbers are unchanged.

    Example:
        >>> bounded(jnp.array([2.0, -1e20])).tolist()
        [2.0, -1125899906842624.0]
    """
    x = to_float32(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return x
    most = largest_squared(x.dtype)
    return jnp.clip(x, -most, most)


def bounded_squares(squares: Array, count: int = 1) -> Array:
    """Bounds the sum of `count` squares, which may have overflowed, by that of bounded numbers.

    Example:
        >>> float(bounded_squares(jnp.square(jnp.float32(1e20))))
        1.2676506002282294e+30
    """
    most = largest_squared(squares.dtype) ** 2 * count
    return jnp.minimum(squares, min(most, float(jnp.finfo(squares.dtype).max)))


def zeros_of(f: Any, *args: Any) -> Any:
    """Zeros with the shapes, dtypes and shardings of ``f(*args)``, evaluated abstractly.

    Args:
        f: any traceable function.
        *args: arrays or ``jax.ShapeDtypeStruct``.

    Example:
        >>> zeros_of(lambda x: x.sum(0), jax.ShapeDtypeStruct((2, 3), "float32")).shape
        (3,)
    """
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(f, *args))


def float32_zeros(tree: Any) -> Any:
    """Zeros shaped like the arrays of a tree, in float32, or wider if they are.

    Example:
        >>> float32_zeros(jnp.ones(2, jnp.bfloat16))
        Array([0., 0.], dtype=float32)
    """
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=statistics_dtype(x)), tree)


def average(decay: Any, old: Array, new: Array) -> Array:
    """The moving average decay·old + (1 − decay)·new, in the dtype of `old`'s statistics."""
    dtype = statistics_dtype(old)
    decay = jnp.asarray(decay, dtype)
    return decay * old.astype(dtype) + (1 - decay) * new.astype(dtype)


def where_applied(applied: Array, new: Array, old: Array) -> Array:
    """Returns `new` if `applied`, else `old`.

    Codes are chosen as floats: of integers of 8 bits XLA for TPUs makes copies first, and a pass of
    their own.

    Args:
        applied: a bool, or bools that broadcast to `new`.
        new: any array.
        old: an array like it.
    """
    if new.dtype in (jnp.int4, jnp.int8, jnp.uint8):
        selected = jnp.where(applied, new.astype(jnp.float32), old.astype(jnp.float32))
        return selected.astype(new.dtype)
    return jnp.where(applied, new, old)


def bias_correction(decay: Any, steps: Array, dtype: Any) -> Array:
    """1 − decay^steps, the sum of a moving average's weights, in the moment's dtype.

    Example:
        >>> bias_correction(0.5, jnp.int32(2), jnp.float32)
        Array(0.75, dtype=float32)
    """
    return 1 - jnp.asarray(decay, dtype) ** steps.astype(dtype)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in float32 or wider, whatever the dtype of parameters and gradients.

    Optax keeps Adam's second moment in the parameter's dtype; in bfloat16 it stops changing once
    the change per step falls below the rounding step. Here `inner` receives float32 parameters and
    gradients, so that its state is float32; its updates are cast to the gradients' dtype. Gradients
    are `bounded`: an entry of 1e20 would make its second moment infinite, and stop the parameter.

    Args:
        inner: any transformation.

    Returns:
        A transformation with the state of `inner`.

    Example:
        >>> params = {"w": jnp.zeros((4,), jnp.bfloat16)}
        >>> jax.tree.leaves(in_float32(optax.scale_by_rms()).init(params))[0].dtype
        dtype('float32')
    """
    inner = optax.with_extra_args_support(inner)

    def widen(x: Any) -> Any:
        dtype = statistics_dtype(x)
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    def init(params: Any) -> Any:
        return inner.init(jax.tree.map(widen, params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        gradients, params = jax.tree.map(bounded, updates), jax.tree.map(widen, params)
        new, state = inner.update(gradients, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def with_gradient_dtypes(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Casts the updates of `inner` to the gradients' dtypes.

    Hyperparameters that are float32 arrays, unlike numbers, make a bfloat16 update float32.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        new, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
