"""One method for the matrices, another for the rest."""

from typing import Any

import optax

from memopt.matrices import Matrices, map_matrices
from memopt.state.precision import in_float32


def matrices_and_rest(
    method: optax.GradientTransformation,
    rest: optax.GradientTransformation | None,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Partitions a tree: `method` for its hidden matrices, `rest` for everything else.

    Args:
      method: what updates the matrices.
      rest: what updates embeddings, output head, norms and biases; None is `method` too.
      matrices: which leaves are matrices; see `memopt.matrices.hidden_matrices`.

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

    return optax.partition({"matrices": method, "rest": rest}, labels)


def adamw_for_rest(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Optax's AdamW with float32 statistics: what the rest gets unless the user says."""
    adamw = optax.adamw(learning_rate, weight_decay=weight_decay, mask=weight_decay_mask)
    return in_float32(adamw)
