"""APOLLO and APOLLO-Mini."""

from typing import Any, Unpack

import optax
from jax import Array

from memopt.errors import check_at_least, check_unused
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method, options_of
from memopt.transforms import projectors
from memopt.transforms.adam import adam_bias_correction, scale_by_uncorrected_adam
from memopt.transforms.decay import updated_weights
from memopt.transforms.norm_growth import GrowthLimiter, limit_norm_growth
from memopt.transforms.recombine import scale_gradient
from memopt.transforms.subspace import in_subspace


@method(
    "AdamW's quality in a fraction of its state, without SVD",
    learning_rate=1e-2,
    sums_projections=True,
)
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    scale: float = 1.0,
    per: str = "channel",
    refresh_every: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    growth_limit: float | None = 1.01,
    scale_front: bool = False,
    projector: projectors.Projector | str = "gaussian",
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: SGD with a learning rate for each channel, estimated from a random projection.

    Adam runs on the projection R of a matrix's gradient G; each channel of G is scaled by the
    factor by which Adam scales that channel of R. With t = count + 1::

        P ~ N(0, 1/r)                      drawn from the seed, never stored
        R = PᵀG                            r×n (or G P, m×r, if m > n)
        N = Adam(R), uncorrected
        S = G · ‖N‖ / ‖R‖                  per index of the longer side
        U = √scale · limit_norm_growth(S)
        W ← W − lr · (√(1−β₂ᵗ)/(1−β₁ᵗ) · U + weight_decay · W)

    State: 2rq + 1 numbers for a matrix of longer side q, and the step counts.

    Args:
        learning_rate: a number or a schedule.
        rank: the rank r of the subspace, a whole number from 1; below 1, a fraction of each
            matrix's shorter side.
        scale: the update is multiplied by the square root of this, as in the released code.
        per: "channel" for one scaling factor per channel, "matrix" for one per matrix.
        refresh_every: steps between two projections; the moments are kept.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the uncorrected second moment.
        growth_limit: the largest growth of a matrix's update norm per step; None does not limit it.
            Unlike in the released code, a gradient of zeros does not freeze its matrix.
        scale_front: multiply by √scale before the limiter instead of after it.
        projector: "gaussian" or "rademacher", any other name in `memopt.projectors`, or a
            projector, which has its own rank and seed.
        seed: the seed of the projections.
        as_released: follow the authors' code: the limiter freezes a matrix after a gradient of
            zeros, decay applies to the weights after the step, the projection is stored (r numbers
            for each index of the shorter side), and all other parameters are updated by that code's
            Adam (ε before the bias correction).
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `rank`, `refresh_every` or `scale` is out of range, the rank is larger than a
            matrix's side, or an option has no effect: rank or seed with a projector that has its
            own, or seed with one that draws nothing.

    References:
        Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance, 2024,
        https://arxiv.org/abs/2412.05270, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> tx = memopt.apollo(1e-2, rank=4)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # (2·4·64 + 1) floats
        2052
    """
    matrices = common.get("matrices")
    check_at_least("scale", scale, 0)
    adam = scale_by_uncorrected_adam(b1, b2, eps)
    limiter, limit = None, []
    if growth_limit is None:
        check_unused(apollo, "growth_limit is None", scale_front=scale_front)
    if growth_limit is not None and not scale_front:
        limiter = GrowthLimiter(growth_limit, as_released)
    elif growth_limit is not None:
        limit = [limit_norm_growth(growth_limit, matrices=matrices, as_released=as_released)]
    steps = (
        in_subspace(
            inner=adam,
            projector=projectors.by_name(
                projector,
                apollo,
                known={"stored": True} if as_released else {},
                rank=rank,
                seed=seed,
            ),
            recombine=scale_gradient(per, limiter),
            refresh_every=refresh_every,
            matrices=matrices,
        ),
        optax.scale(scale**0.5),
        *limit,
        optax.scale_by_schedule(adam_bias_correction(b1, b2)),
    )
    if as_released:
        others = optax.chain(adam, steps[-1])
        return finish(learning_rate, *steps, others=others, decayed=updated_weights, **common)
    return finish(learning_rate, *steps, others=optax.scale_by_adam(), **common)


@method("pre-training in SGD's memory; the default", learning_rate=5e-3)
@options_of(apollo)
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 1,
    scale: float = 128.0,
    per: str = "matrix",
    projector: projectors.Projector | str = "gaussian",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: APOLLO with rank 1 and one scaling factor per matrix, at SGD's memory cost.

    With t = count + 1::

        P ~ N(0, 1)                        drawn from the seed, never stored
        R = PᵀG                            1×n (or G P, m×1, if m > n)
        N = Adam(R), uncorrected
        S = G · ‖N‖ / ‖R‖                  per matrix
        U = √scale · limit_norm_growth(S)
        W ← W − lr · (√(1−β₂ᵗ)/(1−β₁ᵗ) · U + weight_decay · W)

    State: 2q + 1 numbers for a matrix of longer side q, and the step counts. The arguments are
    those of `apollo`, with defaults rank 1, scale 128 and ``per="matrix"``.

    References:
        Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance, 2024,
        https://arxiv.org/abs/2412.05270, section 4.3.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}}
        >>> memopt.state_bytes(memopt.apollo_mini(1e-2), params)["up/kernel"]   # (2·64 + 1) floats
        516
    """
    if isinstance(projector, projectors.Projector) and isinstance(rank, int) and rank == 1:
        rank = projector.rank
    return apollo(learning_rate, rank=rank, scale=scale, per=per, projector=projector, **options)
