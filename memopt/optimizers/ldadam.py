"""LDAdam."""

from typing import Unpack

import optax
from jax import Array

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms import projectors
from memopt.transforms.moments import CarryOver
from memopt.transforms.recombine import lift, lift_with_error_feedback
from memopt.transforms.subspace import in_subspace


@method("Adam in a subspace of each step's own: better than AdamW", learning_rate=5e-3)
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    rho: float = 0.908,
    error_feedback: bool = True,
    refresh_every: int = 1,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    projector: projectors.Projector | str = "power_iteration",
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: Adam in a subspace that changes at each step, with error feedback.

    With T = PᵀP_before, the change of basis from the old subspace to the new one::

        A = G + E                                  E is the residual of earlier steps
        B = ρ · P_before M̂ + (1 − ρ) · A
        P ← qr(B BᵀP_before)                       one power iteration
        R = PᵀA
        M, V ← T M, |T² (V̂ − M̂²) + (T M̂)²|         T² elementwise
        N = Adam(R; M, V)
        E ← A − P R + β₁/(1−β₁) · (P_before M_before − P T M_before)
        W ← W − lr · (P N + weight_decay · W)

    State: 2rq + rp + mn numbers for a matrix of sides p ≤ q; mn of them are E, which only error
    feedback has and which the authors keep in the gradients' buffer.

    Args:
        learning_rate: a number or a schedule.
        rank: the rank r of the subspace, a whole number from 1; below 1, a fraction of each
            matrix's shorter side.
        rho: ρ, the weight of the momentum in the subspace.
        error_feedback: keep E; without it the part of A outside the subspace is dropped.
        refresh_every: steps between two refreshes of the subspace.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        projector: "power_iteration", any other name in `memopt.projectors`, or a projector, which
            has its own rank. But for "power_iteration" and "grassmann", successive subspaces may be
            far apart and V is carried by the rule of `memopt.CarryOver`, which keeps its size.
        seed: the seed of random projectors.
        as_released: follow the authors' code, which squares T² once more, and updates all other
            parameters with the same b1 and b2.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `rank` or `refresh_every` is out of range, the rank is larger than a matrix's
            side, or an option has no effect: rank, rho or seed with a projector that has its own,
            rho with one that has none, or seed with one that draws nothing.
        IncompatiblePairingError: for error feedback with a projector whose bases are not
            orthonormal.

    References:
        Robert et al., LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics,
        2024, https://arxiv.org/abs/2410.16103, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> tx = memopt.ldadam(1e-2, rank=4, error_feedback=False)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 2·4·64 + 4·16 floats
        2304
    """
    matrices = common.get("matrices")
    space = projectors.by_name(projector, ldadam, known={"b1": b1}, rank=rank, rho=rho, seed=seed)
    subspace = in_subspace(
        inner=optax.scale_by_adam(b1, b2, eps),
        projector=space,
        recombine=lift_with_error_feedback(b1) if error_feedback else lift(),
        refresh_every=refresh_every,
        on_refresh=CarryOver(
            b1, b2, power=4 if as_released else 2, mean_outside=not space.stays_close
        ),
        matrices=matrices,
    )
    others = optax.scale_by_adam(b1, b2) if as_released else optax.scale_by_adam()
    return finish(learning_rate, subspace, others=others, **common)
