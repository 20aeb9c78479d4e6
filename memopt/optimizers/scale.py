"""SCALE."""

from typing import Any, Unpack

import optax

from memopt.matrices import every_matrix, map_matrices, selection
from memopt.names import HEAD
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.parameters import read_parameters
from memopt.state.precision import in_float32
from memopt.transforms.adam import scale_by_released_adam
from memopt.transforms.normalization import normalize_neurons


@method("SGD's memory: normalised gradients, momentum for the head only", learning_rate=5e-4)
def scale(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    norm: str = "rms",
    eps: float = 1e-8,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """SCALE: normalised gradients, with a momentum for the output head only.

    For each matrix with gradient G, and for the weights u of each of its outputs::

        U = G                                      for the output head M ← β M + (1 − β) G, U = M
        u ← u / RMS(u)
        W ← W − lr · (U + weight_decay · W)

    State: none for hidden matrices and the embedding, whose inputs are the tokens; mn numbers for
    the output head. Vectors are updated by AdamW. An embedding that is the output head, too, has no
    momentum. `optax.scale` is no such method; it multiplies updates by a number.

    Args:
        learning_rate: a number or a schedule.
        momentum: β, the decay of the head's momentum.
        norm: "rms", as in the authors' code, for which their learning rates are; or "l2", the root
            of the sum of squares, as in the paper. Their steps differ by √m for m inputs.
        eps: the smallest norm to divide by.
        as_released: update vectors by the Adam of the authors' code, whose ε is before the bias
            correction.
        **common: see `memopt.Common`. By default all matrices are normalised, the embedding and the
            head included; those that `matrices` leaves out are updated by AdamW.

    Raises:
        ValueError: if `norm` is unknown, or `eps` is negative.

    References:
        Glentis et al., A Minimalist Optimizer Design for LLM Pretraining, 2025,
        https://arxiv.org/abs/2506.16659, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "lm_head": jnp.ones((64, 256))}
        >>> memopt.state_bytes(memopt.scale(1e-3), params).states
        {'lm_head': 65536, 'up/kernel': 0}
    """
    common["matrices"] = selection(common.get("matrices"), every_matrix)
    steps = (
        optax.masked(optax.ema(momentum, debias=False), is_head),
        normalize_neurons(norm=norm, eps=eps, matrices=common["matrices"]),
    )
    return finish(
        learning_rate,
        in_float32(optax.chain(*steps)),
        others=scale_by_released_adam(eps=1e-8) if as_released else optax.scale_by_adam(),
        **common,
    )


def is_head(tree: Any) -> Any:
    """Whether each parameter of a tree is the output head."""
    heads = {p.name for p in read_parameters(tree) if p.kind == HEAD}
    return map_matrices(lambda layout, _: layout.name in heads, tree)
