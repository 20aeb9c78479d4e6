"""CAME."""

from typing import Unpack

import optax

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.state.precision import in_float32
from memopt.transforms.factored import scale_by_confidence, scale_by_factored_matrix_rms
from memopt.transforms.matrix_rms import clip_by_matrix_rms


@method("Adafactor with a momentum that slows where updates differ", learning_rate=1e-4)
def came(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    clip_threshold: float = 1.0,
    eps: float = 1e-30,
    confidence_eps: float = 1e-16,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """CAME: Adafactor with a momentum, divided by how far updates are from it.

    For each matrix with gradient G::

        R ← β₂ R + (1 − β₂) mean_cols(G² + ε₁),  C likewise, mean_rows
        U = G / √(R C / mean(R))
        U ← U / max(1, RMS(U) / clip_threshold)
        M ← β₁ M + (1 − β₁) U
        r ← β₃ r + (1 − β₃) mean_cols((U − M)² + ε₂),  c likewise, mean_rows
        W ← W − lr · (M / √(r c / mean(r)) + weight_decay · W)

    No average is corrected for its start. The first steps are therefore up to a hundred times as
    long as those after 1 / (1 − β₃) steps; a warm-up of the learning rate shortens them. All
    parameters are treated alike; vectors keep a full second moment, and W moves by M.

    State: mn + 2m + 2n numbers per matrix.

    Args:
        learning_rate: a number or a schedule; the authors take 2e-4.
        b1: β₁, the decay of the momentum.
        b2: β₂, the decay of the second moment.
        b3: β₃, the decay of the squared distances between updates and momentum.
        clip_threshold: the largest root mean square of U.
        eps: ε₁, added to the squared gradient.
        confidence_eps: ε₂, added to the squared distances.
        as_released: has no effect, since the authors' code follows the paper.
        **common: see `memopt.Common`.

    References:
        Luo et al., CAME: Confidence-guided Adaptive Memory Efficient Optimization, 2023,
        https://arxiv.org/abs/2307.02047, Algorithm 2.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"w": jnp.ones((16, 8)), "norm": jnp.ones(8)}
        >>> memopt.state_bytes(memopt.came(2e-4), params).states  # 16·8 + 2·(16 + 8), and 2·8
        {'norm': 64, 'w': 704}
    """
    matrices = common.get("matrices")
    steps = optax.chain(
        scale_by_factored_matrix_rms(eps=eps, b2=b2, matrices=matrices),
        clip_by_matrix_rms(clip_threshold, matrices=matrices),
        scale_by_confidence(b1, b3, confidence_eps, matrices=matrices),
    )
    return finish(learning_rate, in_float32(steps), is_flat=True, **common)
