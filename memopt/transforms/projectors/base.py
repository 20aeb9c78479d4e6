"""The interface of projectors."""

import abc
import dataclasses
import numbers
import zlib
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.axis_types import varying_as
from memopt.errors import check_at_least, check_choice, check_static
from memopt.names import split_layer
from memopt.reductions import for_any, scale_to_one
from memopt.shapes import Basis, LowRank, Square, Stack
from memopt.transforms.linalg import for_stack, product, replicate_axis

_RENAMED = {"space": "basis_at", "before": "previous_basis", "low": "projected_shape"}
_RENAMED |= {"rest": "residual"}
SIDES = ("short", "long", "left", "right")


class MatrixSpec(NamedTuple):
    """The name, shape and dtype of a stack of matrices.

    Attributes:
        name: the parameter's name in the tree.
        shape: ``(*stack, m, n)``.
        dtype: the dtype of the gradient's statistics.
        gradient_dtype: the dtype of the gradient itself; None if it is `dtype`.
        split: the mesh axes that split the gradient, if its type has them (under Explicit axes).
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    gradient_dtype: Any = None
    split: Any = None

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the stack."""
        return self.shape[:-2]

    @property
    def group(self) -> str:
        """The name without the layer's index: the same for all layers, stacked or not."""
        return split_layer(self.name)[0]

    @property
    def layer(self) -> int:
        """The layer's index in the name, or 0 if there is none."""
        return split_layer(self.name)[1] or 0

    def key(self, seed: int | Array, refresh: Array) -> Array:
        """The random key for (seed, parameter, refresh)."""
        seed = seed if isinstance(seed, int) else jnp.asarray(seed, jnp.int32)
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(key, np.uint32(zlib.crc32(self.group.encode())))
        return jax.random.fold_in(key, refresh)


class RefreshClock(NamedTuple):
    """The current step and refresh.

    Attributes:
        step: the number of previous steps, int32.
        refresh: the index of the refresh that gave the current basis, from 0, int32.
        refresh_now: whether this step begins with a refresh, bool.
    """

    step: Array
    refresh: Array
    refresh_now: Array

    @classmethod
    def at(cls, step: Array, refresh_every: Any, phase: int = 0) -> "RefreshClock":
        """The clock of a run that refreshes every `refresh_every` steps, `phase` steps early."""
        every = jnp.asarray(refresh_every).astype(jnp.int32)
        now = (step == 0) | ((step + phase) % every == 0)
        return cls(step, (step + phase) // every, now)

    @classmethod
    def first(cls) -> "RefreshClock":
        """The clock of the first step."""
        return cls.at(jnp.zeros((), jnp.int32), 1)

    @property
    def before(self) -> "RefreshClock":
        """The clock of the previous step, if this step refreshes."""
        return RefreshClock(self.step - 1, self.refresh - 1, jnp.zeros((), bool))


@dataclasses.dataclass(frozen=True)
class Projector(abc.ABC):
    """A rule that gives every matrix a subspace; subclasses define its basis.

    Attributes:
        rank: r, or a fraction of each matrix's shorter side.
        side: which side is projected: "short", "long", "left" or "right".
        stored: whether the basis is stored between refreshes, in an array of side×r numbers (or in
            a shorter form, see `choose` and `expand`), or computed at every step.
        orthonormal: whether up∘down is an orthogonal projection.
        per_matrix: whether R has a matrix for each matrix of G.
        moves: whether the basis also changes between refreshes.
        stays_close: whether a refresh changes the subspace little.
        from_gradients: whether a stored basis is computed from the gradient; a matrix whose
            gradient is zero then waits for its basis, see `basis_at`.
    """

    rank: int | float
    side: str = "short"
    stored: bool = False

    orthonormal: ClassVar[bool] = True
    per_matrix: ClassVar[bool] = True
    moves: ClassVar[bool] = False
    stays_close: ClassVar[bool] = False
    from_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("side", self.side, SIDES)
        check_static("rank", self.rank)
        if not isinstance(self.rank, numbers.Integral):
            if not 0 < self.rank <= 1:
                raise ValueError(f"a fractional rank must be in (0, 1], got {self.rank}.")
        else:
            check_at_least("rank", self.rank, 1)

    def __init_subclass__(cls) -> None:
        """Refuses methods by their names in memopt 0.1, which nothing would call."""
        for old, new in _RENAMED.items():
            if old in vars(cls):
                raise TypeError(f"{cls.__name__}.{old} is now {new}; see memopt's CHANGELOG.")

    @abc.abstractmethod
    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """Computes a basis for a gradient ``(*stack, m, n)``.

        Returns:
            ``(*stack, side, r)``, or ``(side, r)`` if all matrices share one basis.
        """

    def choose(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Array:
        """Computes a basis in the form in which it is stored; by default the basis itself."""
        return self.basis(spec, gradient, clock)

    def expand(self, spec: MatrixSpec, stored: Array) -> Basis:
        """Computes a basis from its stored form, zeros from zeros."""
        return stored

    @property
    def keeps(self) -> int:
        """The number of arrays that `init` returns, the same for all parameters."""
        return int(self.stored)

    def init(self, spec: MatrixSpec) -> tuple[Array, ...]:
        """The arrays kept between steps: a basis of zeros if stored, else none."""
        if not self.stored:
            return ()
        return (jnp.zeros(self.basis_shape(spec), spec.dtype),)

    def basis_at(
        self,
        spec: MatrixSpec,
        kept: tuple[Array, ...],
        gradient: Stack,
        clock: RefreshClock,
        momentum: Any,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns the basis of this step, and the arrays to keep.

        A gradient of zeros has no directions. If bases are computed from gradients, a matrix whose
        gradient is zero at a refresh gets a basis of zeros, so that it rests, and is refreshed at
        its first gradient that is not zero; each matrix of a stack by itself.

        Args:
            spec: the parameter's matrices.
            kept: the arrays kept by the previous step.
            gradient: G, ``(*stack, m, n)``.
            clock: the current step and refresh.
            momentum: the inner optimizer's first moment in the previous step's subspace; None if it
                has none.
        """
        if not self.stored:
            return self.basis(spec, gradient, clock), ()
        if self.from_gradients:
            stored = self.chosen(spec, kept[0], gradient, clock, clock.refresh_now)
        else:
            fresh = lambda: varying_as(kept[0], self.choose(spec, gradient, clock))
            stored = jax.lax.cond(clock.refresh_now, fresh, lambda: kept[0])
        return self.expand(spec, stored), (stored,)

    def chosen(
        self, spec: MatrixSpec, old: Array, gradient: Stack, clock: RefreshClock, now: Any
    ) -> Array:
        """Computes new bases from a stack of gradients for the matrices that need one.

        Args:
            spec: the parameter's matrices.
            old: the stored bases, zeros for a matrix that waits for its first gradient.
            gradient: G, ``(*stack, m, n)``.
            clock: the current step and refresh.
            now: whether all matrices need a new basis, or only those that wait.
        """
        wanted = now | is_unchosen(old)

        def look() -> Basis:
            factor, exists = scale_to_one(gradient)
            due = wanted & exists
            pick = lambda which, a, b: jnp.where(which[..., None, None], a, b)
            others = pick(wanted, 0, old)
            fresh = lambda: pick(due, self.choose(spec, gradient * factor, clock), others)
            return jax.lax.cond(for_any(due), fresh, lambda: others)

        return jax.lax.cond(for_any(wanted), look, lambda: old)

    def previous_basis(
        self, spec: MatrixSpec, kept: tuple[Array, ...], gradient: Stack, clock: RefreshClock
    ) -> Basis:
        """The basis that a refresh at this step replaces."""
        if not self.stored:
            return self.basis(spec, gradient, clock.before)
        return self.expand(spec, kept[0])

    def basis_shape(self, spec: MatrixSpec) -> tuple[int, ...]:
        """The shape of a stored basis: ``(*stack, side, r)``, or ``(side, r)`` if all share it."""
        return (*spec.stack, *self.size(spec))

    def projected_shape(self, spec: MatrixSpec) -> tuple[int, ...]:
        """The shape of a gradient in the subspace: ``(*stack, r, n)`` or ``(*stack, m, r)``."""
        (*_, m, n), (_, r) = spec.shape, self.size(spec)
        return (*spec.stack, *((r, n) if self.is_left(spec) else (m, r)))

    def is_left(self, spec: MatrixSpec) -> bool:
        """Whether the rows are projected, rather than the columns."""
        if self.side in ("left", "right"):
            return self.side == "left"
        m, n = spec.shape[-2:]
        return (m <= n) == (self.side == "short")

    def size(self, spec: MatrixSpec) -> tuple[int, int]:
        """The length of the projected side, and r."""
        m, n = spec.shape[-2:]
        side = m if self.is_left(spec) else n
        is_fraction = not isinstance(self.rank, numbers.Integral)
        r = max(1, round(float(self.rank) * min(m, n))) if is_fraction else int(self.rank)
        if r > side:
            raise ValueError(
                f"rank must be between 1 and {side} for {spec.name!r}, whose matrices are {m}×{n} "
                f"with the {'rows' if self.is_left(spec) else 'columns'} projected; got {r}; "
                "memopt.describe shows what each parameter is taken for."
            )
        return side, r

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> LowRank:
        """Projects the gradient to the subspace: PᵀG or G P."""
        basis = replicate_axis(basis, -1)
        if self.is_left(spec):
            low = product("...mr,...mn->...rn", for_stack(basis, gradient), gradient)
            return replicate_axis(low, -2)
        return replicate_axis(product("...mn,...nr->...mr", gradient, basis), -1)

    def down_and_squares(
        self, spec: MatrixSpec, basis: Basis, gradient: Stack
    ) -> tuple[LowRank, Array]:
        """Projects the gradient, and returns the sum of squares of each of its channels too."""
        axis = -2 if self.is_left(spec) else -1
        return self.down(spec, basis, gradient), jnp.square(gradient).sum(axis, keepdims=True)

    def up(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> Stack:
        """Lifts an array in the subspace to full size: P R or R Pᵀ."""
        basis = replicate_axis(basis, -1)
        low = replicate_axis(low, -2 if self.is_left(spec) else -1)
        if self.is_left(spec):
            return product("...mr,...rn->...mn", for_stack(basis, low), low)
        return product("...mr,...nr->...mn", low, basis)

    def residual(self, spec: MatrixSpec, basis: Basis, gradient: Stack, low: LowRank) -> Stack:
        """The part of the gradient outside the subspace: G − up(R)."""
        return gradient - self.up(spec, basis, low)

    def correlation(self, spec: MatrixSpec, gradient: Stack, low: LowRank) -> Basis:
        """The product of the gradient and its projection: G Rᵀ or GᵀR, side×r."""
        return product(
            "...mn,...rn->...mr" if self.is_left(spec) else "...mn,...mr->...nr", gradient, low
        )

    def gram(self, spec: MatrixSpec, a: LowRank, b: LowRank) -> Square:
        """The r×r inner products of two projected arrays: A Bᵀ or AᵀB."""
        return product("...rn,...sn->...rs" if self.is_left(spec) else "...mr,...ms->...rs", a, b)

    def mean(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> LowRank:
        """The mean over the r numbers of each channel of a projected array, as an axis of one."""
        return low.mean(-2 if self.is_left(spec) else -1, keepdims=True)

    def carry(
        self, spec: MatrixSpec, old: Basis, new: Basis, low: LowRank, *, power: int
    ) -> LowRank:
        """Transforms coordinates of an old subspace to a new one: down_new(up_old(R)).

        Args:
            spec: the parameter's matrices.
            old: the previous basis.
            new: the new basis.
            low: R, or the second moment of its entries.
            power: the power to which entries of the r×r change of basis are raised, 2 for a second
                moment.
        """
        change_of_basis = product("...ms,...mr->...sr", new, old) ** power
        if self.is_left(spec):
            return product("...sr,...rn->...sn", for_stack(change_of_basis, low), low)
        return product("...mr,...sr->...ms", low, change_of_basis)


def is_unchosen(basis: Array) -> Array:
    """Whether each stored basis of a stack is zeros; no first column is zero alone.

    Example:
        >>> is_unchosen(jnp.stack([jnp.eye(3, 2), jnp.zeros((3, 2))])).tolist()
        [False, True]
    """
    return (basis[..., 0] == 0).all(-1)
