"""SubTrack++."""

from collections.abc import Sequence
from typing import Unpack

import optax
from jax import Array

from memopt.optimizers.by_partition import Common
from memopt.optimizers.fira import fira
from memopt.optimizers.registry import method
from memopt.transforms import projectors
from memopt.transforms.moments import CarryOver


@method(
    "Fira in a subspace that turns a little at each refresh",
    learning_rate=1e-2,
    sums_projections=True,
)
def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    scale: float = 0.25,
    refresh_every: int = 200,
    refresh_phase: int | Sequence[int] = 0,
    on_refresh: str | CarryOver = "carry",
    step_size: float | Array = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    growth_limit: float | None = 1.01,
    projector: projectors.Projector | str = "grassmann",
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++: Adam in a subspace that is rotated towards the gradient, plus the residual.

    ::

        σ u vᵀ ≈ 2 (G − P PᵀG) (PᵀG)ᵀ / ‖G‖²       every `refresh_every` steps
        P ← P (I − v vᵀ) + (P v cos(η σ) + u sin(η σ)) vᵀ
        M, V ← T M, |T² (V̂ − M̂²) + (T M̂)²|         T = PᵀP_before, T² elementwise
        R = PᵀG                                    r×n (or G P, m×r, if m > n)
        N = Adam(R; M, V)
        S = limit_norm_growth((G − P R) · ‖N‖ / ‖R‖)      per index of the longer side
        W ← W − lr · (scale · (P N + S) + weight_decay · W)

    The first P has the leading singular vectors of G. With ``on_refresh="keep"`` M and V are kept,
    not transformed.

    State: 2rq + rp + 1 numbers for a matrix of sides p ≤ q, and the step counts.

    Args:
        learning_rate: a number or a schedule.
        rank: the rank r of the subspace, a whole number from 1; below 1, a fraction of each
            matrix's shorter side.
        scale: the scale of the update.
        refresh_every: steps between two rotations of the subspace.
        refresh_phase: staggers refreshes over the matrices; see `memopt.in_subspace`.
        on_refresh: what happens to M and V; "carry" is the rule above, others are those of
            `memopt.in_subspace`.
        step_size: η, in radians for a gradient that is half inside, in one direction, and half
            outside. The paper does not divide by ‖G‖²; see `memopt.projectors.grassmann`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the uncorrected second moment.
        growth_limit: the largest growth of the norm of S per step; None does not limit it.
        projector: "grassmann", any other name in `memopt.projectors`, or a projector, which has
            its own rank. But for "grassmann" and "power_iteration", successive subspaces may be far
            apart and V is carried by the rule of `memopt.CarryOver`, which keeps its size.
        seed: the seed of random projectors.
        as_released: follow the authors' code where `memopt.fira` follows that of Fira's, which it
            shares. Its other departures are faults that memopt never follows: it moves subspaces of
            matrices with more inputs than outputs only, and carries moments one step early, always
            from the first subspace, with V multiplied by 1 − b2.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `rank`, `refresh_every`, `scale` or `step_size` is out of range, the rank is
            larger than a matrix's side, or an option has no effect: rank, step_size or seed with a
            projector that has its own, step_size with one that has none, or seed with one that
            draws nothing.

    References:
        Rajabi et al., SubTrack++: Gradient Subspace Tracking for Scalable LLM Training, 2025,
        https://arxiv.org/abs/2502.01586, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> tx = memopt.subtrack(1e-2, rank=4)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 2·4·64 + 4·16 + 1 floats
        2308
    """
    space = projectors.by_name(projector, subtrack, rank=rank, step_size=step_size, seed=seed)
    if on_refresh == "carry":
        on_refresh = CarryOver(b1, b2, mean_outside=not space.stays_close)
    return fira(
        learning_rate,
        scale=scale,
        refresh_every=refresh_every,
        refresh_phase=refresh_phase,
        on_refresh=on_refresh,
        b1=b1,
        b2=b2,
        eps=eps,
        growth_limit=growth_limit,
        projector=space,
        as_released=as_released,
        **common,
    )
