"""ADOPT."""

import numbers
from typing import Unpack

import optax

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.state.precision import in_float32
from memopt.transforms.decay import from_second_step
from memopt.transforms.past_rms import clip_by_step, scale_by_past_rms


@method("Adam that converges with any b2", learning_rate=1e-3)
def adopt(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.9999,
    eps: float = 1e-6,
    clip_exponent: float | None = 0.25,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """ADOPT: Adam that divides by the second moment of past gradients; converges with any β₂.

    ::

        step 0:  V = G², and W stays
        step t:  U = clip(G / max(√V, ε), ±t^clip_exponent)
                 M ← β₁ M + (1 − β₁) U
                 W ← W − lr · (M + weight_decay · W)
                 V ← β₂ V + (1 − β₂) G²

    All parameters are treated alike. State: 2mn float32 numbers per matrix.

    Args:
        learning_rate: a number or a schedule, which counts step 0, too.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: the least that gradients are divided by.
        clip_exponent: entries of U are bounded by t to this power; None does not bound them: an
            entry whose first gradients are zeros then takes a step of G / ε.
        as_released: has no effect, since the authors' code follows the paper; every method has this
            switch. By default that code adds the decay to the gradient: place
            `optax.add_decayed_weights` before `memopt.adopt`.
        **common: see `memopt.Common`. Step 0 does not decay; behind `optax.contrib.adopt`,
            `optax.add_decayed_weights` does.

    Raises:
        ValueError: if `clip_exponent` is negative.

    References:
        Taniguchi et al., ADOPT: Modified Adam Can Converge with Any β₂ with the Optimal Rate, 2024,
        https://arxiv.org/abs/2411.02853, Algorithm 2.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"w": jnp.ones(1)}
        >>> tx = memopt.adopt(1.0, weight_decay=0.1)
        >>> state = tx.init(params)
        >>> for g in (2.0, 1.0):
        ...     updates, state = tx.update({"w": jnp.array([g])}, state, params)
        ...     print(round(updates["w"].item(), 3))          # the second: -(0.1·1/2 + 0.1·1)
        -0.0
        -0.15
    """
    steps = [scale_by_past_rms(b2, eps)]
    if clip_exponent is not None:
        steps.append(clip_by_step(clip_exponent, delay=1))
    steps.append(optax.ema(b1, debias=False))
    decay = common.get("weight_decay", 0.0)
    if not isinstance(decay, numbers.Real) or decay:
        common["weight_decay"] = from_second_step(decay)
    return finish(learning_rate, in_float32(optax.chain(*steps)), **common)
