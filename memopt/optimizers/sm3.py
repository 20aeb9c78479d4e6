"""SM3."""

from typing import Unpack

import optax

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.state.precision import in_float32
from memopt.transforms.cover import scale_by_matrix_sm3


@method("AdaGrad with few numbers, for embeddings and sparse gradients", learning_rate=2e-2)
def sm3(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float | None = 0.9,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """SM3: AdaGrad with a bound for each row and column; m + n numbers per matrix if ``b1=None``.

    SM3-II with momentum, for each matrix of a stack, from R = C = 0::

        V = min(R, C) + G²                  the smaller of an entry's row and column
        R, C ← max_cols(V), max_rows(V)
        M ← β₁ M + (1 − β₁) G / √V          with 0 / 0 = 0
        W ← W − lr · (M + weight_decay · W)

    Steps shrink as 1/√t by themselves, as AdaGrad's: warm up to a constant learning rate. All
    parameters are treated alike; vectors keep sums of squares, as AdaGrad. `optax.sm3` is SM3-II
    with 1e-8 added to V, and takes a stack as one array of three axes. State: mn + m + n float32
    numbers per matrix, without momentum m + n.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the momentum; None for no momentum.
        as_released: has no effect, since the authors' code follows the paper; every method has this
            switch.
        **common: see `memopt.Common`.

    References:
        Anil et al., Memory-Efficient Adaptive Optimization, 2019, https://arxiv.org/abs/1901.11150,
        Algorithm SM3-II and section 4.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"w": jnp.ones((3, 16, 8))}
        >>> memopt.state_bytes(memopt.sm3(0.1, b1=None), params)["w"]   # 3·(16 + 8) floats
        288
    """
    moment = optax.identity() if b1 is None else optax.ema(b1, debias=False)
    scaled = scale_by_matrix_sm3(matrices=common.get("matrices"))
    return finish(learning_rate, in_float32(optax.chain(scaled, moment)), **common)
