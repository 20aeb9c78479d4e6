"""In which precision state is kept and statistics are computed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


def statistics_dtype(x: Any) -> Any:
    """The dtype statistics of `x` are computed and kept in: float32, or wider if `x` is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def to_float32(x: Array) -> Array:
    """`x` in float32, or as it is if it is wider."""
    return x.astype(statistics_dtype(x))


def zeros_of(f: Any, *args: Any) -> Any:
    """Zeros with the shapes, dtypes and shardings of ``f(*args)``, which is never run.

    Args:
      f: any traceable function.
      *args: arrays, or ``jax.ShapeDtypeStruct`` in their place.

    Example:
      >>> zeros_of(lambda x: x.sum(0), jax.ShapeDtypeStruct((2, 3), "float32")).shape
      (3,)
    """
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(f, *args))


def average(decay: Any, old: Array, new: Array) -> Array:
    """The moving average decay·old + (1 − decay)·new, in the dtype of `old`'s statistics."""
    dtype = statistics_dtype(old)
    decay = jnp.asarray(decay, dtype)
    return decay * old.astype(dtype) + (1 - decay) * new.astype(dtype)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in at least float32, whatever the dtype of parameters and gradients.

    Optax keeps Adam's second moment in the parameter's dtype; in bfloat16 it stops moving once
    a step's share of it falls below the rounding. Here `inner` sees float32 parameters and
    gradients, so its state is float32, and its updates return in the gradients' dtype.

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
        wide = jax.tree.map(widen, (updates, params))
        new, state = inner.update(wide[0], state, wide[1], **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
