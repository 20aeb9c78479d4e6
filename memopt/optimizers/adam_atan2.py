"""Adam-atan2."""

from typing import Unpack

import optax

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms.adam import scale_by_adam_atan2


@method("Adam without ε: gradients of any scale, models of any width", learning_rate=5e-4)
def adam_atan2(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    a: float = 1.27,
    b: float = 1.0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """Adam-atan2: Adam without an ε to tune, for gradients of any scale, at Adam's memory.

    ::

        M ← β₁ M + (1 − β₁) G
        V ← β₂ V + (1 − β₂) G²
        W ← W − lr · (a · atan2(M / (1 − β₁ᵗ), b · √(V / (1 − β₂ᵗ))) + weight_decay · W)

    All parameters are treated alike, including embeddings and norms. State: 2mn float32 numbers per
    matrix. `memopt.scale_by_width` gives each its learning rate at other widths.

    The defaults of `b2`, `a` and `b` are those of the public implementation that memopt's recorded
    runs are from (adam-atan2-pytorch). Another (adam-atan2, in CUDA) has a = b = 1 and β₂ = 0.999:
    its steps are a fifth smaller.

    Args:
        learning_rate: a number or a schedule.
        b1: β₁, the decay of the first moment.
        b2: β₂, the decay of the second moment.
        a: multiplies the update, which is at most aπ/2; 4/π ≈ 1.27 makes it one where M is the root
            of V, as Adam's is.
        b: multiplies the root of the second moment.
        as_released: has no effect, since the authors released no code; every method has this
            switch.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `b` is negative.

    References:
        Everett et al., Scaling Exponents Across Parameterizations and Optimizers, 2024,
        https://arxiv.org/abs/2407.05872.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"w": jnp.ones((4, 4))}
        >>> tx = memopt.adam_atan2(1e-3, weight_decay=0.1)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> round(float(updates["w"][0, 0]), 6)                   # -1e-3 · (1.27 · π/4 + 0.1)
        -0.001097
    """
    return finish(learning_rate, scale_by_adam_atan2(b1, b2, a=a, b=b), is_flat=True, **common)
