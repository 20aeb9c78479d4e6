"""AdaLomo."""

from typing import Unpack

import optax

from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.lomo import clip_entries
from memopt.optimizers.registry import method
from memopt.renamed import keywords
from memopt.transforms.decay import rms_scaled_weights
from memopt.transforms.factored import scale_by_factored_matrix_rms
from memopt.transforms.matrix_rms import normalize_by_group


@method("Adafactor's state; made for fine-tuning with --release", learning_rate=5e-2)
@keywords(eps_scale="min_scale")
def adalomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: float = 0.8,
    clip_threshold: float = 1.0,
    eps: float = 1e-30,
    min_scale: float = 1e-3,
    clip_value: float | None = None,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """AdaLomo: LOMO with a factored second moment and updates normalised per matrix.

    With β₂ₜ = 1 − t^−decay_rate and t = count + 1, for each matrix::

        R ← β₂ₜ R + (1 − β₂ₜ) mean_cols(G² + ε₁)            m numbers
        C ← β₂ₜ C + (1 − β₂ₜ) mean_rows(G² + ε₁)            n numbers
        U = G / √(R C / mean(R))
        U ← max(ε₂, RMS(W)) · U / max(1, RMS(U) / clip_threshold)
        W ← W − lr · (U + weight_decay · W)

    Each update depends on one matrix only, so that it can run during the backward pass. All
    parameters are treated alike, including embeddings; vectors keep a full second moment. State:
    m + n float32 numbers per matrix.

    Args:
        learning_rate: a number or a schedule, multiplied by max(min_scale, RMS(W)).
        decay_rate: the second moment's decay is 1 − t^−decay_rate.
        clip_threshold: the largest root mean square of an update.
        eps: ε₁, added to the squared gradient.
        min_scale: ε₂, the smallest parameter scale.
        clip_value: the largest magnitude of a gradient's entry; None does not clip.
        as_released: follow the authors' code: the decay, like the step, is multiplied by
            max(min_scale, RMS(W)).
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `clip_value` is negative.

    References:
        Lv et al., AdaLomo, 2023, https://arxiv.org/abs/2310.10195, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"w": jnp.ones((3, 16, 8)), "norm": jnp.ones(8)}
        >>> memopt.state_bytes(memopt.adalomo(1e-3), params).states    # 3·(16 + 8) and 8 floats
        {'norm': 32, 'w': 288}
    """
    matrices = common.get("matrices")
    steps = (
        clip_entries(clip_value),
        scale_by_factored_matrix_rms(decay_rate, eps, matrices=matrices),
        normalize_by_group(clip_threshold, min_scale, matrices=matrices),
    )
    decayed = rms_scaled_weights(min_scale) if as_released else None
    return finish(learning_rate, *steps, decayed=decayed, is_flat=True, **common)
