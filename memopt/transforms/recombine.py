"""Recombinations: form a full-size update from an inner optimizer's update in a subspace."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from memopt import renamed
from memopt.checked import checked
from memopt.errors import IncompatiblePairingError, check_at_least, check_choice
from memopt.shapes import Basis, LowRank, Stack
from memopt.state.precision import bounded, bounded_squares
from memopt.transforms.linalg import lengths_of, product
from memopt.transforms.norm_growth import GrowthLimiter
from memopt.transforms.projectors import MatrixSpec, Projector
from memopt.trees import NOTHING


@dataclasses.dataclass(frozen=True)
class Subspace:
    """The subspace of one stack of matrices at one step, with the inner optimizer's results.

    Attributes:
        projector: the rule that gave the basis.
        spec: the name and shape of the matrices.
        gradient: G, ``(*stack, m, n)``.
        basis: P.
        low_gradient: R, the gradient in the subspace: ``(*stack, r, n)`` or ``(*stack, m, r)``.
        squares: the sum of squares of each of G's channels, with the other axis of length one; None
            unless the recombination needs them.
        previous_basis: a function that returns the basis that a refresh at this step replaces.
        low_update: N, the inner optimizer's update for R.
        old_momentum: the inner optimizer's first moment before this step, or None.
        momentum: the same moment, carried over if a refresh at this step did so.
        is_carried: whether a refresh at this step carried moments over.
    """

    projector: Projector
    spec: MatrixSpec
    gradient: Stack
    basis: Basis
    low_gradient: LowRank
    squares: Any
    previous_basis: Callable[[], Array]
    low_update: Any = None
    old_momentum: LowRank | None = None
    momentum: LowRank | None = None
    is_carried: Any = False

    @property
    def low_axis(self) -> int:
        """The axis of R of length r, -2 or -1."""
        return -2 if self.projector.is_left(self.spec) else -1

    def up(self, low: LowRank) -> Stack:
        """Lifts an array in the subspace to full size."""
        return self.projector.up(self.spec, self.basis, low)

    def residual(self) -> Stack:
        """The part of the gradient outside the subspace: G − up(R)."""
        return self.projector.residual(self.spec, self.basis, self.gradient, self.low_gradient)

    def carry(self, moment: LowRank) -> LowRank:
        """Transforms a moment from the previous subspace to this one."""
        return self.projector.carry(self.spec, self.previous_basis(), self.basis, moment, power=1)

    def carry_by_cosines(self, moment: LowRank, power: int = 1) -> LowRank:
        """Does so with unit basis vectors, and the entries of their change of basis to a power."""
        old, new = self.previous_basis(), self.basis
        if not self.projector.orthonormal:
            old, new = old / lengths_of(old), new / lengths_of(new)
        return self.projector.carry(self.spec, old, new, moment, power=power)

    def previous_mean(self, moment: LowRank) -> LowRank:
        """The mean of a moment over the previous subspace, see `Projector.mean`."""
        return self.projector.mean(self.spec, self.previous_basis(), moment)

    def lengths(self) -> tuple[Any, Any]:
        """The lengths of the previous and of this basis's vectors, along R's axis of length r."""
        if self.projector.orthonormal:
            return 1.0, 1.0
        old, new = map(lengths_of, (self.previous_basis(), self.basis))
        return (old, new) if self.low_axis == -1 else (old.mT, new.mT)

    def overlap(self) -> Any:
        """The number r over ‖PᵀP‖² of the previous r unit vectors; 1 if they are orthogonal."""
        if self.projector.orthonormal:
            return 1.0
        unit = self.previous_basis()
        unit = unit / lengths_of(unit)
        gram = product("...mr,...ms->...rs", unit, unit)
        return unit.shape[-1] / jnp.square(gram).sum((-2, -1), keepdims=True)

    def dropped_momentum(self) -> Stack:
        """The full-size part of the first moment that a refresh at this step dropped."""
        nothing = lambda: jnp.zeros_like(self.gradient)
        old, new = self.old_momentum, self.momentum
        if old is None or new is None:
            return nothing()
        before = lambda: self.projector.up(self.spec, self.previous_basis(), old)
        return jax.lax.cond(self.is_carried, lambda: before() - self.up(new), nothing)

    def ratio(self, axes: int | tuple[int, int]) -> Array:
        """Computes ‖N‖ / ‖R‖ over the given axes, which are kept with length one."""
        return norm(self.low_update, axes) / (norm(self.low_gradient, axes) + 1e-8)


def norm(x: Array, axes: int | tuple[int, int]) -> Array:
    """The Euclidean norm over the given axes, which are kept with length one."""
    return jnp.sqrt(jnp.square(x).sum(axes, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Recombine:
    """A rule that forms a full-size update.

    Attributes:
        update: maps a `Subspace` and the array kept between steps to the full-size update and the
            new array to keep, `NOTHING` for none.
        init: maps a `MatrixSpec` to the initial array, zeros.
        correct: maps the gradient and the kept array to the gradient to project.
        check: raises `IncompatiblePairingError` for a projector that the rule cannot work with.
        needs_squares: whether the rule needs the norms of the gradient's channels.
    """

    update: Callable[[Subspace, Any], tuple[Array, Any]]
    init: Callable[[MatrixSpec], Any] = lambda spec: NOTHING
    correct: Callable[[Array, Any], Array] = lambda gradient, state: gradient
    check: Callable[[Projector], None] = lambda projector: None
    needs_squares: bool = False


def lift() -> Recombine:
    """Lifts the inner update to full size: U = up(N). Nothing outside the subspace changes.

    References:
        Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, Algorithm 2.
    """
    return Recombine(lambda space, state: (space.up(space.low_update), NOTHING))


@checked
def lift_and_sign(scale: float | Array = 1.0) -> Recombine:
    """Lifts the inner update, with sign descent outside: U = up(N) + scale·sign(G − up(R)).

    Args:
        scale: the learning rate outside the subspace, relative to that inside.

    References:
        Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, Algorithm 1.
    """

    def update(space: Subspace, state: Any) -> tuple[Stack, Any]:
        return space.up(space.low_update) + scale * jnp.sign(space.residual()), NOTHING

    return Recombine(update)


@checked
def lift_and_residual(scale: float | Array = 1.0, *, recover: float | Array = 0.0) -> Recombine:
    """Lifts the inner update, with gradient descent outside: U = up(N) + scale·(G − up(R)).

    Args:
        scale: the learning rate outside the subspace, relative to that inside.
        recover: at a refresh, the factor with which the dropped part of the momentum is added. If
            the inner optimizer is a momentum with decay β₁, ``lift_and_residual(1 - b1,
            recover=b1)`` is Flora's released code: gradients are compressed only after their own
            step, and never by a subspace drawn after them.

    References:
        Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, Algorithm 1; Hao et al.,
        Flora, 2024, https://arxiv.org/abs/2402.03293.
    """

    def update(space: Subspace, state: Any) -> tuple[Stack, Any]:
        u = space.up(space.low_update) + scale * space.residual()
        if isinstance(recover, float) and recover == 0:
            return u, NOTHING
        return u + recover * space.dropped_momentum(), NOTHING

    return Recombine(update)


@checked
def lift_and_scaled_residual(
    scale: float | Array = 1.0, limiter: GrowthLimiter | None = None, *, as_released: bool = False
) -> Recombine:
    """Lifts the inner update and adds the residual, scaled by the inner optimizer's ratio.

    ::

        U = scale · up(N) + limiter((G − up(R)) · ‖N‖ / ‖R‖)

    with one ratio for each index of the side that is not projected.

    Args:
        scale: the scale of the lifted update, α.
        limiter: bounds the growth of the second term's norm. State: one number per matrix.
        as_released: the residual is G − scale·up(R), as in the authors' code, where lifting always
            multiplies by α.

    References:
        Chen et al., Fira, 2024, https://arxiv.org/abs/2410.01623, Algorithm 1.
    """

    def update(space: Subspace, state: Any) -> tuple[Stack, Any]:
        if as_released:
            residual = space.gradient - scale * space.up(space.low_gradient)
        else:
            residual = space.residual()
        residual = residual * space.ratio(space.low_axis)
        if limiter is not None:
            residual = bounded(residual)
            factor, state = limiter(norm(residual, (-2, -1))[..., 0, 0], state)
            residual = residual * factor[..., None, None]
        return scale * space.up(space.low_update) + residual, state

    check = functools.partial(_check_channels, "lift_and_scaled_residual")
    return Recombine(update, _norms(limiter), check=check)


@checked
def lift_with_error_feedback(b1: float | Array = 0.0) -> Recombine:
    """Lifts the inner update, and adds the residual to the next gradient.

    ::

        A = G + E                                       is projected in place of G
        U = up(N)
        E ← A − up(R) + β₁/(1−β₁) · dropped

    where `dropped` is the part of the first moment that is lost when it is carried to a new
    subspace. State: a full-size array, which can replace an accumulated gradient.

    Args:
        b1: the decay of the inner optimizer's first moment.

    References:
        Robert et al., LDAdam, 2024, https://arxiv.org/abs/2410.16103, section 3.3.
    """
    check_at_least("b1", b1, 0)

    def check(projector: Projector) -> None:
        if not projector.orthonormal:
            raise IncompatiblePairingError(
                "lift_with_error_feedback needs a projector with orthonormal bases: the errors of "
                f"a {type(projector).__name__} projector would grow without bound. Use "
                "another, such as randomized_svd."
            )

    def update(space: Subspace, state: Array) -> tuple[Array, Array]:
        error = space.residual() + b1 / (1 - b1) * space.dropped_momentum()
        return space.up(space.low_update), error

    zeros = lambda spec: jnp.zeros(spec.shape, spec.dtype)
    return Recombine(update, zeros, lambda gradient, state: bounded(gradient + state), check)


def scale_gradient(per: str = "channel", limiter: GrowthLimiter | None = None) -> Recombine:
    """Scales the gradient as the inner optimizer scales its projection: U = G · ‖N‖ / ‖R‖.

    Args:
        per: "channel", one factor for each index of the side that is not projected, or "matrix",
            one for each matrix.
        limiter: bounds the growth of the update's norm, as a following `limit_norm_growth` would,
            but without another pass over the gradient. State: one number per matrix.

    Raises:
        ValueError: if `per` is neither.

    References:
        Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, section 4.
    """
    check_choice("per", per, ("channel", "matrix"))

    def update(space: Subspace, state: Any) -> tuple[Stack, Any]:
        scale = space.ratio((-2, -1) if per == "matrix" else space.low_axis)
        if limiter is not None:
            # ‖G∘s‖ is computed from the norms of G, so that G∘s is formed only once, in the update.
            squares = (jnp.square(scale) * space.squares).sum((-2, -1))
            count = math.prod(space.gradient.shape[-2:])
            factor, state = limiter(jnp.sqrt(bounded_squares(squares, count)), state)
            scale = scale * factor[..., None, None]
        return space.gradient * scale, state

    check = functools.partial(_check_channels, "scale_gradient")
    has_limiter = limiter is not None
    return Recombine(update, _norms(limiter), check=check, needs_squares=has_limiter)


def _norms(limiter: GrowthLimiter | None) -> Callable[[MatrixSpec], Any]:
    """Zeros for the norm of each matrix's last update, if its growth is limited."""
    return lambda spec: NOTHING if limiter is None else jnp.zeros(spec.stack, spec.dtype)


def _check_channels(name: str, projector: Projector) -> None:
    """Raises unless R has a channel for each channel of G."""
    if not projector.per_matrix:
        raise IncompatiblePairingError(
            f"{name} needs ‖N‖/‖R‖ for each matrix; a {type(projector).__name__} projector has it "
            "only for the selected matrices. Use lift, lift_and_sign or lift_and_residual."
        )


__getattr__ = renamed.finder(
    "memopt.recombine",
    globals(),
    {
        "lift_and_rest": "lift_and_residual",
        "lift_and_scaled_rest": "lift_and_scaled_residual",
        "Projected": "Subspace",
    },
)
