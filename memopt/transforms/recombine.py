"""Recombinations: from what an inner optimizer did in a subspace to a full-size update."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from memopt.errors import check_choice
from memopt.transforms.clipping import GrowthLimiter


class Projected(NamedTuple):
    """One stack of matrices at one step, in full size and in its subspace.

    Attributes:
      gradient: G, ``(*stack, m, n)``.
      low_gradient: R, the gradient in the subspace: ``(*stack, r, n)`` or ``(*stack, m, r)``.
      low_update: N, what the inner optimizer made of R.
      low_axis: the axis of R that counts its r dimensions, -2 or -1.
      up: takes what is in the subspace to full size.
    """

    gradient: Array
    low_gradient: Array
    low_update: Array
    low_axis: int
    up: Callable[[Array], Array]


class Recombine(Protocol):
    """The rule's two halves."""

    def init(self, gradient: Array) -> Any:
        """What the rule keeps between steps; only its shapes are looked at."""

    def __call__(self, space: Projected, state: Any) -> tuple[Array, Any]:
        """The full-size update and the state to keep."""


class Lift(NamedTuple):
    """See `lift`."""

    def init(self, gradient: Array) -> Any:
        """Nothing is kept."""
        return ()

    def __call__(self, space: Projected, state: Any) -> tuple[Array, Any]:
        """N in full size."""
        return space.up(space.low_update), ()


class ScaleGradient(NamedTuple):
    """See `scale_gradient`."""

    per: str
    limiter: GrowthLimiter | None

    def init(self, gradient: Array) -> Any:
        """The norm of each matrix's last update, if its growth is limited."""
        return () if self.limiter is None else gradient.sum((-2, -1))

    def __call__(self, space: Projected, state: Any) -> tuple[Array, Any]:
        """G times ‖N‖/‖R‖."""
        axes = (-2, -1) if self.per == "matrix" else space.low_axis
        norm = lambda x: jnp.sqrt(jnp.square(x).sum(axes, keepdims=True))
        scale = norm(space.low_update) / (norm(space.low_gradient) + 1e-8)
        if self.limiter is not None:
            # ‖G∘s‖ from the norms of G, so that G∘s is formed once, where it is used.
            length = jnp.sqrt(jnp.square(scale * norm(space.gradient)).sum((-2, -1)))
            factor, state = self.limiter(length, state)
            scale = scale * factor[..., None, None]
        return space.gradient * scale, state


def lift() -> Recombine:
    """The inner update, lifted to full size: nothing outside the subspace moves.

    References:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithm 2.
    """
    return Lift()


def scale_gradient(per: str = "channel", limiter: GrowthLimiter | None = None) -> Recombine:
    """The gradient, scaled as the inner optimizer scaled its projection: G · ‖N‖ / ‖R‖.

    Args:
      per: "channel", one factor for each index of the side that is not projected, or "matrix",
        one for each matrix.
      limiter: bounds the growth of the update's norm as `limit_norm_growth` after this would,
        without another pass over the gradient. State: one number a matrix.

    Raises:
      ValueError: if `per` is neither.

    References:
      Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, section 4.
    """
    check_choice("per", per, ("channel", "matrix"))
    return ScaleGradient(per, limiter)
