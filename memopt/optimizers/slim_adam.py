"""SlimAdam."""

from typing import Unpack

import optax

from memopt.matrices import Layout
from memopt.names import EMBEDDING, HEAD
from memopt.optimizers.adam_mini import is_query_or_key
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms.grouped import Group, Groups, scale_by_grouped_rms


@method("AdamW at half its state: means along the steadiest axis", learning_rate=1e-3)
def slim_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    groups: Groups | None = None,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """SlimAdam: Adam whose second moment is averaged along the axis where it varies least.

    With the mean over the chosen axis of each matrix::

        M ← β₁ M + (1 − β₁) G
        V ← β₂ V + (1 − β₂) mean(G²)
        W ← W − lr · (M / (1 − β₁ᵗ) / (√(V / (1 − β₂ᵗ)) + ε) + weight_decay · W)

    By default the axes that the paper finds for language models: queries and keys share over
    inputs, all other matrices over outputs, the embedding and the head over a token; norms and
    biases have a full V. `memopt.choose_groups` measures them for a model of your own, from the
    second moments of a short run of Adam. State: mn + m numbers for an m×n matrix, mn + n for
    queries and keys.

    Args:
        learning_rate: a number or a schedule, as for AdamW.
        b1: β₁, the decay of the first moment.
        b2: β₂, the decay of the second moment.
        eps: ε, added to the root of the second moment.
        groups: other groups than these; see `memopt.scale_by_grouped_rms`.
        as_released: has no effect, since the authors' code follows the paper; every method has this
            switch.
        **common: see `memopt.Common`.

    References:
        Kalra et al., When Can You Get Away with Low Memory Adam?, 2025,
        https://arxiv.org/abs/2503.01843, section 3 and Table 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 256))}, "norm": {"scale": jnp.ones(64)}}
        >>> state = memopt.slim_adam(1e-3).init(params)
        >>> state[0].nu["up"]["kernel"].shape, state[0].nu["norm"]["scale"].shape
        ((64,), (64,))
    """
    moments = scale_by_grouped_rms(
        slim_groups if groups is None else groups, b1, b2, eps, matrices=common.get("matrices")
    )
    return finish(learning_rate, moments, is_flat=True, **common)


def slim_groups(layout: Layout) -> Group:
    """Returns the entries of a parameter that share a second moment in `slim_adam`."""
    if not layout.is_matrix:
        return "matrix" if layout.kind in (EMBEDDING, HEAD) else "entry"
    return "column" if layout.kind == HEAD or is_query_or_key(layout.name) else "row"
