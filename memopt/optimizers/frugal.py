"""FRUGAL."""

from collections.abc import Sequence
from typing import Unpack

import optax
from jax import Array

from memopt.errors import check_choice
from memopt.optimizers.by_partition import Common, finish, inner_or_adam
from memopt.optimizers.registry import method
from memopt.transforms import projectors
from memopt.transforms.moments import CarryOver
from memopt.transforms.recombine import lift_and_residual, lift_and_sign
from memopt.transforms.subspace import in_subspace


@method("Adam for a share of your choice, signs for the rest", learning_rate=1e-3)
def frugal(
    learning_rate: optax.ScalarOrSchedule,
    *,
    density: float = 0.25,
    inactive: str = "sign",
    scale: float = 1.0,
    refresh_every: int = 200,
    refresh_phase: int | Sequence[int] = 0,
    on_refresh: str | CarryOver = "reset",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    inner: optax.GradientTransformation | None = None,
    projector: projectors.Projector | str = "columns",
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL: Adam for a part of each gradient, sign descent for the residual.

    ::

        R = down(G)                                the selected part, density ρ
        N = Adam(R)                                reset when another part is selected
        U = up(N) + scale · sign(G − up(R))
        W ← W − lr · (U + weight_decay · W)

    State: 2ρmn numbers per matrix and the step counts; with "svd" or "orthogonal", of rank ρp,
    also ρp² for the basis.

    Args:
        learning_rate: a number or a schedule.
        density: ρ, the fraction that Adam updates: one over a whole number for "columns",
            "coordinates" and "blocks"; otherwise the rank as a fraction of each matrix's shorter
            side.
        inactive: the update of the residual, "sign" or "sgd".
        scale: the learning rate of the residual, relative to Adam's.
        refresh_every: steps between two selections.
        refresh_phase: staggers refreshes over the matrices; see `memopt.in_subspace`.
        on_refresh: "reset" initializes Adam again, including its bias correction; "carry" projects
            the moments to the new subspace, as in the paper's appendix for SVD; see
            `memopt.in_subspace`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        inner: any Optax transformation, used in the subspace instead of Adam.
        projector: "columns", "coordinates", "blocks" (whole layers of a stack), "svd",
            "orthogonal", any other name in `memopt.projectors`, or a projector, which has its own
            density or rank.
        seed: the seed of the selections.
        as_released: has no effect, since the authors' code follows the paper, except in how a
            selection is drawn: that code draws any lines, memopt one of every 1/ρ.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `density` or `refresh_every` is out of range, `inactive` is unknown, or an
            option has no effect: `b1`, `b2` or `eps` with `inner`, density or seed with a projector
            that has its own, or seed with one that draws nothing.

    References:
        Zmushko et al., FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for
        Scalable Training, 2024, https://arxiv.org/abs/2411.07837, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> tx = memopt.frugal(1e-2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 2·16·16 floats
        2048
    """
    matrices = common.get("matrices")
    check_choice("inactive", inactive, ("sign", "sgd"))
    subspace = in_subspace(
        inner=inner_or_adam(inner, frugal, b1=b1, b2=b2, eps=eps),
        projector=projectors.by_name(projector, frugal, density=density, seed=seed),
        recombine=(lift_and_sign if inactive == "sign" else lift_and_residual)(scale),
        refresh_every=refresh_every,
        on_refresh=on_refresh,
        refresh_phase=refresh_phase,
        matrices=matrices,
    )
    return finish(learning_rate, subspace, others=optax.scale_by_adam(), **common)
