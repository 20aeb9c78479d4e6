"""Flora."""

import functools
from typing import Unpack

import optax
from jax import Array

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.renamed import keywords
from memopt.transforms import projectors
from memopt.transforms.factored import scale_by_factored_matrix_rms
from memopt.transforms.matrix_rms import clip_by_matrix_rms, scale_by_parameter_rms
from memopt.transforms.recombine import lift, lift_and_residual
from memopt.transforms.subspace import in_subspace


@method(
    "fine-tuning: momentum in few numbers over Adafactor", learning_rate=1e-3, sums_projections=True
)
@keywords(eps_scale="min_scale")
def flora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    b1: float = 0.9,
    refresh_every: int = 1000,
    decay_rate: float = 0.8,
    clip_threshold: float | None = 1.0,
    scale_by_parameter: bool | None = None,
    eps: float = 1e-30,
    min_scale: float = 1e-3,
    projector: projectors.Projector | str = "gaussian",
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """Flora: Adafactor with a momentum that is kept in a random subspace.

    With Â the gradient divided by the root of Adafactor's factored second moment and clipped::

        P ~ N(0, 1/r)                              drawn from the seed, never stored
        M ← P_newᵀ P_old M                         when a new P is drawn
        M ← β₁ M + (1 − β₁) PᵀÂ                    r×n (or m×r, if m > n)
        W ← W − lr · (P M + weight_decay · W)

    State: rq + m + n numbers for a matrix of longer side q. All other parameters, including the
    embedding, are updated by Adafactor with full-size momentum, unless `rest` replaces it.

    Args:
        learning_rate: a number or a schedule.
        rank: the rank r of the subspace, a whole number from 1; below 1, a fraction of each
            matrix's shorter side.
        b1: decay of the momentum.
        refresh_every: steps between two projections, κ.
        decay_rate: the second moment's decay is 1 − t^−decay_rate.
        clip_threshold: the largest root mean square of Â, as in Adafactor; None, as in Flora's
            paper, does not limit it. One entry far larger than its row and column then makes all
            others large for many steps.
        scale_by_parameter: multiply Â by max(min_scale, RMS(W)); off by default.
        eps: ε₁, added to the squared gradient.
        min_scale: ε₂, the smallest parameter scale.
        projector: "gaussian", any other name in `memopt.projectors`, or a projector, which has its
            own rank and seed.
        seed: the seed of the projections.
        as_released: follow the authors' PyTorch code: the newest update is added uncompressed;
            clipping and parameter scale (by default on) come after the momentum; and a new subspace
            is drawn one step earlier and lifted from one step later. That code keeps full-size
            momentum for matrices with one side four times the other or below the rank; use
            `matrices` to do the same.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `rank` or `refresh_every` is out of range, the rank is larger than a matrix's
            side, or an option has no effect: rank or seed with a projector that has its own, or
            seed with one that draws nothing.

    References:
        Hao et al., Flora: Low-Rank Adapters Are Secretly Gradient Compressors, 2024,
        https://arxiv.org/abs/2402.03293, Algorithm 2.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> tx = memopt.flora(1e-2, rank=4)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 4·64 + 64 + 16 floats
        1344
    """
    if as_released:
        scale_by_parameter = scale_by_parameter is not False
    matrices = common.get("matrices")
    if not scale_by_parameter:
        check_unused(flora, "scale_by_parameter is off", min_scale=min_scale)
    clip = resize = optax.identity()
    normalize = scale_by_factored_matrix_rms(decay_rate, eps, matrices=matrices)
    if clip_threshold is not None:
        clip = clip_by_matrix_rms(clip_threshold, matrices=matrices)
    if scale_by_parameter:
        resize = scale_by_parameter_rms(min_scale, matrices=matrices)
    momentum = functools.partial(
        in_subspace,
        inner=optax.ema(b1, debias=False),
        projector=projectors.by_name(projector, flora, rank=rank, seed=seed),
        refresh_every=refresh_every,
        on_refresh="carry",
        matrices=matrices,
    )
    if as_released:
        newest = lift_and_residual(1 - b1, recover=b1)
        released = momentum(recombine=newest, refresh_phase=1)
        return finish(learning_rate, normalize, released, clip, resize, **common)
    return finish(learning_rate, normalize, clip, resize, momentum(recombine=lift()), **common)
