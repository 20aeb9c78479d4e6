"""FRUGAL."""

from collections.abc import Sequence
from typing import Any

import optax
from jax import Array

from memopt.errors import check_choice
from memopt.matrices import Matrices
from memopt.optimizers.by_partition import adamw_for_rest, descend, matrices_and_rest
from memopt.transforms import projectors
from memopt.transforms.moments import CarryOver
from memopt.transforms.recombine import lift_and_rest, lift_and_sign
from memopt.transforms.subspace import in_subspace


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
    matrices: Matrices = None,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    seed: int | Array = 0,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL: Adam for a part of each gradient, sign descent for the rest.

    ::

        R = down(G)                                the chosen part, density ρ
        N = Adam(R)                                anew when another part is chosen
        U = up(N) + scale · sign(G − up(R))
        W ← W − lr · (U + weight_decay · W)

    State: 2ρmn numbers a matrix and the step counts; with "svd" or "orthogonal", of rank ρp,
    also ρp² for the basis.

    Args:
      learning_rate: a number or a schedule.
      density: ρ, the part that Adam sees: 1 over a whole number for "columns", "coordinates"
        and "blocks"; else the rank as a fraction of each matrix's shorter side.
      inactive: what updates the rest, "sign" or "sgd".
      scale: the learning rate of the rest, relative to Adam's.
      refresh_every: steps between two choices.
      refresh_phase: staggers them over the matrices; see `memopt.in_subspace`.
      on_refresh: "reset" begins anew, bias correction too; "carry" re-projects the moments, as
        the paper's appendix does for SVD; see `memopt.in_subspace`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      inner: runs in the subspace in Adam's place: any Optax transformation.
      projector: "columns", "coordinates", "blocks" (whole layers of a stack), "svd",
        "orthogonal", any other name in `memopt.projectors`, or a projector, which then says
        density or rank itself.
      matrices: which leaves are hidden matrices, and of which axes; see
        `memopt.hidden_matrices`.
      rest: what updates the other leaves; by default AdamW at the same learning rate and decay.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: which leaves decay, as in ``optax.adamw``.
      seed: what the choices depend on.
      as_released: nothing here departs from the authors' code but how a choice is drawn: there
        any lines, here one of every 1/ρ.

    Raises:
      ValueError: if `density` or `refresh_every` is out of range, or `inactive` unknown.

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
    check_choice("inactive", inactive, ("sign", "sgd"))
    rule = (lift_and_sign if inactive == "sign" else lift_and_rest)(scale)
    projector = projectors.by_name(projector, density, seed=seed)
    subspace = in_subspace(
        *(inner or optax.scale_by_adam(b1, b2, eps), projector, rule, refresh_every, on_refresh),
        refresh_phase=refresh_phase,
        matrices=matrices,
    )
    decay = (weight_decay, weight_decay_mask)
    if rest is None:
        rest = adamw_for_rest(learning_rate, *decay)
    return matrices_and_rest(optax.chain(subspace, descend(learning_rate, *decay)), rest, matrices)
