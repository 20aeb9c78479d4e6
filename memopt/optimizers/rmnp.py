"""RMNP."""

from typing import Unpack

import optax

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.state.precision import in_float32
from memopt.transforms.normalization import normalize_neurons
from memopt.transforms.orthogonalization import scale_by_matrix_shape


@method("Muon's momentum without its matrix products", learning_rate=5e-3)
def rmnp(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float = 0.95,
    nesterov: bool = False,
    shape_scale: str | None = None,
    eps: float = 1e-12,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """RMNP: momentum, normalised for each neuron, where Muon orthogonalises it.

    For each matrix with gradient G, and for the momentum m of each output's weights::

        M ← β M + G
        u = m / ‖m‖₂
        W ← W − lr · (U + weight_decay · W)

    State: mn numbers per matrix. It is `memopt.scale` with a momentum for every matrix, and with
    the sum of squares in place of their mean.

    Args:
        learning_rate: a number or a schedule.
        beta: β, the decay of the momentum.
        nesterov: normalise G + β M instead.
        shape_scale: None; or a factor for the update of each matrix, see
            `memopt.scale_by_matrix_shape`.
        eps: the smallest norm to divide by.
        as_released: follow the authors' code, which has Nesterov momentum and the shape scale
            "jordan", √max(1, n/m) for m inputs and n outputs; its rounding of updates to bfloat16
            is left out.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `shape_scale` is unknown, or `eps` is negative.

    References:
        Deng et al., RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based
        Optimization, 2026, https://arxiv.org/abs/2603.20527, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> memopt.state_bytes(memopt.rmnp(5e-3), params)["up/kernel"]          # 64·16 floats
        4096
    """
    matrices = common.get("matrices")
    if as_released:
        check_unused(rmnp, "as_released sets it", nesterov=nesterov, shape_scale=shape_scale)
        nesterov, shape_scale = True, "jordan"
    steps = [optax.trace(beta, nesterov), normalize_neurons(norm="l2", eps=eps, matrices=matrices)]
    if shape_scale is not None:
        steps.append(scale_by_matrix_shape(shape_scale=shape_scale, matrices=matrices))
    return finish(
        learning_rate, in_float32(optax.chain(*steps)), others=optax.scale_by_adam(), **common
    )
