"""NorMuon."""

from typing import Unpack

import jax.numpy as jnp
import optax

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.state.precision import in_float32
from memopt.transforms.normalization import scale_by_neuron_rms
from memopt.transforms.orthogonalization import (
    Coefficients,
    orthogonalize,
    scale_by_matrix_shape,
)


@method("Muon with steps of one size for all neurons", learning_rate=1e-2)
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float = 0.95,
    b2: float = 0.95,
    nesterov: bool = False,
    ns_steps: int = 5,
    ns_coeffs: Coefficients = "jordan",
    eps: float = 1e-8,
    gram: bool = False,
    consistent_rms: float | None = 0.2,
    shape_scale: str = "jordan",
    replica_axis: str = "data",
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """NorMuon: Muon, with the updates of each neuron divided by the root of their average square.

    For a matrix with m inputs, n outputs and gradient G, with one number V for each output::

        M ← β₁ M + G
        O = NewtonSchulz(M)
        V ← β₂ V + (1 − β₂) mean_inputs(O²)
        P = O / (√V + ε)
        W ← W − lr · (consistent_rms · P / RMS(P) + weight_decay · W)

    State: mn + n numbers per matrix. On a mesh it communicates as `memopt.muon` does.

    Args:
        learning_rate: a number or a schedule.
        beta: β₁, the decay of the momentum.
        b2: β₂, the decay of the average squares.
        nesterov: use Nesterov momentum: O = NewtonSchulz(G + β₁ M).
        ns_steps: the number of Newton–Schulz iterations.
        ns_coeffs: their coefficients, see `memopt.orthogonalize`.
        eps: ε, added to the root of V.
        gram: iterate on Gram matrices, see `memopt.orthogonalize`.
        consistent_rms: the root mean square of every update; 0.2 is about AdamW's. None keeps the
            norm of O, times `shape_scale`.
        shape_scale: a factor by the shape of each matrix, see `memopt.scale_by_matrix_shape`.
        replica_axis: the mesh axis over which parameters are replicated, if there is one; results
            do not depend on it.
        as_released: follow the authors' code: iterate in bfloat16, with Nesterov momentum, and keep
            the norm of O, times √max(1, n/m).
        **common: see `memopt.Common`.

    Raises:
        ValueError: as of `memopt.muon`.

    References:
        Li et al., NorMuon: Making Muon more efficient and scalable, 2025,
        https://arxiv.org/abs/2510.05491, Algorithm 1.

    Example:
        >>> import memopt
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> memopt.state_bytes(memopt.normuon(1e-2), params)["up/kernel"]     # (64·16 + 16) floats
        4160
    """
    matrices = common.get("matrices")
    if as_released:
        given = {"nesterov": nesterov, "consistent_rms": consistent_rms, "shape_scale": shape_scale}
        check_unused(normuon, "as_released sets it", **given)
        nesterov, consistent_rms, shape_scale = True, None, "jordan"
    steps = [
        optax.trace(beta, nesterov),
        orthogonalize(
            ns_steps,
            ns_coeffs,
            dtype=jnp.bfloat16 if as_released else None,
            gram=gram,
            replica_axis=replica_axis,
            matrices=matrices,
        ),
        scale_by_neuron_rms(b2, eps, consistent_rms, matrices=matrices),
    ]
    if consistent_rms is None:
        steps.append(scale_by_matrix_shape(shape_scale=shape_scale, matrices=matrices))
    return finish(
        learning_rate, in_float32(optax.chain(*steps)), others=optax.scale_by_adam(), **common
    )
