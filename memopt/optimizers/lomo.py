"""LOMO."""

from typing import Unpack

import optax

from memopt.errors import check_at_least
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method


@method("no state at all: the largest model that fits, with --release", learning_rate=1e-1)
def lomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    clip_value: float | None = None,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """LOMO: stochastic gradient descent that can run during the backward pass.

    ::

        W ← W − lr · (clip(G, ±clip_value) + weight_decay · W)

    The chain is plain SGD; the training loop decides whether each gradient is used and freed as
    soon as it exists. It clips elementwise, since the global norm is not known before the last
    gradient. All parameters are treated alike. State: none.

    Args:
        learning_rate: a number or a schedule; a schedule keeps its step count.
        clip_value: the largest magnitude of a gradient's entry; None does not clip.
        as_released: has no effect, since the authors' code follows the paper; every method has this
            switch.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `clip_value` is negative.

    References:
        Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources,
        2023, https://arxiv.org/abs/2306.09782, section 3.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> tx = memopt.lomo(0.1, clip_value=1.0)
        >>> updates, _ = tx.update(jnp.array([0.5, -3.0]), tx.init(jnp.zeros(2)), jnp.zeros(2))
        >>> [round(float(u), 3) for u in updates]
        [-0.05, 0.1]
    """
    return finish(learning_rate, clip_entries(clip_value), **common)


def clip_entries(clip_value: float | None) -> optax.GradientTransformation:
    """Clips gradients elementwise; None does not clip."""
    check_at_least("clip_value", clip_value, 0)
    return optax.identity() if clip_value is None else optax.clip(clip_value)
