"""Weight decay as released codes apply it, for following them number by number.

`optax.add_decayed_weights` before the learning rate is the decay of the papers.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.transforms.clipping import rms

Decayed = Callable[[Layout, Array, Array], Array]
"""What decays, from the layout, the weights and their update."""


def weights(layout: Layout, w: Array, u: Array) -> Array:
    """The weights before the step."""
    return w


def updated_weights(layout: Layout, w: Array, u: Array) -> Array:
    """The weights after the step: the decay of APOLLO's, GaLore's and their kin's code."""
    return w + u


def rms_scaled_weights(min_scale: float = 1e-3) -> Decayed:
    """The weights times max(min_scale, RMS(W)): the decay of transformers' Adafactor."""
    return lambda layout, w, u: w * jnp.maximum(min_scale, rms(layout, w))


def decay_as_released(
    decayed: Decayed,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any = None,
    *,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Subtracts learning_rate · weight_decay · decayed(W, U) from a finished update U.

    It stands last in a chain, after the learning rate. State: the step count.

    Args:
      decayed: `weights`, `updated_weights`, or what `rms_scaled_weights` returns.
      learning_rate: a number or a schedule.
      weight_decay: the strength of the decay.
      mask: which leaves decay, as in ``optax.add_decayed_weights``.
      matrices: which leaves are matrices, and of which axes; see `memopt.matrices`.

    Example:
      >>> tx = decay_as_released(updated_weights, learning_rate=0.1, weight_decay=0.5)
      >>> w = jnp.array([[2.0]])
      >>> float(tx.update(jnp.array([[-1.0]]), tx.init(w), w)[0][0, 0])     # -1 - 0.05·(2-1)
      -1.0499999523162842
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        strength = rate * weight_decay

        def decay(layout: Layout, u: Array, w: Array) -> Array:
            return (u - strength * decayed(layout, w, u)).astype(u.dtype)

        updates = map_matrices(decay, updates, params, matrices=matrices, default=every_matrix)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    tx = optax.GradientTransformationExtraArgs(init, update)
    return tx if mask is None else optax.masked(tx, mask)
