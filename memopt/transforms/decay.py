"""Weight decay after the learning rate: of cautious decay, and of the authors' released code.

For the decay of most papers, use `optax.add_decayed_weights` before the learning rate.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from memopt.matrices import Layout, Matrices
from memopt.parameters import reading_whole_trees
from memopt.transforms.matrix_rms import rms
from memopt.transforms.per_matrix import per_matrix

Decayed = Callable[[Layout, Array, Array], Array]
"""A function of the layout, the weights and their update that returns the term to decay."""


def weights(layout: Layout, w: Array, u: Array) -> Array:
    """The weights before the step."""
    return w


def updated_weights(layout: Layout, w: Array, u: Array) -> Array:
    """The weights after the step, as in the released code of APOLLO, GaLore and related methods."""
    return w + u


def shrinking_weights(layout: Layout, w: Array, u: Array) -> Array:
    """The weights that the update makes smaller or leaves as they are, and 0 for the others."""
    return jnp.where((jnp.signbit(u) != jnp.signbit(w)) | (u == 0), w, 0)


def rms_scaled_weights(min_scale: float = 1e-3) -> Decayed:
    """The weights times max(min_scale, RMS(W)), as in the Adafactor of `transformers`."""
    return lambda layout, w, u: w * jnp.maximum(min_scale, rms(layout, w))


def decay_as_released(
    decayed: Decayed,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any = None,
    *,
    matrices: Matrices = None,
    state_type: Any = optax.ScaleByScheduleState,
) -> optax.GradientTransformationExtraArgs:
    """Subtracts learning_rate · weight_decay · decayed(W, U) from an update U.

    Place it last in a chain, after the learning rate. State: the step count.

    Args:
        decayed: `weights`, `updated_weights`, `shrinking_weights`, or a function returned by
            `rms_scaled_weights`.
        learning_rate: a number or a schedule.
        weight_decay: the strength of the decay.
        mask: which leaves decay, as in ``optax.add_decayed_weights``.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.
        state_type: the NamedTuple class of the state, whose only field is ``count``.

    Example:
        >>> tx = decay_as_released(updated_weights, learning_rate=0.1, weight_decay=0.5)
        >>> w = jnp.array([[2.0]])
        >>> float(tx.update(jnp.array([[-1.0]]), tx.init(w), w)[0][0, 0])     # -1 - 0.05·(2-1)
        -1.0499999523162842
    """
    rate = as_schedule(learning_rate)
    tx = per_matrix(
        functools.partial(subtract_decay, decayed=decayed),
        state_type,
        schedules={"strength": lambda count: rate(count) * weight_decay},
        reads_params=True,
        matrices=matrices,
    )
    return tx if mask is None else reading_whole_trees(optax.masked(tx, mask))


def subtract_decay(layout: Layout, u: Array, w: Array, *, decayed: Decayed, strength: Any) -> Array:
    """Computes U − strength · decayed(W, U)."""
    return (u - strength * decayed(layout, w, u)).astype(u.dtype)


def as_schedule(value: Any) -> optax.Schedule:
    """Returns a schedule as it is, and a number as one that is always this number.

    Example:
        >>> as_schedule(0.5)(3)
        0.5
    """
    return value if callable(value) else optax.constant_schedule(value)


def from_second_step(value: Any) -> Any:
    """Returns a number or a schedule as a schedule that is zero at the first step.

    For methods that move no parameter at their first step, as ADOPT and SOAP.

    Args:
        value: a number or a schedule.

    Example:
        >>> [float(from_second_step(0.5)(count)) for count in (0, 1)]
        [0.0, 0.5]
    """
    schedule = as_schedule(value)
    return lambda count: jnp.where(count > 0, schedule(count), 0.0)
