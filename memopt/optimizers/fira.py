"""Fira."""

import functools
from collections.abc import Sequence
from typing import Unpack

import optax
from jax import Array

from memopt.errors import check_at_least
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms import projectors
from memopt.transforms.adam import (
    adam_bias_correction,
    scale_by_released_adam,
    scale_by_uncorrected_adam,
)
from memopt.transforms.decay import updated_weights
from memopt.transforms.moments import CarryOver
from memopt.transforms.norm_growth import GrowthLimiter
from memopt.transforms.recombine import lift_and_scaled_residual
from memopt.transforms.subspace import in_subspace


@method(
    "GaLore's memory, but no part of the gradient is lost",
    learning_rate=1e-2,
    sums_projections=True,
)
def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    scale: float = 0.25,
    refresh_every: int = 200,
    refresh_phase: int | Sequence[int] = 0,
    on_refresh: str | CarryOver = "keep",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    growth_limit: float | None = 1.01,
    projector: projectors.Projector | str = "randomized_svd",
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore plus the residual outside its subspace, scaled as Adam scales the projection.

    ::

        P ← leading r singular vectors of G        every `refresh_every` steps
        R = PᵀG                                    r×n (or G P, m×r, if m > n)
        N = Adam(R)
        S = limit_norm_growth((G − P R) · ‖N‖ / ‖R‖)      per index of the longer side
        W ← W − lr · (scale · (P N + S) + weight_decay · W)

    State: 2rq + rp + 1 numbers for a matrix of sides p ≤ q, and the step counts.

    Args:
        learning_rate: a number or a schedule.
        rank: the rank r of the subspace, a whole number from 1; below 1, a fraction of each
            matrix's shorter side.
        scale: the scale of the update, α.
        refresh_every: steps between two refreshes of the subspace.
        refresh_phase: staggers refreshes over the matrices; see `memopt.in_subspace`.
        on_refresh: what happens to the moments at a refresh; see `memopt.in_subspace`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the uncorrected second moment.
        growth_limit: the largest growth of the norm of S per step; None does not limit it. Unlike
            in the released code, a gradient of zeros does not freeze its matrix.
        projector: "randomized_svd", "svd", any other name in `memopt.projectors`, or a projector,
            which has its own rank.
        seed: the seed of random projectors.
        as_released: follow the authors' code: the bias correction comes after the limiter, scale
            multiplies only P N, S is formed from G − scale · P R, the limiter freezes a matrix
            after a gradient of zeros, decay applies to the weights after the step, and all other
            parameters are updated by that code's Adam.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `rank`, `refresh_every` or `scale` is out of range, the rank is larger than a
            matrix's side, or an option has no effect: rank or seed with a projector that has its
            own, or seed with one that draws nothing.

    References:
        Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?,
        2024, https://arxiv.org/abs/2410.01623, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> tx = memopt.fira(1e-2, rank=4)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 2·4·64 + 4·16 + 1 floats
        2308
    """
    check_at_least("scale", scale, 0)
    project = functools.partial(
        in_subspace,
        projector=projectors.by_name(projector, fira, rank=rank, seed=seed),
        refresh_every=refresh_every,
        refresh_phase=refresh_phase,
        on_refresh=on_refresh,
        matrices=common.get("matrices"),
    )
    limiter = None if growth_limit is None else GrowthLimiter(growth_limit, as_released)
    if as_released:
        adam = scale_by_uncorrected_adam(b1, b2, eps)
        correction = optax.scale_by_schedule(adam_bias_correction(b1, b2))
        rule = lift_and_scaled_residual(scale, limiter, as_released=True)
        subspace = project(adam, recombine=rule)
        others = optax.chain(adam, correction)
        return finish(
            learning_rate, subspace, correction, others=others, decayed=updated_weights, **common
        )
    adam = scale_by_released_adam(b1, b2, eps)
    subspace = project(adam, recombine=lift_and_scaled_residual(limiter=limiter))
    return finish(
        learning_rate, subspace, optax.scale(scale), others=optax.scale_by_adam(), **common
    )
