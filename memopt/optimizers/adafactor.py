"""Adafactor."""

from typing import Unpack

import jax.numpy as jnp
import optax
from jax import Array

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common, finish, matrices_and_rest
from memopt.optimizers.registry import method
from memopt.renamed import keywords
from memopt.state.precision import in_float32
from memopt.transforms.decay import decay_as_released, rms_scaled_weights, weights
from memopt.transforms.factored import scale_by_factored_matrix_rms
from memopt.transforms.matrix_rms import clip_by_matrix_rms, scale_by_parameter_rms


def relative_step(count: Array) -> Array:
    """The paper's schedule, min(1e-2, 1/√t) with t = count + 1."""
    return jnp.minimum(1e-2, 1 / jnp.sqrt(count + 1.0))


@method("least state of the adaptive methods, proven in T5", learning_rate=5e-2)
@keywords(eps_scale="min_scale")
def adafactor(
    learning_rate: optax.ScalarOrSchedule = relative_step,
    *,
    b1: float | None = None,
    decay_rate: float = 0.8,
    clip_threshold: float | None = 1.0,
    scale_by_parameter: bool = True,
    eps: float = 1e-30,
    min_scale: float = 1e-3,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """Adafactor: a factored second moment of m + n numbers for an m×n matrix.

    With β₂ₜ = 1 − t^−decay_rate and t = count + 1, for each matrix::

        R ← β₂ₜ R + (1 − β₂ₜ) mean_cols(G² + ε₁)            m numbers
        C ← β₂ₜ C + (1 − β₂ₜ) mean_rows(G² + ε₁)            n numbers
        U = G / √(R C / mean(R))
        U ← max(ε₂, RMS(W)) · U / max(1, RMS(U) / clip_threshold)
        W ← W − lr · (U + weight_decay · W)

    All parameters are treated alike; vectors keep a full second moment. Each matrix of a stacked
    array has its own factorisation and root mean square. State: m + n float32 numbers per matrix,
    mn more with `b1`.

    Args:
        learning_rate: a number or a schedule, multiplied by RMS(W) if `scale_by_parameter`; by
            default the paper's min(1e-2, 1/√t).
        b1: decay of a first moment of the updates; None for no first moment.
        decay_rate: the second moment's decay is 1 − t^−decay_rate.
        clip_threshold: the largest root mean square of an update, d; None does not clip.
        scale_by_parameter: multiply the step by max(min_scale, RMS(W)).
        eps: ε₁, added to the squared gradient.
        min_scale: ε₂, the smallest parameter scale.
        as_released: follow the Adafactor of `transformers`: the first moment averages updates that
            are already multiplied by the learning rate, and the decay is multiplied by
            max(min_scale, RMS(W)) too.
        **common: see `memopt.Common`.

    References:
        Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, Algorithms 4 to 6.

    Example:
        >>> import memopt
        >>> params = {"w": jnp.ones((16, 8))}
        >>> tx = memopt.adafactor(1e-2)
        >>> memopt.state_bytes(tx, params).total                   # (16 + 8) floats and the count
        100
    """
    matrices = common.get("matrices")
    if not scale_by_parameter:
        check_unused(adafactor, "scale_by_parameter is off", min_scale=min_scale)
    steps = [scale_by_factored_matrix_rms(decay_rate, eps, matrices=matrices)]
    if clip_threshold is not None:
        steps.append(clip_by_matrix_rms(clip_threshold, matrices=matrices))
    if scale_by_parameter:
        steps.append(scale_by_parameter_rms(min_scale, matrices=matrices))
    moment = optax.identity() if b1 is None else in_float32(optax.ema(b1, debias=False))
    if as_released:
        rate = optax.scale_by_learning_rate(learning_rate)
        decayed = rms_scaled_weights(min_scale) if scale_by_parameter else weights
        strength, mask = common.get("weight_decay", 0.0), common.get("weight_decay_mask")
        decay = decay_as_released(decayed, learning_rate, strength, mask, matrices=matrices)
        chain = optax.chain(*steps, rate, moment, decay)
        return matrices_and_rest(chain, common.get("rest"), matrices)
    return finish(learning_rate, *steps, moment, is_flat=True, **common)
