"""Adafactor."""

from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from memopt.matrices import Matrices
from memopt.optimizers.by_partition import Ending, descend, matrices_and_rest
from memopt.optimizers.registry import method
from memopt.renamed import keywords
from memopt.state.precision import in_float32
from memopt.transforms.decay import decay_as_released, rms_scaled_weights, weights
from memopt.transforms.factored import scale_by_factored_matrix_rms
from memopt.transforms.matrix_rms import clip_by_matrix_rms, scale_by_parameter_rms


def relative_step(count: Array) -> Array:
    """The paper's schedule, min(1e-2, 1/√t) with t = count + 1."""
    return jnp.minimum(1e-2, 1 / jnp.sqrt(count + 1.0))


@method()
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
    matrices: Matrices = None,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor: a second moment of m + n numbers for an m×n matrix.

    Every parameter is treated alike; vectors keep a full second moment. A stacked array is as
    many factorisations, each with a root mean square of its own. State: m + n float32 numbers
    a matrix, mn more with `b1`.

    Args:
      learning_rate: a number or a schedule, multiplied by RMS(W) if `scale_by_parameter`; by
        default the paper's min(1e-2, 1/√t).
      b1: decay of a first moment of the updates; None keeps none.
      decay_rate: the second moment's decay is 1 − t^−decay_rate.
      clip_threshold: the largest root mean square of an update, d; None does not clip.
      scale_by_parameter: multiply the step by max(min_scale, RMS(W)).
      eps: ε₁, added to the squared gradient.
      min_scale: ε₂, the least parameter scale.
      matrices: which leaves are factored, and of which axes; by default
        `memopt.matrices.every_matrix`.
      rest: what updates the leaves that are no hidden matrices; None is Adafactor for all.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: which leaves decay, as in ``optax.adamw``.
      as_released: as in transformers' Adafactor, the first moment averages what the learning
        rate already multiplies, and the decay is multiplied by max(min_scale, RMS(W)) too.

    References:
      Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, Algorithms 4 to 6.

    Example:
      >>> import memopt
      >>> params = {"w": jnp.ones((16, 8))}
      >>> tx = memopt.adafactor(1e-2)
      >>> memopt.state_bytes(tx, params).total                   # (16 + 8) floats and the count
      100
    """
    steps = [scale_by_factored_matrix_rms(decay_rate, eps, matrices=matrices)]
    if clip_threshold is not None:
        steps.append(clip_by_matrix_rms(clip_threshold, matrices=matrices))
    if scale_by_parameter:
        steps.append(scale_by_parameter_rms(min_scale, matrices=matrices))
    moment = optax.identity() if b1 is None else in_float32(optax.ema(b1, debias=False))
    ending = Ending(learning_rate, weight_decay, weight_decay_mask, matrices, rest)
    if as_released:
        rate = optax.scale_by_learning_rate(learning_rate)
        decayed = rms_scaled_weights(min_scale) if scale_by_parameter else weights
        decay = decay_as_released(decayed, *ending[:3], matrices=matrices)
        return matrices_and_rest(optax.chain(*steps, rate, moment, decay), rest, matrices)
    return matrices_and_rest(optax.chain(*steps, moment, *descend(ending)), rest, matrices)
