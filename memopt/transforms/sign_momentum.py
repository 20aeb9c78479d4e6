"""Sign momentum (Lion)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from memopt.state.precision import average


class ScaleBySignMomentumState(NamedTuple):
    """State of `scale_by_sign_momentum`.

    Attributes:
      mu: the momentum, shaped like the parameters.
    """

    mu: Any


def scale_by_sign_momentum(
    b1: float = 0.9, b2: float = 0.99, *, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Takes the sign of an interpolation between momentum and gradient.

    ::

        U = sign(β₁ M + (1 − β₁) G)
        M ← β₂ M + (1 − β₂) G

    State: one number a parameter.

    Args:
      b1: the weight of the momentum in the update.
      b2: the decay of the momentum.
      mu_dtype: the momentum's dtype; by default the parameter's. The averages are computed in
        float32 and rounded once.

    Returns:
      A transformation whose state is a `ScaleBySignMomentumState`.

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
      https://arxiv.org/abs/2302.06675, Algorithm 2.

    Example:
      >>> tx = scale_by_sign_momentum()
      >>> updates, _ = tx.update(jnp.array([0.2, -3.0, 0.0]), tx.init(jnp.zeros(3)))
      >>> updates.tolist()
      [1.0, -1.0, 0.0]
    """

    def init(params: Any) -> ScaleBySignMomentumState:
        return ScaleBySignMomentumState(optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(updates: Any, state: ScaleBySignMomentumState, params: Any = None, **_: Any) -> Any:
        def step(g: Array, m: Array) -> tuple[Array, Array]:
            new = average(b2, m, g)
            # β₁ M + (1 − β₁) G written with the new momentum: a step that reads the old one
            # twice keeps XLA from updating it in place.
            return jnp.sign(average(b1 / b2, new, g)).astype(g.dtype), new.astype(m.dtype)

        structure: Any
        leaves, structure = jax.tree.flatten(updates)
        signs, mu = zip(*map(step, leaves, structure.flatten_up_to(state.mu)), strict=True)
        return structure.unflatten(signs), ScaleBySignMomentumState(structure.unflatten(mu))

    return optax.GradientTransformationExtraArgs(init, update)
