"""SinkGD."""

from typing import Unpack

import optax

from memopt.errors import check_at_least
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.state.precision import in_float32
from memopt.transforms.normalization import sinkhorn


@method("SGD's memory: gradients normalised by row and column", learning_rate=1e-2)
def sinkgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    iterations: int = 5,
    scale: float = 0.05,
    momentum: float | None = None,
    axis: int = -2,
    norm: str = "rms",
    eps: float = 1e-8,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """SinkGD: gradients whose rows and columns are normalised in turns.

    For each matrix with gradient G, from X = G::

        x ← x / RMS(x)               for each row x of X        `iterations` times
        x ← x / RMS(x)               for each column x of X
        W ← W − lr · (scale · X + weight_decay · W)

    State: none for hidden matrices. Other parameters, the embedding and the output head among them,
    are updated by AdamW with the whole learning rate.

    Args:
        learning_rate: a number or a schedule.
        iterations: the number of iterations.
        scale: the size of the matrices' updates.
        momentum: None; or the decay of an average of gradients, which is normalised in place of G
            and is mn numbers of state per matrix.
        axis: the axis of ``(*stack, m, n)`` over which the last norms are taken, see
            `memopt.sinkhorn`; the paper does not say which side of its matrices are inputs.
        norm: "rms", or "l2", the root of the sum of squares.
        eps: the smallest norm to divide by.
        as_released: has no effect, since no code of the authors was found; every method has this
            switch.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `iterations` is below 1, `axis` or `norm` is unknown, or `scale` or `eps` is
            negative.

    References:
        Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training, 2025,
        https://arxiv.org/abs/2502.06742, Algorithm 4.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> memopt.state_bytes(memopt.sinkgd(2e-2), params)["up/kernel"]
        0
    """
    check_at_least("scale", scale, 0)
    average = optax.identity() if momentum is None else optax.ema(momentum, debias=False)
    steps = (
        average,
        sinkhorn(iterations, axis, norm, eps, matrices=common.get("matrices")),
        optax.scale(scale),
    )
    return finish(
        learning_rate, in_float32(optax.chain(*steps)), others=optax.scale_by_adam(), **common
    )
