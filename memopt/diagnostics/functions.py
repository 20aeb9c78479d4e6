"""Functions of arrays: spectra, codec errors, and the sharpness along a direction."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from memopt.errors import check_choice
from memopt.reductions import largest_magnitude, scale_to_one, total_over_trees
from memopt.shapes import Stack
from memopt.state.codecs import Codec, Named, named
from memopt.state.precision import bounded, to_float32
from memopt.transforms.linalg import product

#: Power iterations of `stable_rank`: two singular values of a ratio of 0.9 differ by 0.9^32 = 3% of
#: their squares afterwards.
POWER_ITERATIONS = 16


def singular_values(x: Stack) -> Array:
    """Computes the singular values of each matrix of a stack.

    Args:
        x: ``(*stack, m, n)``.

    Returns:
        ``(*stack, min(m, n))``, float32 or wider, the largest first.

    Example:
        >>> singular_values(jnp.diag(jnp.array([2.0, 3.0]))).tolist()
        [3.0, 2.0]
    """
    return jnp.linalg.svd(to_float32(x), compute_uv=False)


def stable_rank(x: Stack) -> Array:
    """Estimates ‖X‖_F² / ‖X‖₂² of each matrix of a stack: the number of large singular values.

    The largest singular value is found by power iteration from a fixed start, at the cost of 32
    products with a vector; the estimate is never too small.

    Args:
        x: ``(*stack, m, n)``.

    Returns:
        A number between 1 and min(m, n) for each matrix; NaN for a matrix of zeros.

    References:
        Rudelson & Vershynin, Sampling from large matrices, 2007,
        https://arxiv.org/abs/math/0503442.

    Example:
        >>> round(float(stable_rank(jnp.eye(4))), 3), round(float(stable_rank(jnp.ones((4, 3)))), 3)
        (4.0, 1.0)
    """
    x = to_float32(x)
    x = x * scale_to_one(x)[0]
    start = jax.random.normal(jax.random.key(0), (x.shape[-1],), x.dtype)
    v = jnp.broadcast_to(start, (*x.shape[:-2], x.shape[-1]))

    def iterate(_: int, v: Array) -> Array:
        v = product("...mn,...m->...n", x, product("...mn,...n->...m", x, v))
        return v / jnp.linalg.norm(v, axis=-1, keepdims=True)

    v = jax.lax.fori_loop(0, POWER_ITERATIONS, iterate, v)
    largest = jnp.square(product("...mn,...n->...m", x, v)).sum(-1)
    return jnp.square(x).sum((-2, -1)) / largest


def codec_error(
    x: Array, codec: str | Codec, key: Array | None = None, *, kind: str = "signed"
) -> Array:
    """Computes ‖decode(encode(X)) − X‖ / ‖X‖ of a whole array.

    Args:
        x: an array of at least one axis.
        codec: a codec, or its name, such as "int8"; see `memopt.quantize_state`.
        key: decides the stochastic rounding; None rounds to the nearest.
        kind: the use that decides the codec of a name: "signed" for first moments, "unsigned" for
            second moments, or "weights".

    Raises:
        ValueError: if there is no codec of this name or kind.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (64, 256))
        >>> [round(float(codec_error(x, codec)), 3) for codec in ("bfloat16", "int8", "int4")]
        [0.002, 0.013, 0.133]
    """
    check_choice("kind", kind, Named._fields)
    x = to_float32(x)
    chosen = getattr(named(codec), kind)
    if key is None:
        coded = chosen.encode_nearest(x)
    else:
        coded = chosen.encode(x, jax.random.bits(key, x.shape, jnp.uint32))
    factor, _ = scale_to_one(x, tuple(range(x.ndim)))
    norm = lambda x: jnp.linalg.norm(bounded(factor * x))
    return norm(chosen.decode(coded) - x) / norm(x)


def directional_sharpness(
    loss: Callable[..., Array], params: Any, direction: Any, *args: Any
) -> Array:
    """Computes dᵀHd / ‖d‖², the curvature of a loss along a direction, by one ``jax.jvp``.

    The loss after a step of −η d is L − η ∇Lᵀd + ½η² dᵀHd + O(η³): a direction of low sharpness
    allows a longer step.

    Args:
        loss: maps ``(params, *args)`` to a scalar.
        params: a tree of real arrays.
        direction: a tree like `params`, such as an optimizer's updates.
        *args: passed on to `loss`.

    References:
        Pan & Li, Toward understanding why Adam converges faster than SGD for transformers, 2023,
        https://arxiv.org/abs/2306.00204, section 3.

    Example:
        >>> loss = lambda w: w[0] ** 2 + 5 * w[1] ** 2
        >>> w = jnp.ones(2)
        >>> float(directional_sharpness(loss, w, jnp.array([1.0, 0.0])))
        2.0
        >>> float(directional_sharpness(loss, w, jnp.array([0.0, -3.0])))
        10.0
    """
    gradient = jax.grad(lambda params: loss(params, *args))
    # Squares of a direction as small as a gradient would underflow; the ratio has no scale.
    sizes = [largest_magnitude(d, tuple(range(d.ndim))) for d in jax.tree.leaves(direction)]
    factor = scale_to_one(to_float32(jnp.stack(sizes)), (0,))[0][0]
    scaled = lambda d, p: (factor * to_float32(d)).astype(p.dtype)
    direction = jax.tree.map(scaled, direction, params)
    _, curvature = jax.jvp(gradient, (params,), (direction,))
    dot = lambda a, b: total_over_trees(lambda a, b: to_float32(a) * to_float32(b), a, b)
    return dot(direction, curvature) / dot(direction, direction)
