"""Sign momentum (Lion)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from memopt.checked import checked
from memopt.errors import check_above_zero
from memopt.state.precision import average


class ScaleBySignMomentumState(NamedTuple):
    """State of `scale_by_sign_momentum`.

    Attributes:
        mu: the momentum, shaped like the parameters.
    """

    mu: Any


@checked
def scale_by_sign_momentum(
    b1: float = 0.9, b2: float = 0.99, *, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Takes the sign of an interpolation between momentum and gradient.

    ::

        U = sign(β₁ M + (1 − β₁) G)
        M ← β₂ M + (1 − β₂) G

    State: one number per parameter.

    Args:
        b1: the weight of the momentum in the update.
        b2: the decay of the momentum.
        mu_dtype: the momentum's dtype; by default the parameter's. The averages are computed in
            float32 and rounded once.

    Returns:
        A transformation whose state is a `ScaleBySignMomentumState`.

    Raises:
        ValueError: if `b2` is not above 0.

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
        https://arxiv.org/abs/2302.06675, Algorithm 2.

    Example:
        >>> tx = scale_by_sign_momentum()
        >>> updates, _ = tx.update(jnp.array([0.2, -3.0, 0.0]), tx.init(jnp.zeros(3)))
        >>> updates.tolist()
        [1.0, -1.0, 0.0]
    """
    check_above_zero("b2", b2)

    def init(params: Any) -> ScaleBySignMomentumState:
        return ScaleBySignMomentumState(optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(updates: Any, state: ScaleBySignMomentumState, params: Any = None, **_: Any) -> Any:
        mu = jax.tree.map(lambda g, m: average(b2, m, g), updates, state.mu)
        # β₁ M + (1 − β₁) G is written in terms of the new momentum: XLA could not update the
        # momentum in place if both results read the old one.
        sign = lambda g, m: jnp.sign(average(b1 / b2, m, g)).astype(g.dtype)
        signs = jax.tree.map(sign, updates, mu)
        mu = jax.tree.map(lambda new, m: new.astype(m.dtype), mu, state.mu)
        return signs, ScaleBySignMomentumState(mu)

    return optax.GradientTransformationExtraArgs(init, update)
