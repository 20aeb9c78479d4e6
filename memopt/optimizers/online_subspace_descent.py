"""Online Subspace Descent."""

from typing import Unpack

import optax

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common
from memopt.optimizers.galore import galore
from memopt.optimizers.registry import method
from memopt.transforms import projectors
from memopt.transforms.projectors.replay import Replay


@method("GaLore without SVD: its subspace is learnt", learning_rate=2e-3, sums_projections=True)
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    scale: float = 1.0,
    projector_learning_rate: optax.ScalarOrSchedule = 5e-3,
    projector_optimizer: optax.GradientTransformation | None = None,
    penalty: float = 0.1,
    start: projectors.Projector | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    inner: optax.GradientTransformation | None = None,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """Online Subspace Descent: GaLore with a subspace that is updated by its own optimizer.

    With Ĝ = G / ‖G‖::

        R = PᵀG                                    r×n (or G P, m×r, if m > n)
        N = Adam(R)
        W ← W − lr · (scale · P N + weight_decay · W)
        P ← P − step(∇ (‖P PᵀĜ − Ĝ‖² + penalty · ‖PᵀP − I‖²))

    P starts from singular vectors of the first gradient; later gradients are not decomposed. The
    first step, and a gradient of zeros, leave P unchanged; the released code divides by the
    gradient's norm, which gives NaN.

    State: 2rq + 3rp + 1 numbers for a matrix of sides p ≤ q, and the step counts; 2rp + 1 of them
    belong to P's own Adam.

    Args:
        learning_rate: a number or a schedule.
        rank: the rank r of the subspace, a whole number from 1; below 1, a fraction of each
            matrix's shorter side.
        scale: the scale of the lifted update; 0.25 in the authors' scripts.
        projector_learning_rate: the learning rate of P's own Adam, a number or a schedule.
        projector_optimizer: updates P instead, with its own learning rate.
        penalty: λ, which keeps P nearly orthonormal.
        start: the projector that gives the first P; by default a randomised SVD.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        inner: any Optax transformation, used in the subspace instead of Adam.
        as_released: follow the authors' code: no penalty, AdamW with decay 0.01 for P, and
            otherwise as in `galore`.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `rank` or `scale` is out of range, the rank is larger than a matrix's side,
            or an option has no effect: `b1`, `b2` or `eps` with `inner`, `projector_learning_rate`
            with `projector_optimizer`, `penalty` with `as_released`.

    References:
        Liang et al., Memory-Efficient LLM Training with Online Subspace Descent, 2024,
        https://arxiv.org/abs/2408.12857, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> tx = memopt.online_subspace_descent(1e-2, rank=4)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 2·4·64 + 3·4·16 + 1 numbers
        2820
    """
    if projector_optimizer is not None:
        own = {"projector_learning_rate": projector_learning_rate}
        check_unused(online_subspace_descent, "projector_optimizer has its own", **own)
    else:
        decay = 0.01 if as_released else 0.0
        projector_optimizer = optax.adamw(projector_learning_rate, weight_decay=decay)
    # The rank of a replay is that of its matrices.
    if start is not None and not isinstance(start, Replay) and rank != start.rank:
        check_unused(online_subspace_descent, "start has its own", rank=rank)
    if as_released:
        check_unused(online_subspace_descent, "the authors' code has none", penalty=penalty)
    projector = projectors.online_pca(
        rank, optimizer=projector_optimizer, penalty=0.0 if as_released else penalty, start=start
    )
    return galore(
        learning_rate,
        scale=scale,
        b1=b1,
        b2=b2,
        eps=eps,
        inner=inner,
        projector=projector,
        as_released=as_released,
        **common,
    )
