"""Optimizers that a comparison needs to tell why another one is better; no methods of memopt.

Run: memopt compare --preset cpu --output OUTPUT
     --methods "benchmarks.controls:adamw_slow_matrices, factor=0.1"
"""

from typing import Any

import optax

from memopt.matrices import map_matrices


def adamw_slow_matrices(
    learning_rate: optax.ScalarOrSchedule, factor: float = 0.1, b2: float = 0.999
) -> optax.GradientTransformation:
    """AdamW whose hidden matrices have a lower learning rate than embedding, head and vectors.

    Methods for matrices (Muon, GaLore, APOLLO, …) update embedding and head by AdamW and scale the
    matrices' updates, so that they have two learning rates where AdamW has one. This tells how much
    of their gain is that.

    Args:
        learning_rate: that of embedding, head and vectors.
        factor: the learning rate of hidden matrices, relative to it.
        b2: as in ``optax.adamw``.
    """

    def role(params: Any) -> Any:
        return map_matrices(lambda layout, p: "hidden" if layout.is_matrix else "other", params)

    slower = {"hidden": optax.scale(factor), "other": optax.identity()}
    return optax.chain(
        optax.scale_by_adam(b2=b2),
        optax.partition(slower, role),
        optax.scale_by_learning_rate(learning_rate),
    )
