"""Clipping by the global norm of the gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes, varying_as_any
from memopt.checked import checked
from memopt.state.precision import bounded


class ClipByGradientNormState(NamedTuple):
    """State of `clip_by_gradient_norm` with `previous`.

    Attributes:
        norm: the gradient norm of the previous step, float32; zero before the first step.
    """

    norm: Array


@checked
def clip_by_gradient_norm(
    max_norm: float, *, previous: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients down to a global norm of at most `max_norm`.

    G ← G · min(1, max_norm / ‖all G‖), as ``optax.clip_by_global_norm``. The norm is the extra
    argument `gradient_norm` if the training step passes it, as memopt's steps do, so that a step
    that never holds all gradients can use this too; otherwise it is the norm of the given updates.

    Args:
        max_norm: the largest norm that is not scaled down.
        previous: use the norm of the previous step, which is known before this step's gradients;
            the first step is not clipped. State: one number. By default there is no state.

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
        https://arxiv.org/abs/1211.5063, Algorithm 1.

    Example:
        >>> tx = clip_by_gradient_norm(1.0, previous=True)
        >>> state = tx.init(jnp.zeros(2))
        >>> for g in [4.0, 1.0, 1.0]:
        ...     u, state = tx.update(jnp.array([g, 0.0]), state)
        ...     print(u[0])
        4.0
        0.25
        1.0
    """

    def init(params: Any) -> Any:
        if not previous:
            return optax.EmptyState()
        return ClipByGradientNormState(varying_as_any(params, jnp.zeros((), jnp.float32)))

    def clip(updates: Any, state: Any, gradient_norm: Any) -> Any:
        if gradient_norm is None:
            gradient_norm = global_norm(updates)
        norm = state.norm if previous else gradient_norm
        factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
        updates = jax.tree.map(lambda u: (bounded(u) * factor).astype(u.dtype), updates)
        if previous:
            state = ClipByGradientNormState(jnp.asarray(gradient_norm, jnp.float32))
        return updates, state

    def update(
        updates: Any, state: Any, params: Any = None, *, gradient_norm: Any = None, **_: Any
    ) -> Any:
        return on_auto_axes(clip, (updates, state, gradient_norm), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def global_norm(gradients: Any) -> Array:
    """The norm of all gradients, float32 or wider.

    Finite entries beyond 2⁵⁰ ≈ 1e15 count as that; with an infinite one the norm is infinite.
    """
    visible = lambda x: jnp.where(jnp.isinf(x), x, bounded(x))
    return optax.tree.norm(jax.tree.map(visible, gradients))
