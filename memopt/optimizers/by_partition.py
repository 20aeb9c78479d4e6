"""One method for the matrices, another for the rest; and how both end."""

from typing import Any

import optax

from memopt.matrices import Matrices, map_matrices
from memopt.parameters import known, read_parameters
from memopt.state.precision import in_float32
from memopt.transforms.decay import decay_as_released, updated_weights


def matrices_and_rest(
    method: optax.GradientTransformation,
    rest: optax.GradientTransformation | None,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Partitions a tree: `method` for its hidden matrices, `rest` for everything else.

    Args:
      method: what updates the matrices.
      rest: what updates embeddings, output head, norms and biases; None is `method` too.
      matrices: which leaves are matrices; see `memopt.hidden_matrices`.

    Example:
      >>> import memopt, jax.numpy as jnp
      >>> tx = memopt.matrices_and_rest(optax.sgd(1e-2), optax.adam(1e-3))
      >>> params = {"up": {"kernel": jnp.ones((8, 16))}, "norm": {"scale": jnp.ones(8)}}
      >>> memopt.state_bytes(tx, params).states
      {'norm/scale': 64, 'up/kernel': 0}
    """
    if rest is None:
        return optax.with_extra_args_support(method)

    def labels(tree: Any) -> Any:
        label = lambda layout, _: "matrices" if layout.is_matrix else "rest"
        return map_matrices(label, tree, matrices=matrices)

    both = optax.partition({"matrices": method, "rest": rest}, labels)

    def init(params: Any) -> Any:
        with known(read_parameters(params)):  # each part sees the others masked
            return both.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with known(read_parameters(updates)):
            return both.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def adamw_for_rest(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Optax's AdamW with float32 statistics: what the rest gets unless the user says."""
    decay = {"weight_decay": weight_decay, "mask": weight_decay_mask}
    return in_float32(optax.adamw(learning_rate, **decay, **options))


def descend(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    *,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Decoupled decay and the learning rate, the end of a chain.

    Args:
      learning_rate: a number or a schedule.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: which leaves decay, as in ``optax.adamw``.
      as_released: decay the weights after the step, as GaLore's code and its kin do.
    """
    rate = optax.scale_by_learning_rate(learning_rate)
    if as_released:
        decayed = (updated_weights, learning_rate, weight_decay, weight_decay_mask)
        return optax.chain(rate, decay_as_released(*decayed))
    return optax.chain(optax.add_decayed_weights(weight_decay, weight_decay_mask), rate)
