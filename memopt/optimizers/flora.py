"""Flora."""

import functools
from typing import Any

import optax
from jax import Array

from memopt.matrices import Matrices
from memopt.optimizers.by_partition import Ending, finish
from memopt.optimizers.registry import method
from memopt.renamed import keywords
from memopt.transforms import projectors
from memopt.transforms.factored import scale_by_factored_matrix_rms
from memopt.transforms.matrix_rms import clip_by_matrix_rms, scale_by_parameter_rms
from memopt.transforms.recombine import lift, lift_and_residual
from memopt.transforms.subspace import in_subspace


@method(sums_projections=True)
@keywords(eps_scale="min_scale")
def flora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 0.25,
    b1: float = 0.9,
    refresh_every: int = 1000,
    decay_rate: float = 0.8,
    clip_threshold: float | None = None,
    scale_by_parameter: bool | None = None,
    eps: float = 1e-30,
    min_scale: float = 1e-3,
    projector: projectors.Projector | str = "gaussian",
    matrices: Matrices = None,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    seed: int | Array = 0,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Flora: Adafactor with a momentum that is kept in a random subspace.

    With Â the gradient over the root of Adafactor's factored second moment::

        P ~ N(0, 1/r)                              drawn from the seed, never kept
        M ← P_newᵀ P_old M                         when a new P is drawn
        M ← β₁ M + (1 − β₁) PᵀÂ                    r×n (or m×r, where m > n)
        W ← W − lr · (P M + weight_decay · W)

    State: rq + m + n numbers for a matrix of longer side q. What is no hidden matrix, the
    embedding too, has Adafactor with a momentum of full size unless `rest` says otherwise.

    Args:
      learning_rate: a number or a schedule.
      rank: r, or a fraction of each matrix's shorter side.
      b1: decay of the momentum.
      refresh_every: steps between two projections, κ.
      decay_rate: the second moment's decay is 1 − t^−decay_rate.
      clip_threshold: the largest root mean square of Â; by default, as the paper's rule has it,
        Â is not clipped.
      scale_by_parameter: multiply Â by max(min_scale, RMS(W)); by default not.
      eps: ε₁, added to the squared gradient.
      min_scale: ε₂, the least parameter scale.
      projector: "gaussian", any other name in `memopt.projectors`, or a projector, which then
        says rank and seed itself.
      matrices: which leaves have their momentum in a subspace, and of which axes, by default
        `memopt.hidden_matrices`. Leaves that it is given and leaves out have a second
        moment of full size; by default every matrix's is factored.
      rest: what updates the other leaves.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: which leaves decay, as in ``optax.adamw``.
      seed: what the projections are drawn from.
      as_released: follow the authors' PyTorch code: the newest update enters uncompressed,
        clipping, by default at 1, and parameter scale, by default on, come after the momentum,
        and a new subspace comes one step earlier and is lifted from one step later. That code
        keeps the whole momentum of matrices with one side four times the other or below the
        rank; `matrices` can say so.

    Raises:
      ValueError: if `rank` or `refresh_every` is out of range, the rank larger than a matrix's
        side, or an option given that has no effect: rank or seed beside a projector that has its
        own, or seed beside one that draws nothing.

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
        clip_threshold = 1.0 if clip_threshold is None else clip_threshold
        scale_by_parameter = scale_by_parameter is not False
    on = {"matrices": matrices}
    normalize = scale_by_factored_matrix_rms(decay_rate, eps, **on)
    clip = optax.identity() if clip_threshold is None else clip_by_matrix_rms(clip_threshold, **on)
    resize = scale_by_parameter_rms(min_scale, **on) if scale_by_parameter else optax.identity()
    momentum = functools.partial(
        in_subspace,
        inner=optax.ema(b1, debias=False),
        projector=projectors.by_name(projector, flora, rank=rank, seed=seed),
        refresh_every=refresh_every,
        on_refresh="carry",
        **on,
    )
    ending = Ending(learning_rate, weight_decay, weight_decay_mask, matrices, rest)
    if as_released:
        newest = lift_and_residual(1 - b1, recover=b1)
        released = momentum(recombine=newest, refresh_phase=1)
        return finish(ending, normalize, released, clip, resize)
    return finish(ending, normalize, clip, resize, momentum(recombine=lift()))
