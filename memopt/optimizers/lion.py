"""Lion."""

from typing import Unpack

import optax
from jax.typing import DTypeLike

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms.sign_momentum import scale_by_sign_momentum


@method("half of AdamW's state; wants a smaller rate", learning_rate=2e-4)
def lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: DTypeLike | None = None,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """Lion: the sign of an interpolated momentum.

    ::

        U = sign(β₁ M + (1 − β₁) G)
        M ← β₂ M + (1 − β₂) G
        W ← W − lr · (U + weight_decay · W)

    Use a learning rate 3 to 10 times lower than AdamW's, and a weight decay higher by the same
    factor. All parameters are treated alike, including embeddings and norms. State: mn numbers per
    matrix.

    Args:
        learning_rate: a number or a schedule.
        b1: the weight of the momentum in the update.
        b2: the decay of the momentum.
        mu_dtype: the momentum's dtype; by default the parameter's.
        as_released: has no effect, since the authors' code follows the paper; every method has this
            switch.
        **common: see `memopt.Common`.

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
        https://arxiv.org/abs/2302.06675, Algorithm 2.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"w": jnp.ones((4, 4))}
        >>> tx = memopt.lion(1e-4, weight_decay=0.1)
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((4, 4))}, state, params)
    """
    momentum = scale_by_sign_momentum(b1, b2, mu_dtype=mu_dtype)
    return finish(learning_rate, momentum, is_flat=True, **common)
