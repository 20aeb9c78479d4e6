"""Adam-mini."""

import functools
import re
from typing import Unpack

import optax

from memopt.errors import check_at_least
from memopt.matrices import Layout
from memopt.names import EMBEDDING, HEAD, POSITION, attention_part, words
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms.grouped import Group, Groups, scale_by_grouped_rms

BIASES = ("bias", "b", "beta", "offset")
"""Names of biases, in Flax and PyTorch, Haiku and Equinox, Keras, and Haiku's norms."""


@method("AdamW's steps at half its state", learning_rate=5e-4)
def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    groups: Groups | None = None,
    head_dim: int | None = None,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """Adam-mini: Adam with one second moment for each block of the Hessian.

    With the mean over the entries of a block::

        M ← β₁ M + (1 − β₁) G
        V ← β₂ V + (1 − β₂) mean(G²)
        W ← W − lr · (M / (1 − β₁ᵗ) / (√(V / (1 − β₂ᵗ)) + ε) + weight_decay · W)

    A block is a token of the embedding or of the head, an attention head of queries and keys, an
    output of any other matrix, a whole norm, or an entry of a bias. State: mn + n numbers for an
    m×n matrix, fewer for queries and keys.

    Args:
        learning_rate: a number or a schedule, as for AdamW.
        b1: β₁, the decay of the first moment.
        b2: β₂, the decay of the second moment.
        eps: ε, added to the root of the second moment.
        groups: other blocks than these; see `memopt.scale_by_grouped_rms`.
        head_dim: the number of outputs of an attention head, for models whose queries and keys have
            one axis for all heads. By default each of their outputs has a second moment. Kernels
            with an axis of heads need no `head_dim`.
        as_released: has no effect: for the parameters that the authors' code knows by name, it
            follows the paper; to others it gives one second moment for the whole matrix.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `head_dim` is below 1; by `init`, if it does not divide the outputs of
            queries or keys.

    References:
        Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, 2024,
        https://arxiv.org/abs/2406.16793, Algorithms 1 and 2.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"q": jnp.ones((64, 4, 16)), "o": jnp.ones((4, 16, 64))}    # four heads
        >>> tx = memopt.adam_mini(1e-3, weight_decay=0.1)
        >>> {name: v.shape for name, v in tx.init(params)[0].nu.items()}
        {'o': (64,), 'q': (4,)}
    """
    check_at_least("head_dim", head_dim, 1)
    own = functools.partial(hessian_blocks, head_dim=head_dim)
    moments = scale_by_grouped_rms(
        own if groups is None else groups, b1, b2, eps, matrices=common.get("matrices")
    )
    return finish(learning_rate, moments, is_flat=True, **common)


def hessian_blocks(layout: Layout, head_dim: int | None = None) -> Group:
    """Returns the blocks of a parameter that share a second moment in `adam_mini`.

    Args:
        layout: the axes, name and kind of the parameter.
        head_dim: see `adam_mini`.
    """
    if layout.kind in (EMBEDDING, HEAD, POSITION):
        along = "column" if layout.kind == HEAD else "row"
        return along if layout.is_matrix else "matrix"
    if not layout.is_matrix:
        return "entry" if BIAS.search(words(layout.name.rpartition("/")[2])) else "matrix"
    if not is_query_or_key(layout.name):
        return "column"
    if len(layout.cols) > 1:
        return "head"
    if head_dim is None or layout.name.endswith("lora_a"):  # whose columns are a rank, not heads
        return "column"
    return ("column", head_dim)


BIAS = re.compile(r"(^|_)(bias|b|beta|offset)$")
"""Names of biases, in Flax and PyTorch, Haiku and Equinox, Keras, and Haiku's norms."""


def is_query_or_key(name: str) -> bool:
    """Whether a parameter computes the queries or the keys of attention."""
    part = attention_part(name)
    return part is not None and part[1] in ("query", "key")
