"""GaLore."""

import functools
from collections.abc import Sequence
from typing import Unpack

import optax
from jax import Array

from memopt.errors import check_at_least
from memopt.optimizers.by_partition import Common, finish, inner_or_adam
from memopt.optimizers.registry import method
from memopt.transforms import projectors
from memopt.transforms.adam import scale_by_released_adam
from memopt.transforms.decay import updated_weights
from memopt.transforms.recombine import lift
from memopt.transforms.subspace import in_subspace


@method("Adam in a subspace: the best known of its kind", learning_rate=1e-2, sums_projections=True)
def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    scale: float = 0.25,
    refresh_every: int = 200,
    refresh_phase: int | Sequence[int] = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    inner: optax.GradientTransformation | None = None,
    projector: projectors.Projector | str = "randomized_svd",
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam in the subspace of the gradient's leading singular vectors.

    ::

        P ← leading r singular vectors of G        every `refresh_every` steps
        R = PᵀG                                    r×n (or G P, m×r, if m > n)
        N = Adam(R)                                moments are kept when P changes
        W ← W − lr · (scale · P N + weight_decay · W)

    State: 2rq + rp numbers for a matrix of sides p ≤ q, and the step counts.

    Args:
        learning_rate: a number or a schedule.
        rank: the rank r of the subspace, a whole number from 1; below 1, a fraction of each
            matrix's shorter side.
        scale: the scale of the lifted update, α.
        refresh_every: steps between two refreshes of the subspace.
        refresh_phase: staggers refreshes over the matrices; see `memopt.in_subspace`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        inner: any Optax transformation, used in the subspace instead of Adam.
        projector: "randomized_svd", "svd", any other name in `memopt.projectors`, or a projector,
            which has its own rank.
        seed: the seed of random projectors.
        as_released: follow the authors' code: ε is added before Adam's bias correction, also for
            all other parameters, and decay applies to the weights after the step.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `rank`, `refresh_every` or `scale` is out of range, the rank is larger than a
            matrix's side, or an option has no effect: `b1`, `b2` or `eps` with `inner`, rank or
            seed with a projector that has its own, or seed with one that draws nothing.

    References:
        Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, 2024,
        https://arxiv.org/abs/2403.03507, Algorithm 2.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> tx = memopt.galore(1e-2, rank=4)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 2·4·64 + 4·16 floats
        2304
    """
    matrices = common.get("matrices")
    check_at_least("scale", scale, 0)
    project = functools.partial(
        in_subspace,
        projector=projectors.by_name(projector, galore, rank=rank, seed=seed),
        recombine=lift(),
        refresh_every=refresh_every,
        refresh_phase=refresh_phase,
        matrices=matrices,
    )
    if as_released:
        adam = scale_by_released_adam(b1, b2, eps)
        steps = (project(inner or adam), optax.scale(scale))
        return finish(learning_rate, *steps, others=adam, decayed=updated_weights, **common)
    adam = inner_or_adam(inner, galore, b1=b1, b2=b2, eps=eps)
    return finish(
        learning_rate, project(adam), optax.scale(scale), others=optax.scale_by_adam(), **common
    )
