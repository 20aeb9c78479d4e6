"""AMSGrad."""

from typing import Unpack

import optax

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms.adam import scale_by_raw_amsgrad


@method("Adam whose divisors never fall; when Adam does not converge", learning_rate=2e-4)
def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad: Adam with the largest second moment so far; for when Adam does not converge.

    ::

        M ← β₁ M + (1 − β₁) G
        V ← β₂ V + (1 − β₂) G²
        X ← max(X, V)
        W ← W − lr · (M / (√X + ε) + weight_decay · W)

    Step sizes of an entry never grow, so that one outlier shortens all later steps. Without bias
    correction the first steps are up to (1 − β₁) / √(1 − β₂) ≈ 3 times Adam's. `optax.amsgrad`
    takes the maximum of corrected moments, see `memopt.scale_by_raw_amsgrad`. All parameters are
    treated alike. State: 3mn float32 numbers per matrix.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root; the paper has none.
        as_released: follow PyTorch: M and X are corrected for their bias.
        **common: see `memopt.Common`.

    References:
        Reddi et al., On the Convergence of Adam and Beyond, 2018,
        https://openreview.net/forum?id=ryQu7f-RZ, Algorithm 2.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"w": jnp.ones((4, 8))}
        >>> tx = memopt.amsgrad(1e-3)
        >>> memopt.state_bytes(tx, params)["w"]                     # 3·4·8 floats
        384
    """
    moments = scale_by_raw_amsgrad(b1, b2, eps, debias=as_released)
    return finish(learning_rate, moments, **common)
