"""Projectors that select entries; all other entries are outside the subspace."""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from memopt.checked import checked
from memopt.shapes import Basis, LowRank, Stack
from memopt.transforms.projectors.base import MatrixSpec, Projector, RefreshClock


@dataclasses.dataclass(frozen=True)
class Selected(Projector):
    """Selects entries of G unchanged; `up` puts them back in their places among zeros."""

    @abc.abstractmethod
    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> LowRank:
        """The selected entries."""

    @abc.abstractmethod
    def up(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> Stack:
        """Puts the selected entries in their places, with zeros elsewhere."""

    def carry(
        self, spec: MatrixSpec, old: Array, new: Array, low: LowRank, *, power: int
    ) -> LowRank:
        """Keeps the entries that are selected again; newly selected ones start at zero."""
        return self.down(spec, new, self.up(spec, old, low))


@dataclasses.dataclass(frozen=True)
class Strata(Selected):
    """Selects one of every c lines, entries or layers, drawn from (seed, parameter, refresh).

    An axis is split into (b, c, width), b strata of c members; one of the c is selected, which
    leaves (b, width). Both directions are elementwise.

    Attributes:
        every: c; `rank` is 1/c.
        seed: the seed of the draws, which also depend on parameter and refresh.
    """

    every: int = 4
    seed: int | Array = 0

    @abc.abstractmethod
    def axis(self, spec: MatrixSpec) -> int:
        """The axis of G along which one of every c is selected, counted from the end."""

    def parts(self, spec: MatrixSpec) -> tuple[int, int]:
        """The number b of strata along the axis, and their width; b·c·width may exceed it."""
        return math.ceil(spec.shape[self.axis(spec)] / self.every), 1

    def projected_shape(self, spec: MatrixSpec) -> tuple[int, ...]:
        """The shape of the gradient with the axis c times shorter."""
        at = len(spec.shape) + self.axis(spec)
        return (*spec.shape[:at], math.prod(self.parts(spec)), *spec.shape[at + 1 :])

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> LowRank:
        """The selected entries; the axis is c times shorter."""
        strata = self._split(spec, gradient, self.every)
        chosen = jnp.where(self._is_chosen(spec, basis), strata, 0)
        return self._join(spec, chosen.sum(self.axis(spec) - 1, keepdims=True))

    def up(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> Stack:
        """Puts the selected entries in their places, with zeros elsewhere."""
        strata = jnp.where(self._is_chosen(spec, basis), self._split(spec, low, 1), 0)
        return self._full(spec, strata)

    def residual(self, spec: MatrixSpec, basis: Basis, gradient: Stack, low: LowRank) -> Stack:
        """The entries that are not selected, computed from the gradient alone."""
        strata = self._split(spec, gradient, self.every)
        return self._full(spec, jnp.where(self._is_chosen(spec, basis), 0, strata))

    def mean(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> LowRank:
        """The mean over the axis, without a selection beyond its end."""
        exists = self.down(spec, basis, jnp.ones(spec.shape, low.dtype))
        count = jnp.maximum(exists.sum(self.axis(spec), keepdims=True), 1)
        return (exists * low).sum(self.axis(spec), keepdims=True) / count

    def _is_chosen(self, spec: MatrixSpec, basis: Basis) -> Array:
        """Marks the selected entries of an axis that is split into (b, c, width)."""
        at = basis.ndim + self.axis(spec)
        b, _ = self.parts(spec)
        choice = basis.reshape(*basis.shape[:at], b, 1, -1, *basis.shape[at + 1 :])
        members = jnp.arange(self.every).reshape(-1, *(1,) * -self.axis(spec))
        return choice == jnp.expand_dims(members, range(choice.ndim - members.ndim))

    def _split(self, spec: MatrixSpec, x: Array, c: int) -> Array:
        """Splits an axis into (b, c, width), padded with zeros."""
        at = x.ndim + self.axis(spec)
        b, width = self.parts(spec)
        if missing := b * c * width - x.shape[at]:
            x = jnp.pad(x, [(0, missing if i == at else 0) for i in range(x.ndim)])
        return x.reshape(*x.shape[:at], b, c, width, *x.shape[at + 1 :])

    def _full(self, spec: MatrixSpec, strata: Array) -> Array:
        """Inverts `_split` and removes the padding."""
        axis = len(spec.shape) + self.axis(spec)
        return jax.lax.slice_in_dim(self._join(spec, strata), 0, spec.shape[axis], axis=axis)

    def _join(self, spec: MatrixSpec, x: Array) -> Array:
        """Joins the three axes of `_split`."""
        at = x.ndim + self.axis(spec) - 2
        return x.reshape(*x.shape[:at], math.prod(x.shape[at : at + 3]), *x.shape[at + 3 :])


class Coordinates(Strata):
    """Selects entries in each line independently; see `coordinates`."""

    def axis(self, spec: MatrixSpec) -> int:
        """The rows' axis if the left side is projected, else the columns'."""
        return -2 if self.is_left(spec) else -1

    def parts(self, spec: MatrixSpec) -> tuple[int, int]:
        """Strata as wide as a TPU's memory tiles if they fit, so that splitting moves no data."""
        length = spec.shape[self.axis(spec)]
        for width in (16, 8):
            if length % (self.every * width) == 0:
                return length // (self.every * width), width
        return super().parts(spec)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """Draws one entry of each stratum of each line."""
        return self._drawn(spec, clock, spec.shape[-2:], math.prod(self.parts(spec)))

    def _drawn(
        self, spec: MatrixSpec, clock: RefreshClock, shape: tuple[int, ...], strata: int
    ) -> Array:
        """Numbers from 0 to c - 1, one for each stratum."""
        sizes = list(shape)
        sizes[self.axis(spec)] = strata
        key = spec.key(self.seed, clock.refresh)
        return jax.random.randint(key, tuple(sizes), 0, self.every, jnp.int32)


class Lines(Coordinates):
    """Selects whole rows or columns, one tile's width at a time; see `columns`."""

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """Draws one tile of each stratum."""
        return self._drawn(spec, clock, (1, 1), self.parts(spec)[0])

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> LowRank:
        """The selected lines; if they are whole tiles of rows, only these are read."""
        b, width = self.parts(spec)
        if not self.is_left(spec) or width == 1:
            return super().down(spec, basis, gradient)
        *stack, _, n = gradient.shape
        tiles = gradient.reshape(*stack, b * self.every, width, n)
        index = jnp.broadcast_to(basis[:, 0] + self.every * jnp.arange(b), (*stack, b))
        take = lambda x, i: jnp.take(x, i, axis=0, mode="clip")
        for _ in stack:
            take = jax.vmap(take)
        low = take(tiles, index).reshape(*stack, b * width, n)
        # Without the barrier, XLA for TPUs moves later computations before this reshape and stores
        # their results twice.
        return jax.lax.optimization_barrier(low)


class Blocks(Strata):
    """Selects whole matrices of a stack; see `blocks`."""

    per_matrix: ClassVar[bool] = False

    def axis(self, spec: MatrixSpec) -> int:
        """The stack's first axis."""
        return -len(spec.shape)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """Draws one layer of each stratum; for a single matrix, whether it is selected."""
        key = spec.key(self.seed, clock.refresh)
        draw = lambda i: jax.random.randint(
            jax.random.fold_in(key, i), (), 0, self.every, jnp.int32
        )
        if len(spec.shape) == 2:
            return draw(spec.layer // self.every) == spec.layer % self.every
        chosen = jax.vmap(draw)(jnp.arange(self.parts(spec)[0]))
        return chosen.reshape(-1, *(1,) * (len(spec.shape) - 1))

    def projected_shape(self, spec: MatrixSpec) -> tuple[int, ...]:
        """The shape of the selected layers, or the full shape of a single matrix."""
        return spec.shape if len(spec.shape) == 2 else super().projected_shape(spec)

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> LowRank:
        """The selected layers, a stack c times shorter; a single matrix unchanged or zeros."""
        if len(spec.shape) == 2:
            return jnp.where(basis, gradient, 0)
        return super().down(spec, basis, gradient)

    def up(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> Stack:
        """Puts the selected layers in their places, with zeros elsewhere."""
        if len(spec.shape) == 2:
            return jnp.where(basis, low, 0)
        return super().up(spec, basis, low)

    def residual(self, spec: MatrixSpec, basis: Basis, gradient: Stack, low: LowRank) -> Stack:
        """The layers that are not selected."""
        if len(spec.shape) == 2:
            return jnp.where(basis, 0, gradient)
        return super().residual(spec, basis, gradient, low)


@checked
def columns(density: float = 0.25, *, side: str = "left", seed: int | Array = 0) -> Projector:
    """Selects random input features: whole lines of each matrix, density·mn entries.

    At each refresh, one of every 1/density lines is drawn; the selection is not stored. If the
    side is divisible, 16 or 8 adjacent lines, whole tiles of a TPU's memory, are drawn together.
    The authors' code calls these lines columns; in a kernel (in, out) they are rows.

    Args:
        density: ρ, one over a whole number.
        side: "left" selects rows, "right" columns; "short" and "long" depend on a matrix's shape.
        seed: the seed of the draws, which also depend on parameter and refresh.

    Raises:
        ValueError: if `density` is not one over a whole number.

    References:
        Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, section 4.

    Example:
        >>> spec, g = MatrixSpec("w", (8, 6), jnp.float32), jnp.ones((8, 6))
        >>> some = columns(0.25)
        >>> low = some.down(spec, some.basis(spec, g, RefreshClock.first()), g)
        >>> low.shape, some.up(spec, some.basis(spec, g, RefreshClock.first()), low).sum()
        ((2, 6), Array(12., dtype=float32))
    """
    return Lines(density, side, False, _one_in(density), seed)


@checked
def coordinates(density: float = 0.25, *, side: str = "left", seed: int | Array = 0) -> Projector:
    """Selects random entries, density·mn of each matrix.

    At each refresh, one of every 1/density entries of a column (of a row with ``side="right"``)
    is drawn; the selection is not stored.

    Args:
        density: ρ, one over a whole number.
        side: the side along which entries are drawn.
        seed: the seed of the draws, which also depend on parameter and refresh.

    Raises:
        ValueError: if `density` is not one over a whole number.

    References:
        Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, section 4 ("RandK").

    Example:
        >>> spec, g = MatrixSpec("w", (8, 6), jnp.float32), jnp.ones((8, 6))
        >>> some = coordinates(0.5)
        >>> some.down(spec, some.basis(spec, g, RefreshClock.first()), g).shape
        (4, 6)
    """
    return Coordinates(density, side, False, _one_in(density), seed)


@checked
def blocks(density: float = 0.25, *, seed: int | Array = 0) -> Projector:
    """Selects whole matrices of a stack, a fraction `density` at a time.

    At each refresh, one of every 1/density successive layers is drawn. For a stack of L layers,
    the inner optimizer keeps state for ⌈density·L⌉. Layers that are not stacked are recognised by
    the layer index in their names and give the same numbers; but each keeps state of its own even
    while it is not selected, so that no memory is saved.

    Args:
        density: ρ, one over a whole number.
        seed: the seed of the draws, which also depend on parameter and refresh.

    Raises:
        ValueError: if `density` is not one over a whole number.

    References:
        Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, section 4 ("Blockwise").

    Example:
        >>> spec, g = MatrixSpec("w", (8, 3, 5), jnp.float32), jnp.ones((8, 3, 5))
        >>> some = blocks(0.25)
        >>> some.down(spec, some.basis(spec, g, RefreshClock.first()), g).shape
        (2, 3, 5)
    """
    return Blocks(density, "short", False, _one_in(density), seed)


def _one_in(density: float) -> int:
    """Returns c for a density of 1/c."""
    every = round(1 / density) if 0 < density <= 1 else 0
    if not every or abs(every * density - 1) > 1e-6:
        raise ValueError(f"density must be one over a whole number, such as 0.25, got {density}.")
    return every
