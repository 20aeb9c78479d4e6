"""LAMB."""

from typing import Unpack

import optax

from memopt.optimizers.by_partition import Common, matrices_and_rest
from memopt.optimizers.registry import method
from memopt.parameters import reading_whole_trees
from memopt.state.precision import in_float32
from memopt.state.quantized_state import store_state
from memopt.transforms.adam import scale_by_uncorrected_adam
from memopt.transforms.decay import decay_as_released, weights
from memopt.transforms.trust_ratio import scale_by_matrix_trust_ratio


@method("large batches, with Adam", learning_rate=1e-2)
def lamb(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    decoupled_decay: bool = False,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """LAMB: Adam whose steps are proportional to the norm of each matrix; for large batches.

    With A Adam's update with bias correction, λ = weight_decay and norms of each matrix of a
    stack::

        U = A + λ W
        W ← W − lr · ‖W‖ / ‖U‖ · U              the ratio is 1 if ‖W‖ or ‖U‖ is 0

    All parameters are treated alike, vectors by their own norms. `optax.lamb` has one ratio for a
    stack. State: 2mn float32 numbers per matrix.

    Args:
        learning_rate: a number or a schedule: the size of a step relative to its matrix.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        decoupled_decay: leave the decay out of U, and out of the ratio:
            W ← W − lr · (‖W‖ / ‖A‖ · A + λ W).
        as_released: follow the LAMB of BERT and ALBERT: Adam without bias correction, and no ratio
            for leaves that `weight_decay_mask` excludes.
        **common: see `memopt.Common`. The decay is multiplied by the ratio, too.

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2019,
        https://arxiv.org/abs/1904.00962, Algorithm 2.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"layers": jnp.stack([jnp.full((4, 4), 2.0), jnp.full((4, 4), 3.0)])}
        >>> tx = memopt.lamb(0.01)
        >>> updates, _ = tx.update({"layers": jnp.ones((2, 4, 4))}, tx.init(params), params)
        >>> [round(float(u), 3) for u in updates["layers"][:, 0, 0]]
        [-0.02, -0.03]
    """
    matrices, mask = common.get("matrices"), common.get("weight_decay_mask")
    strength = common.get("weight_decay", 0.0)
    adam = scale_by_uncorrected_adam if as_released else optax.scale_by_adam
    ratio = scale_by_matrix_trust_ratio(matrices=matrices)
    if as_released and mask is not None:
        ratio = reading_whole_trees(optax.masked(ratio, mask))
    rate = optax.scale_by_learning_rate(learning_rate)
    if decoupled_decay:
        decay = decay_as_released(weights, learning_rate, strength, mask, matrices=matrices)
        steps = ratio, rate, decay
    else:
        steps = optax.add_decayed_weights(strength, mask), ratio, rate
    # A chain in a chain, unlike optax.lamb's, whose saved states would be taken for these.
    chain = optax.chain(in_float32(adam(b1, b2, eps)), optax.chain(*steps))
    tx = matrices_and_rest(chain, common.get("rest"), matrices)
    return store_state(tx, common.get("state"))
