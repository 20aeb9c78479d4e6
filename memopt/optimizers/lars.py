"""LARS."""

import operator
from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax

from memopt.optimizers.by_partition import Common, matrices_and_rest
from memopt.optimizers.registry import method
from memopt.parameters import reading_whole_trees
from memopt.state.precision import in_float32
from memopt.state.quantized_state import store_state
from memopt.transforms.trust_ratio import scale_by_matrix_trust_ratio


@method("large batches, with momentum", learning_rate=2.0)
def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """LARS: SGD whose steps are proportional to the norm of each matrix; for large batches.

    With c = trust_coefficient, λ = weight_decay and norms of each matrix of a stack::

        r = c ‖W‖ / (‖G‖ + λ ‖W‖ + ε)           or 1 if ‖W‖ or ‖G‖ is 0
        V ← momentum · V + lr · r (G + λ W)
        W ← W − V

    Learning rates are around 1 and more, since c is small. All parameters are treated alike,
    vectors by their own norms; ``rest=optax.sgd(…)`` leaves ratio and decay to hidden matrices, as
    is usual. `optax.lars` divides by ‖G + λ W‖, which is not the paper's ratio, and has one ratio
    for a stack. State: mn float32 numbers per matrix.

    Args:
        learning_rate: a number or a schedule.
        momentum: the decay of the momentum.
        nesterov: use Nesterov momentum, W ← W − momentum · V − lr · r (G + λ W).
        trust_coefficient: c, the size of a step relative to its matrix at a learning rate of 1.
        eps: ε, added to the denominator of the ratio.
        as_released: has no effect, since no code of the authors was found; every method has this
            switch.
        **common: see `memopt.Common`. The decay is part of the gradient, and so multiplied by r.

    Raises:
        ValueError: if `trust_coefficient`, `eps` or `weight_decay` is negative.

    References:
        You et al., Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888, Algorithm 1.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"layers": jnp.stack([jnp.full((4, 4), 2.0), jnp.full((4, 4), 3.0)])}
        >>> tx = memopt.lars(1.0, trust_coefficient=0.01)
        >>> updates, _ = tx.update({"layers": jnp.ones((2, 4, 4))}, tx.init(params), params)
        >>> [round(float(u), 3) for u in updates["layers"][:, 0, 0]]
        [-0.02, -0.03]
    """
    matrices = common.get("matrices")
    ratio = lambda decay: scale_by_matrix_trust_ratio(
        trust_coefficient, eps, decay, matrices=matrices
    )
    chain = optax.chain(
        where_decayed(ratio, common.get("weight_decay", 0.0), common.get("weight_decay_mask")),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(momentum, nesterov),
    )
    tx = matrices_and_rest(in_float32(chain), common.get("rest"), matrices)
    return store_state(tx, common.get("state"))


def where_decayed(
    make: Callable[[Any], optax.GradientTransformation], weight_decay: Any, mask: Any
) -> optax.GradientTransformation:
    """Returns `make(weight_decay)` where the mask holds, and `make(0.0)` elsewhere."""
    if mask is None:
        return make(weight_decay)

    def others(tree: Any) -> Any:
        return jax.tree.map(operator.not_, mask(tree) if callable(mask) else mask)

    on = lambda decay, where: reading_whole_trees(optax.masked(make(decay), where))
    return optax.chain(on(weight_decay, mask), on(0.0, others))
