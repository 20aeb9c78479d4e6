"""Clips and scales each matrix's update by root mean squares."""

import functools
import math

import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.matrices import Layout, Matrices
from memopt.reductions import total
from memopt.renamed import keywords
from memopt.state.precision import bounded, bounded_squares, statistics_dtype
from memopt.transforms.per_matrix import per_matrix


@keywords(threshold="clip_threshold")
@checked
def clip_by_matrix_rms(
    clip_threshold: float = 1.0, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each matrix of the stack down to a root mean square of at most `clip_threshold`.

    U ← U / max(1, RMS(U) / clip_threshold). Unlike `optax.clip_by_block_rms`, which computes one
    root mean square for a whole stacked array, this treats layers separately. Entries beyond
    2⁵⁰ ≈ 1e15 count as that. No state.

    Args:
        clip_threshold: the largest root mean square that is not scaled down, d in the paper.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    References:
        Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, section 6.

    Example:
        >>> tx = clip_by_matrix_rms(1.0)
        >>> layers = jnp.stack([jnp.full((2, 2), 3.0), jnp.full((2, 2), 0.5)])
        >>> tx.update(layers, tx.init(layers))[0][:, 0, 0].tolist()
        [1.0, 0.5]
    """
    return per_matrix(functools.partial(clip_rms, clip_threshold=clip_threshold), matrices=matrices)


@checked
def scale_by_parameter_rms(
    min_scale: float = 1e-3, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each matrix's update by the root mean square of its parameter.

    U ← max(min_scale, RMS(W)) · U, per matrix of the stack. No state.

    Args:
        min_scale: the smallest scale, so that parameters can move away from zero.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    Raises:
        ValueError: if `update` is called without `params`.

    References:
        Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, section 8.

    Example:
        >>> tx = scale_by_parameter_rms()
        >>> w = jnp.full((2, 2), 0.5)
        >>> tx.update(jnp.ones((2, 2)), tx.init(w), w)[0].tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    return per_matrix(
        functools.partial(scale_by_rms_of, min_scale=min_scale),
        reads_params=True,
        matrices=matrices,
    )


@keywords(threshold="clip_threshold")
@checked
def normalize_by_group(
    clip_threshold: float = 1.0, min_scale: float = 1e-3, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """AdaLomo's grouped update normalisation, with each matrix of the stack as a group.

    U ← max(min_scale, RMS(W)) · U / max(1, RMS(U) / clip_threshold). No state.

    Args:
        clip_threshold: the largest root mean square that is not scaled down.
        min_scale: the smallest scale taken from the parameter.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    References:
        Lv et al., AdaLomo, 2023, https://arxiv.org/abs/2310.10195, section 3.2.

    Example:
        >>> tx = normalize_by_group()
        >>> w = jnp.full((2, 2), 0.5)
        >>> tx.update(jnp.full((2, 2), 4.0), tx.init(w), w)[0].tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    return optax.chain(
        clip_by_matrix_rms(clip_threshold, matrices=matrices),
        scale_by_parameter_rms(min_scale, matrices=matrices),
    )


def clip_rms(layout: Layout, u: Array, *, clip_threshold: float) -> Array:
    """Computes U / max(1, RMS(U) / clip_threshold) for each matrix."""
    return (bounded(u) / jnp.maximum(1.0, rms(layout, u) / clip_threshold)).astype(u.dtype)


def scale_by_rms_of(layout: Layout, u: Array, w: Array, *, min_scale: float) -> Array:
    """Computes max(min_scale, RMS(W)) · U for each matrix."""
    return (u * jnp.maximum(min_scale, rms(layout, w))).astype(u.dtype)


def rms(layout: Layout, x: Array) -> Array:
    """Root mean square of each matrix of `x`; reduced axes are kept with length one."""
    square = jnp.square(x.astype(statistics_dtype(x)))
    size = float(math.prod(x.shape[a] for a in layout.core) or 1)  # may exceed an int32
    return jnp.sqrt(bounded_squares(total(square, layout.core, keepdims=True) / size))
