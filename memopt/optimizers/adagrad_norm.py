"""AdaGrad-Norm."""

from typing import Unpack

import optax

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms.past_norms import scale_by_past_norms


@method("SGD that adapts its steps to the norms of gradients", learning_rate=1.0)
def adagrad_norm(
    learning_rate: optax.ScalarOrSchedule,
    *,
    initial: float = 1e-2,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad-Norm: SGD whose steps shrink with the norms of all gradients so far.

    For each matrix of a stack, from S = initial::

        S ← S + ‖G‖²
        W ← W − lr · (G / √S + weight_decay · W)

    The paper has one S for all parameters, as of a model that is one matrix. Here each matrix and
    each vector has one: none waits for the gradients of others, and a stack is treated as its
    layers are. Steps shrink as 1/√t by themselves: warm up to a constant learning rate. All
    parameters are treated alike. State: 1 float32 number per matrix.

    Args:
        learning_rate: a number or a schedule; the norm of each matrix's first step.
        initial: S before the first step.
        as_released: keep a sum for each output of a matrix, and for each entry of a vector, as the
            code of AdAdaGrad does; it is AdaGrad for vectors. That code adds 1e-10 to √S, and
            decays by the gradient instead of the weights, which is not followed.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `initial` is not above 0.

    References:
        Ward et al., AdaGrad Stepsizes: Sharp Convergence over Nonconvex Landscapes, 2018,
        https://arxiv.org/abs/1806.01811, Algorithm 1; Lau et al., AdAdaGrad, 2024,
        https://arxiv.org/abs/2402.11215, and their code, for `initial`.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"w": jnp.ones((3, 16, 8))}
        >>> memopt.state_bytes(memopt.adagrad_norm(0.1), params)["w"]   # 3 floats
        12
    """
    scaled = scale_by_past_norms(initial, per_column=as_released, matrices=common.get("matrices"))
    return finish(learning_rate, scaled, **common)
