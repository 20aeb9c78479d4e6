"""Projectors whose subspace follows the gradients."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_at_least, check_between
from memopt.reductions import for_any, scale_to_one
from memopt.shapes import Basis, Stack
from memopt.state.precision import bias_correction, zeros_of
from memopt.transforms.linalg import (
    for_stack,
    leading_eigenvectors,
    lengths_of,
    orthonormal,
    product,
)
from memopt.transforms.projectors.base import (
    MatrixSpec,
    Projector,
    RefreshClock,
    is_unchosen,
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
class Moved(Tracked):
    """A basis that is moved at each refresh after its first."""

    @abc.abstractmethod
    def move(
        self, spec: MatrixSpec, basis: Basis, gradient: Stack, clock: RefreshClock, momentum: Any
    ) -> Basis:
        """The bases after a refresh; those of gradients of zeros are unchanged."""

    def basis_at(
        self,
        spec: MatrixSpec,
        kept: tuple[Array, ...],
        gradient: Stack,
        clock: RefreshClock,
        momentum: Any,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Moves the stored basis at each refresh."""
        first = is_unchosen(kept[0])
        started = self.chosen(spec, kept[0], gradient, clock, first)

        def move() -> Basis:
            moved = self.move(spec, kept[0], gradient, clock, momentum)
            return jnp.where(first[..., None, None], started, moved)

        basis = jax.lax.cond(clock.refresh_now & for_any(~first), move, lambda: started)
        return basis, (basis,)


@dataclasses.dataclass(frozen=True)
class PowerIteration(Moved):
    """Tracked power iteration; see `power_iteration`."""

    rho: float = 0.908
    b1: float = 0.0

    stays_close: ClassVar[bool] = True

    def move(
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


@dataclasses.dataclass(frozen=True)
class Grassmann(Moved):
    """Steps along geodesics of subspaces; see `grassmann`."""

    step_size: float | Array = 1.0
    normalize: bool = True

    stays_close: ClassVar[bool] = True

    def move(
        self, spec: MatrixSpec, basis: Basis, gradient: Stack, clock: RefreshClock, momentum: Any
    ) -> Basis:
        """Rotates one direction of the subspace, along the leading singular pair of the slope."""
        factor, _ = scale_to_one(gradient)
        squares = jnp.square(factor * gradient).sum((-2, -1), keepdims=True)
        low = factor * self.down(spec, basis, gradient)
        slope = factor * self.correlation(spec, gradient, low)  # G Rᵀ
        slope *= jnp.where(squares > 0, 2 / squares, 0)
        for _ in range(2):  # once more, as rounding would show where little is left
            inside = product("...mr,...ms->...rs", basis, slope)
            slope -= product("...mr,...rs->...ms", basis, inside)
        v = leading_eigenvectors(product("...mr,...ms->...rs", slope, slope), 1)
        u = product("...mr,...rs->...ms", slope, v)
        length = jnp.sqrt(jnp.square(u).sum(-2, keepdims=True))
        angle = self.step_size * length
        if not self.normalize:
            angle *= squares / factor**2
        turned = product("...mr,...rs->...ms", basis, v) * (jnp.cos(angle) - 1)
        turned += u / lengths_of(u) * jnp.sin(angle)
        return basis + product("...ms,...rs->...mr", turned, v)


@dataclasses.dataclass(frozen=True)
class Coap(Moved):
    """COAP's projection; see `coap`."""

    rate: float | Array = 0.1
    recalibrate_every: int = 5
    normalize: bool = True

    orthonormal: ClassVar[bool] = False

    def move(
        self, spec: MatrixSpec, basis: Basis, gradient: Stack, clock: RefreshClock, momentum: Any
    ) -> Basis:
        """Takes a gradient step on the loss, or computes singular vectors of a sketch by P."""
        factor, exists = scale_to_one(gradient)
        moved = jax.lax.cond(
            clock.refresh % self.recalibrate_every == 0,
            lambda: self._recalibrate(spec, basis, factor * gradient),
            lambda: self._step(spec, basis, gradient, factor, momentum),
        )
        return jnp.where(exists[..., None, None], moved, basis)

    def _recalibrate(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> Basis:
        """The singular vectors, on the projected side, of G in the span of its sketch G P."""
        sketch = self.down(spec, basis, gradient)
        is_left = self.is_left(spec)
        across = orthonormal(sketch.mT).mT if is_left else orthonormal(sketch)
        spanned = self.correlation(spec, gradient, across)
        squares = product("...mr,...ms->...rs", spanned, spanned)
        rotation = leading_eigenvectors(squares, basis.shape[-1])
        return orthonormal(product("...mr,...rs->...ms", spanned, rotation))

    def _step(
        self, spec: MatrixSpec, basis: Basis, gradient: Stack, factor: Array, momentum: Any
    ) -> Basis:
        """P after a step on its loss, whose gradient is no longer than one."""
        g = gradient
        if self.normalize:
            g = factor * gradient
            rms = jnp.sqrt(jnp.square(g).mean((-2, -1), keepdims=True))
            g /= jnp.where(rms > 0, rms, 1)

        def loss(basis: Basis) -> Array:
            missed = self.residual(spec, basis, g, self.down(spec, basis, g))
            error = jnp.square(missed).mean((-2, -1))
            if momentum is None:
                return error.sum()
            m = self.up(spec, basis, scale_to_one(momentum)[0] * momentum)
            return (error * (1 - _cosines(m, g).mean(-1))).sum()

        slope = jax.grad(loss)(basis)
        length = jnp.sqrt(jnp.square(slope).sum((-2, -1), keepdims=True))
        return basis - self.rate * slope / jnp.maximum(length, 1)


def _cosines(a: Stack, b: Stack) -> Array:
    """The cosine of the angle between each two columns, 0 for columns of zeros."""
    inverse = lambda x: jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-2), 1e-30))
    return (a * b).sum(-2) * inverse(a) * inverse(b)


@dataclasses.dataclass(frozen=True)
class LazySvd(Tracked):
    """Singular vectors that are refreshed less often where they change little; see `lazy_svd`.

    It keeps the basis, the number of times by which the interval was doubled, and the last cosines,
    0 for those to come.
    """

    threshold: float = 0.4
    queue: int = 5

    @property
    def keeps(self) -> int:
        """The basis, the doublings and the cosines."""
        return 3

    def init(self, spec: MatrixSpec) -> tuple[Array, ...]:
        """No basis, an interval that is not yet doubled, and no cosines."""
        cosines = jnp.zeros((*spec.stack, self.queue), spec.dtype)
        return (*super().init(spec), jnp.zeros(spec.stack, jnp.int32), cosines)

    def basis_at(
        self,
        spec: MatrixSpec,
        kept: tuple[Array, ...],
        gradient: Stack,
        clock: RefreshClock,
        momentum: Any,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Refreshes the bases whose interval is over, and doubles those that hardly changed."""
        old, doublings, cosines = kept
        is_due = clock.refresh_now & (clock.refresh % (1 << doublings) == 0)
        basis = self.chosen(spec, old, gradient, clock, is_due)
        changed = is_due & ~is_unchosen(old) & ~is_unchosen(basis)
        cosine = _cosines(old[..., :1], basis[..., :1])
        # The sign of a singular vector is arbitrary.
        later = jnp.concatenate([cosines[..., 1:], jnp.abs(cosine)], -1)
        cosines = jnp.where(changed[..., None], later, cosines)
        is_full = (cosines > 0).all(-1)
        is_steady = changed & is_full & (cosines.mean(-1) >= self.threshold)
        doublings = jnp.minimum(doublings + is_steady, 30)
        return basis, (basis, doublings, cosines)


@checked
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


@checked
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


@checked
def grassmann(
    rank: int | float,
    *,
    side: str = "short",
    step_size: float | Array = 1.0,
    normalize: bool = True,
    start: Projector | None = None,
) -> Projector:
    """A basis that is rotated towards the gradient at each refresh: SubTrack++'s tracking.

    It starts from the first gradient's singular vectors; then, with (σ, u, v) the leading singular
    value and vectors of the direction of steepest descent of ‖G − P PᵀG‖²::

        D = 2 (G − P R) Rᵀ,  R = PᵀG           D ≈ σ u vᵀ
        P ← P (I − v vᵀ) + (P v cos(η σ) + u sin(η σ)) vᵀ

    P stays orthonormal: one direction, P v, is rotated by the angle ησ towards u. In the paper that
    angle grows with the square of the gradient's size; by default σ is that of D / ‖G‖², which is
    at most 1. (The released code forms its projector I − P Pᵀ on the wrong side if m ≥ n, so that
    these matrices keep their first basis.) State: the basis, side×r numbers per matrix.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        step_size: η.
        normalize: divide D by ‖G‖². Without, the paper has η = 10000 for pre-training.
        start: the projector that gives the first basis; by default `randomized_svd`.

    Raises:
        ValueError: if `rank` is below one, or larger than the matrix's shorter side.

    References:
        Rajabi et al., SubTrack++: Gradient Subspace Tracking for Scalable LLM Training, 2025,
        https://arxiv.org/abs/2502.01586, section 2.

    Example:
        >>> [x.shape for x in grassmann(2).init(MatrixSpec("w", (3, 8, 4), jnp.float32))]
        [(3, 4, 2)]
    """
    check_at_least("step_size", step_size, 0)
    return Grassmann(rank, side, True, start, step_size, normalize)


@checked
def coap(
    rank: int | float,
    *,
    side: str = "short",
    rate: float | Array = 0.1,
    recalibrate_every: int = 5,
    normalize: bool = True,
    start: Projector | None = None,
) -> Projector:
    """A basis that takes a gradient step at each refresh, and is seldom computed anew: COAP's.

    It starts from the first gradient's singular vectors; then, with M the inner optimizer's first
    moment and the cosine between each output's columns::

        L(P) = mean((G − up(down(G)))²) · (1 − mean(cos(up(M), G)))
        P ← P − rate · ∇L / max(1, ‖∇L‖)

    Every `recalibrate_every` refreshes, P becomes the singular vectors of G in the span of G P
    instead: a QR and an eigendecomposition of r×r. Between, its columns are not kept orthonormal.
    If the inner optimizer has no first moment, L is the first factor. State: the basis, side×r
    numbers per matrix.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        rate: the learning rate of P.
        recalibrate_every: λ, refreshes between two computations; `refresh_every` is 32 in the
            released code.
        normalize: divide G by its root mean square, so that L and the steps do not depend on the
            size of gradients. The paper does not; steps on small gradients are then very small.
        start: the projector that gives the first basis; by default `randomized_svd`.

    Raises:
        ValueError: if `rank` is below one, or larger than the matrix's shorter side, or
            `recalibrate_every` is below one.

    References:
        Xiao et al., COAP: Memory-Efficient Training with Correlation-Aware Gradient Projection,
        2024, https://arxiv.org/abs/2412.00071, section 3.

    Example:
        >>> [x.shape for x in coap(2).init(MatrixSpec("w", (3, 8, 4), jnp.float32))]
        [(3, 4, 2)]
    """
    check_at_least("rate", rate, 0)
    check_at_least("recalibrate_every", recalibrate_every, 1)
    return Coap(rank, side, True, start, rate, recalibrate_every, normalize)


@checked
def lazy_svd(
    rank: int | float,
    *,
    side: str = "short",
    threshold: float = 0.4,
    queue: int = 5,
    start: Projector | None = None,
) -> Projector:
    """Singular vectors that are computed half as often where they change little: Q-GaLore's.

    At each refresh of a matrix, |cos| of the angle between its old and its new first vector is
    recorded. As soon as `queue` of them are known, and at each later refresh, the matrix's interval
    is doubled if the mean of the last `queue` is at least `threshold`: the matrix is then refreshed
    at every 2nd, 4th, 8th, … multiple of `refresh_every`. (The released code has no absolute value,
    though the sign of a singular vector is arbitrary.) Each matrix of a stack has an interval of
    its own; `on_refresh` applies at each multiple of `refresh_every`.

    State: the basis, side×r numbers per matrix, and `queue` + 1 numbers. Q-GaLore stores the basis
    in 4 bits, as does ``memopt.quantize_state`` with
    ``{"/projector/0/": codecs.Asymmetric(bits=4)}``.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        threshold: the smallest mean cosine, between 0 and 1, that doubles an interval.
        queue: the number of cosines.
        start: the projector that gives the bases; by default `randomized_svd`.

    Raises:
        ValueError: if `rank` is below one, or larger than the matrix's shorter side, `threshold` is
            not between 0 and 1, or `queue` is below one.

    References:
        Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
        Gradients, 2024, https://arxiv.org/abs/2407.08296, section 3.2.

    Example:
        >>> [x.shape for x in lazy_svd(2).init(MatrixSpec("w", (3, 8, 4), jnp.float32))]
        [(3, 4, 2), (3,), (3, 5)]
    """
    check_between("threshold", threshold, 0, 1)
    check_at_least("queue", queue, 1)
    return LazySvd(rank, side, True, start, threshold, queue)
