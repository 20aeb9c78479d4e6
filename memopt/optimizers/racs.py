"""RACS."""

from typing import Unpack

import optax

from memopt.errors import check_at_least
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms.norm_growth import limit_norm_growth
from memopt.transforms.normalization import scale_by_rows_and_columns


@method("SGD's memory: gradients over factors of rows and columns", learning_rate=2e-3)
def racs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.9,
    iterations: int = 5,
    scale: float = 1.0,
    growth_limit: float | None = 1.01,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """RACS: gradients divided by the roots of a factor for each row and each column.

    For each matrix with gradient G, from q = 1, and from R = C = 0 at the first step::

        s = (G²)ᵀ q / ‖q‖²                          `iterations` times
        q = G² s / ‖s‖²
        R ← β R + (1 − β) q
        C ← β C + (1 − β) s
        U = limit_norm_growth(G / √(R Cᵀ))
        W ← W − lr · (scale · U + weight_decay · W)

    State: m + n + 1 numbers per matrix. Other parameters, the embedding and the output head among
    them, are updated by AdamW. The paper's learning rates are 0.02 for the matrices, with a scale
    of 0.05, and 0.001 for the others; with the defaults here both are 0.001.

    Args:
        learning_rate: a number or a schedule.
        decay: β, the decay of the averages.
        iterations: the number of iterations towards q and s.
        scale: the size of the matrices' updates, α.
        growth_limit: the largest growth of a matrix's update norm per step; None does not limit it.
        as_released: has no effect, since no code of the authors was found; every method has this
            switch.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `iterations` is below 1, or `scale` is negative.

    References:
        Gong et al., Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation
        with a Low-Rank Extension, 2025, https://arxiv.org/abs/2502.07752, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> memopt.state_bytes(memopt.racs(1e-3), params)["up/kernel"]     # (64 + 16 + 1) floats
        324
    """
    matrices = common.get("matrices")
    check_at_least("scale", scale, 0)
    steps = [scale_by_rows_and_columns(decay, iterations, matrices=matrices), optax.scale(scale)]
    if growth_limit is not None:
        steps.insert(1, limit_norm_growth(growth_limit, matrices=matrices))
    return finish(learning_rate, *steps, others=optax.scale_by_adam(), **common)
