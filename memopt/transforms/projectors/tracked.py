"""Projectors whose subspace follows the gradients."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.errors import check_at_least
from memopt.reductions import for_any
from memopt.shapes import Basis, Stack
from memopt.state.precision import bias_correction, zeros_of
from memopt.transforms.linalg import for_stack, orthonormal, product
from memopt.transforms.projectors.base import (
    MatrixSpec,
    Projector,
    RefreshClock,
    is_unchosen,
    scale_to_one,
)
from memopt.transforms.projectors.singular import randomized_svd


@dataclasses.dataclass(frozen=True)
class Tracked(Projector):
    """A basis that is updated, starting from one that another projector gives.

    Attributes:
        start: the projector of the first basis; by default `randomized_svd`.
    """

    stored: bool = True
    start: Projector | None = None

    from_gradients: ClassVar[bool] = True

    @property
    def first(self) -> Projector:
        """The projector of the first basis."""
        return self.start or randomized_svd(self.rank, side=self.side)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """The first basis, one for each matrix of the stack."""
        return for_stack(self.first.basis(spec, gradient, clock), gradient)

    def is_left(self, spec: MatrixSpec) -> bool:
        """Whether the first basis projects the rows."""
        return self.first.is_left(spec)

    def size(self, spec: MatrixSpec) -> tuple[int, int]:
        """The size of the first basis."""
        return self.first.size(spec)


@dataclasses.dataclass(frozen=True)
class OnlinePca(Tracked):
    """Online principal components; see `online_pca`."""

    optimizer: optax.GradientTransformation = dataclasses.field(
        default_factory=lambda: optax.adam(5e-3)
    )
    penalty: float = 0.1

    moves: ClassVar[bool] = True

    @property
    def keeps(self) -> int:
        """The basis and the arrays of its optimizer."""
        return 1 + len(jax.tree.leaves(jax.eval_shape(self.optimizer.init, jnp.zeros((2, 2)))))

    def init(self, spec: MatrixSpec) -> tuple[Array, ...]:
        """The basis and the state of its optimizer."""
        (basis,) = super().init(spec)
        return (basis, *jax.tree.leaves(zeros_of(self.optimizer.init, basis)))

    def basis_at(
        self,
        spec: MatrixSpec,
        kept: tuple[Array, ...],
        gradient: Stack,
        clock: RefreshClock,
        momentum: Any,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns the stored basis, and takes an optimizer step to the next one."""
        first = is_unchosen(kept[0])
        basis = self.chosen(spec, kept[0], gradient, clock, first)
        factor, exists = scale_to_one(gradient)
        moved = self._moved(spec, (basis, *kept[1:]), gradient, factor)
        # The first basis is already optimal, and a gradient of zeros has no information.
        stay = first | ~exists

        def keep(old: Array, new: Array) -> Array:
            is_stack = old.ndim > 0 and old.shape[: stay.ndim] == stay.shape
            axes = tuple(range(stay.ndim, old.ndim))
            return jnp.where(jnp.expand_dims(stay, axes) if is_stack else clock.step == 0, old, new)

        return basis, tuple(map(keep, (basis, *kept[1:]), moved))

    def _moved(
        self, spec: MatrixSpec, kept: tuple[Array, ...], gradient: Stack, factor: Array
    ) -> tuple[Array, ...]:
        """The basis and its optimizer's state after a step on ‖PPᵀĜ − Ĝ‖² + λ‖PᵀP − I‖²."""
        basis, *leaves = kept
        structure: Any = jax.tree.structure(jax.eval_shape(self.optimizer.init, basis))
        low = factor * self.down(spec, basis, gradient)
        squares = jnp.square(factor * gradient).sum((-2, -1), keepdims=True)
        scale = jnp.where(squares > 0, factor / squares, 0)
        cp = scale * self.correlation(spec, gradient, low)  # Ĝ Ĝᵀ P
        gram = "...mr,...ms->...rs"
        pcp, pp = product(gram, basis, cp), product(gram, basis, basis)
        times = lambda a, b: product("...mr,...rs->...ms", a, b)
        slope = -4 * cp + 2 * times(cp, pp) + 2 * times(basis, pcp)
        slope += 4 * self.penalty * (times(basis, pp) - basis)
        state = structure.unflatten(leaves)
        update, state = self.optimizer.update(slope, state, basis)
        return (optax.apply_updates(basis, update), *jax.tree.leaves(state))


@dataclasses.dataclass(frozen=True)
class PowerIteration(Tracked):
    """Tracked power iteration; see `power_iteration`."""

    rho: float = 0.908
    b1: float = 0.0

    def basis_at(
        self,
        spec: MatrixSpec,
        kept: tuple[Array, ...],
        gradient: Stack,
        clock: RefreshClock,
        momentum: Any,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Updates the stored basis by one power iteration at each refresh."""
        first = is_unchosen(kept[0])
        started = self.chosen(spec, kept[0], gradient, clock, first)

        def iterate() -> Basis:
            moved = self._iterate(spec, kept[0], gradient, clock, momentum)
            return jnp.where(first[..., None, None], started, moved)

        basis = jax.lax.cond(clock.refresh_now & for_any(~first), iterate, lambda: started)
        return basis, (basis,)

    def _iterate(
        self, spec: MatrixSpec, basis: Basis, gradient: Stack, clock: RefreshClock, momentum: Any
    ) -> Basis:
        """An orthonormal basis of B BᵀP, with B = ρ·up(M̂) + (1−ρ)·G; B is never formed.

        If BᵀP is zero, the basis is unchanged.
        """
        weight = 1.0 if momentum is None else 1 - self.rho
        low = weight * self.down(spec, basis, gradient)
        if momentum is not None:
            steps = jnp.maximum(clock.step, 1)
            corrected = self.rho * momentum / bias_correction(self.b1, steps, momentum.dtype)
            low += corrected
        factor, exists = scale_to_one(low)
        low = factor * low
        moved = weight * self.correlation(spec, gradient, low)
        if momentum is not None:
            moved += product("...mr,...rs->...ms", basis, self.gram(spec, corrected, low))
        return jnp.where(exists[..., None, None], orthonormal(moved), basis)


def online_pca(
    rank: int | float,
    *,
    side: str = "short",
    optimizer: optax.GradientTransformation | None = None,
    penalty: float = 0.1,
    start: Projector | None = None,
) -> Projector:
    """A basis that moves towards the principal components by one optimizer step per step.

    It starts from the first gradient's singular vectors; then, with Ĝ = G / ‖G‖::

        P ← P − step(∇ (‖P PᵀĜ − Ĝ‖² + λ ‖PᵀP − I‖²))

    Each step is projected with the basis before this update. The first step, and a gradient of
    zeros, leave the basis unchanged (the released code divides by the gradient's norm). State: the
    basis, side×r numbers per matrix, and its optimizer's state.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        optimizer: the optimizer of the basis; by default ``optax.adam(5e-3)``. The released code
            uses ``optax.adamw(1 / refresh_every, weight_decay=0.01)``.
        penalty: λ, which keeps the basis nearly orthonormal; 0 in the released code.
        start: the projector that gives the first basis; by default `randomized_svd`.

    Raises:
        ValueError: if `rank` is below one, or larger than the matrix's shorter side.

    References:
        Liang et al., Memory-Efficient LLM Training with Online Subspace Descent, 2024,
        https://arxiv.org/abs/2408.12857, section 4.

    Example:
        >>> [x.shape for x in online_pca(2).init(MatrixSpec("w", (3, 8, 4), jnp.float32))]
        [(3, 4, 2), (), (3, 4, 2), (3, 4, 2)]
    """
    check_at_least("penalty", penalty, 0)
    return OnlinePca(rank, side, True, start, optimizer or optax.adam(5e-3), penalty)


def power_iteration(
    rank: int | float,
    *,
    side: str = "short",
    rho: float = 0.908,
    b1: float = 0.0,
    start: Projector | None = None,
) -> Projector:
    """A basis that is updated by one power iteration at each refresh.

    It starts from the first gradient's singular vectors; then, with M̂ the inner optimizer's
    bias-corrected first moment::

        B = ρ · up(M̂) + (1 − ρ) · G
        P ← qr(B BᵀP)

    With ``refresh_every=1`` it follows the gradients step by step. If the inner optimizer has no
    first moment, B = G. State: the basis, side×r numbers per matrix.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        rho: ρ, the weight of the momentum.
        b1: decay of that momentum, for its bias correction; 0 means no correction.
        start: the projector that gives the first basis; by default `randomized_svd`.

    Raises:
        ValueError: if `rank` is below one, or larger than the matrix's shorter side.

    References:
        Robert et al., LDAdam, 2024, https://arxiv.org/abs/2410.16103, section 3.1.

    Example:
        >>> [x.shape for x in power_iteration(2).init(MatrixSpec("w", (3, 8, 4), jnp.float32))]
        [(3, 4, 2)]
    """
    check_at_least("rho", rho, 0)
    return PowerIteration(rank, side, True, start, rho, b1)
