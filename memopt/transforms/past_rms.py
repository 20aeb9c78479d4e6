"""Division by the second moment of past gradients, and a bound that grows with the step (ADOPT)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_at_least
from memopt.state.precision import average, bounded, check_real, float32_zeros, statistics_dtype


class ScaleByPastRmsState(NamedTuple):
    """State of `scale_by_past_rms`.

    Attributes:
        count: steps taken, int32.
        nu: second moment, float32 or wider, shaped like the parameters.
    """

    count: Array  # type: ignore[assignment]
    nu: Any


@checked
def scale_by_past_rms(
    b2: float = 0.9999, eps: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the root of the second moment of those before.

    ::

        step 1:     V = G²,  U = 0
        afterwards: U = G / max(√V, ε)
                    V ← β₂ V + (1 − β₂) G²

    G is divided by a moment that does not depend on it, so that ADOPT converges with any β₂. An
    entry whose gradients were all zero is divided by ε; `clip_by_step` bounds its update. State:
    one number per parameter.

    Args:
        b2: decay of the second moment.
        eps: the least that is divided by.

    Returns:
        A transformation whose state is a `ScaleByPastRmsState`.

    References:
        Taniguchi et al., ADOPT: Modified Adam Can Converge with Any β₂ with the Optimal Rate, 2024,
        https://arxiv.org/abs/2411.02853.

    Example:
        >>> tx = scale_by_past_rms()
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in (2.0, 3.0):
        ...     u, state = tx.update(jnp.array([g]), state)
        ...     print(u.item())
        0.0
        1.5
    """

    def init(params: Any) -> ScaleByPastRmsState:
        check_real(params)
        return ScaleByPastRmsState(jnp.zeros((), jnp.int32), float32_zeros(params))

    def update(updates: Any, state: ScaleByPastRmsState, params: Any = None, **_: Any) -> Any:
        is_first = state.count == 0
        decay = jnp.where(is_first, 0, b2)

        def scaled(g: Array, v: Array) -> Array:
            u = bounded(g) / jnp.maximum(jnp.sqrt(v), eps)
            return jnp.where(is_first, 0, u).astype(g.dtype)

        squared = lambda g, v: average(decay, v, jnp.square(bounded(g)))
        count, nu = optax.safe_increment(state.count), jax.tree.map(squared, updates, state.nu)
        return jax.tree.map(scaled, updates, state.nu), ScaleByPastRmsState(count, nu)

    return optax.GradientTransformationExtraArgs(init, update)


class ClipByStepState(NamedTuple):
    """State of `clip_by_step`.

    Attributes:
        count: steps taken, int32.
    """

    count: Array  # type: ignore[assignment]


@checked
def clip_by_step(
    exponent: float = 0.25, *, delay: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Bounds every entry of an update by a power of the step, t^¼.

    U ← min(max(U, −c), c) with c = max(t − delay, 0)^exponent in step t = 1, 2, …. Place it after a
    transformation that normalises gradients, such as `optax.scale_by_adam`: the bound is lowest in
    early steps, whose second moment is an average of few gradients. State: the step count.

    Args:
        exponent: the power; ADOPT's is ¼.
        delay: the number of first steps whose bound is zero: 1 in ADOPT.

    Returns:
        A transformation whose state is a `ClipByStepState`.

    Raises:
        ValueError: if `exponent` or `delay` is negative.

    References:
        Taniguchi et al., ADOPT: Modified Adam Can Converge with Any β₂ with the Optimal Rate, 2024,
        https://arxiv.org/abs/2411.02853.

    Example:
        >>> tx = clip_by_step(0.5)
        >>> state = tx.init(jnp.zeros(2))
        >>> for _ in range(4):
        ...     u, state = tx.update(jnp.array([0.5, -7.0]), state)
        >>> u.tolist()
        [0.5, -2.0]
    """
    check_at_least("exponent", exponent, 0)
    check_at_least("delay", delay, 0)

    def init(params: Any) -> ClipByStepState:
        check_real(params)
        return ClipByStepState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: ClipByStepState, params: Any = None, **_: Any) -> Any:
        count = optax.safe_increment(state.count)

        def clipped(u: Array) -> Array:
            steps = jnp.maximum(count - delay, 0).astype(statistics_dtype(u))
            bound = jnp.where(steps > 0, jnp.maximum(steps, 1) ** exponent, 0).astype(u.dtype)
            return jnp.clip(u, -bound, bound)

        return jax.tree.map(clipped, updates), ClipByStepState(count)

    return optax.GradientTransformationExtraArgs(init, update)
