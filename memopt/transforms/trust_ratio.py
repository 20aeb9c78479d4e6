"""Steps proportional to the norm of each matrix (LARS, LAMB)."""

import functools
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_at_least
from memopt.matrices import Layout, Matrices
from memopt.state.precision import bounded, to_float32
from memopt.transforms.norm_growth import matrix_norm
from memopt.transforms.per_matrix import per_matrix


@checked
def scale_by_matrix_trust_ratio(
    trust_coefficient: float = 1.0,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    *,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each matrix's update by the ratio of the parameter's norm to its own.

    For each matrix W of the stack and its update U, with λ = weight_decay and ‖·‖ the root of the
    sum of squares::

        r = trust_coefficient · ‖W‖ / (‖U‖ + λ ‖W‖ + ε)       or 1 if ‖W‖ or ‖U‖ is 0
        U ← r (U + λ W)

    LARS has λ here, and its norms do not see the sum of U and λ W; LAMB adds its decay to U before.
    Unlike `optax.scale_by_trust_ratio`, which computes one ratio for a whole stacked array, this
    treats layers separately. Entries of U beyond 2⁵⁰ ≈ 1e15 count as that. No state.

    Args:
        trust_coefficient: the norm of an update relative to that of its parameter.
        eps: ε, added to the denominator.
        weight_decay: λ, multiplied by the ratio, too.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. Vectors have ratios of their own.

    Raises:
        ValueError: if an argument is negative, or `update` is called without `params`.

    References:
        You et al., Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888; You et al., Large Batch Optimization for Deep Learning,
        2019, https://arxiv.org/abs/1904.00962.

    Example:
        >>> tx = scale_by_matrix_trust_ratio()
        >>> w = jnp.stack([jnp.full((2, 2), 3.0), jnp.zeros((2, 2))])
        >>> tx.update(jnp.ones((2, 2, 2)), tx.init(w), w)[0][:, 0, 0].tolist()
        [3.0, 1.0]
    """
    options: dict[str, Any] = {
        "trust_coefficient": trust_coefficient,
        "eps": eps,
        "weight_decay": weight_decay,
    }
    for name, value in options.items():
        check_at_least(name, value, 0)
    rule = functools.partial(scale_by_ratio, **options)
    return per_matrix(rule, reads_params=True, matrices=matrices)


def scale_by_ratio(
    layout: Layout, u: Array, w: Array, *, trust_coefficient: Any, eps: Any, weight_decay: Any
) -> Array:
    """Computes the update of `scale_by_matrix_trust_ratio`."""
    of_u, of_w = (jnp.expand_dims(matrix_norm(layout, x), layout.core) for x in (u, w))
    has_ratio = (of_u > 0) & (of_w > 0)
    denominator = jnp.where(has_ratio, of_u + weight_decay * of_w + eps, 1)
    ratio = jnp.where(has_ratio, trust_coefficient * of_w / denominator, 1)
    return (ratio * (bounded(u) + weight_decay * to_float32(w))).astype(u.dtype)
