"""Muon."""

from typing import Unpack

import jax.numpy as jnp
import optax

from memopt.errors import check_at_least
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.renamed import keywords
from memopt.state.precision import in_float32
from memopt.transforms.orthogonalization import (
    Coefficients,
    orthogonalize,
    scale_by_matrix_shape,
)


@method("few steps, with half of AdamW's state", learning_rate=2e-2)
@keywords(copied_over="replica_axis")
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coeffs: Coefficients = "jordan",
    eps: float = 1e-7,
    gram: bool = False,
    consistent_rms: float | None = None,
    shape_scale: str = "jordan",
    replica_axis: str = "data",
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """Muon: momentum, orthogonalised by Newton–Schulz iterations.

    For a matrix with m inputs and n outputs and gradient G::

        M ← β M + G
        O = NewtonSchulz(G + β M)                  ≈ U Vᵀ of the singular value decomposition
        W ← W − lr · (√max(1, n/m) · O + weight_decay · W)

    State: mn numbers per matrix.

    On a mesh each device orthogonalises its share of the matrices, each of them whole; momentum is
    moved there and updates are moved back, see `memopt.orthogonalize`.

    Args:
        learning_rate: a number or a schedule.
        beta: the decay of the momentum.
        nesterov: use Nesterov momentum, as above; otherwise O = NewtonSchulz(M).
        ns_steps: the number of Newton–Schulz iterations.
        ns_coeffs: a, b and c of its polynomial, or three numbers for each iteration; or the name
            of a published set, such as "polar_express" or "nvidia", see `memopt.orthogonalize`.
        eps: added to the norm before the iterations.
        gram: iterate on Gram matrices, which is faster if one side is over twice the other, see
            `memopt.orthogonalize`.
        consistent_rms: scale updates by consistent_rms · √max(m, n) instead, to this root mean
            square; 0.2 is about AdamW's, so that AdamW's learning rate and decay can be used.
        shape_scale: another factor for updates: "spectral", √(n/m), or "moonlight", which is
            ``consistent_rms=0.2``.
        replica_axis: the mesh axis over which parameters are replicated, if there is one; results
            do not depend on it.
        as_released: iterate in bfloat16, as the authors' code does.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `ns_steps` is below 1, `consistent_rms` is negative, `ns_coeffs` are not
            three numbers per iteration, or an option has no effect.

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
        https://kellerjordan.github.io/posts/muon/; `consistent_rms`: Liu et al., Muon is Scalable
        for LLM Training, 2025, https://arxiv.org/abs/2502.16982, section 2.2; `ns_coeffs`: see
        `memopt.orthogonalize`.

    Example:
        >>> import memopt
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> memopt.state_bytes(memopt.muon(2e-2), params)["up/kernel"]   # 64·16 floats
        4096
    """
    matrices = common.get("matrices")
    check_at_least("consistent_rms", consistent_rms, 0)
    dtype = jnp.bfloat16 if as_released else None
    return finish(
        learning_rate,
        in_float32(optax.trace(beta, nesterov)),
        orthogonalize(
            ns_steps,
            ns_coeffs,
            eps,
            dtype=dtype,
            gram=gram,
            replica_axis=replica_axis,
            matrices=matrices,
        ),
        scale_by_matrix_shape(consistent_rms, shape_scale=shape_scale, matrices=matrices),
        others=optax.scale_by_adam(),
        **common,
    )
