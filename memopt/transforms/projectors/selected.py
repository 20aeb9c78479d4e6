"""Subspaces of chosen entries: the rest of the matrix is outside of them."""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from memopt.shapes import Basis, Projected, Stack
from memopt.transforms.projectors.base import MatrixSpec, Projector, RefreshClock


@dataclasses.dataclass(frozen=True)
class Selected(Projector):
    """Entries of G as they are; `up` puts them back in their places among zeros."""

    @abc.abstractmethod
    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> Projected:
        """The chosen entries."""

    @abc.abstractmethod
    def up(self, spec: MatrixSpec, basis: Basis, low: Projected) -> Stack:
        """The chosen entries in their places, zeros elsewhere."""

    def carry(
        self, spec: MatrixSpec, old: Array, new: Array, low: Projected, *, power: int
    ) -> Projected:
        """Keeps the entries that are chosen again; the new ones begin at zero."""
        return self.down(spec, new, self.up(spec, old, low))


@dataclasses.dataclass(frozen=True)
class Strata(Selected):
    """One of every c lines, entries or layers, drawn from (seed, parameter, refresh).

    The members of a stratum stand some way apart: an axis splits into (b, c, width), one of
    c is chosen, and (b, width) is left. Both directions are elementwise.

    Attributes:
      every: c; `rank` is 1/c.
      seed: what the draws depend on, besides parameter and refresh.
    """

    every: int = 4
    seed: int | Array = 0

    @abc.abstractmethod
    def axis(self, spec: MatrixSpec) -> int:
        """The axis of G along which one of every c is chosen, counted from the end."""

    def parts(self, spec: MatrixSpec) -> tuple[int, int]:
        """The number b of strata along the axis, and their width; b·c·width may exceed it."""
        return math.ceil(spec.shape[self.axis(spec)] / self.every), 1

    def projected_shape(self, spec: MatrixSpec) -> tuple[int, ...]:
        """The shape of the gradient with the axis c times shorter."""
        at = len(spec.shape) + self.axis(spec)
        return (*spec.shape[:at], math.prod(self.parts(spec)), *spec.shape[at + 1 :])

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> Projected:
        """The chosen entries: the axis is c times shorter."""
        strata = self._split(spec, gradient, self.every)
        chosen = jnp.where(self._is_chosen(spec, basis), strata, 0)
        return self._join(spec, chosen.sum(self.axis(spec) - 1, keepdims=True))

    def up(self, spec: MatrixSpec, basis: Basis, low: Projected) -> Stack:
        """The chosen entries in their places, zeros elsewhere."""
        strata = jnp.where(self._is_chosen(spec, basis), self._split(spec, low, 1), 0)
        return self._full(spec, strata)

    def residual(self, spec: MatrixSpec, basis: Basis, gradient: Stack, low: Projected) -> Stack:
        """The entries that are not chosen, read off the gradient alone."""
        strata = self._split(spec, gradient, self.every)
        return self._full(spec, jnp.where(self._is_chosen(spec, basis), 0, strata))

    def _is_chosen(self, spec: MatrixSpec, basis: Basis) -> Array:
        """Marks the chosen entries of an axis that is split into (b, c, width)."""
        at = basis.ndim + self.axis(spec)
        b, _ = self.parts(spec)
        choice = basis.reshape(*basis.shape[:at], b, 1, -1, *basis.shape[at + 1 :])
        return choice == jnp.arange(self.every).reshape(-1, *(1,) * -self.axis(spec))

    def _split(self, spec: MatrixSpec, x: Array, c: int) -> Array:
        """An axis as (b, c, width), filled up with zeros."""
        at = x.ndim + self.axis(spec)
        b, width = self.parts(spec)
        if missing := b * c * width - x.shape[at]:
            x = jnp.pad(x, [(0, missing if i == at else 0) for i in range(x.ndim)])
        return x.reshape(*x.shape[:at], b, c, width, *x.shape[at + 1 :])

    def _full(self, spec: MatrixSpec, strata: Array) -> Array:
        """The inverse of `_split`, of full size."""
        axis = len(spec.shape) + self.axis(spec)
        return jax.lax.slice_in_dim(self._join(spec, strata), 0, spec.shape[axis], axis=axis)

    def _join(self, spec: MatrixSpec, x: Array) -> Array:
        """The three axes of `_split` as one."""
        at = x.ndim + self.axis(spec) - 2
        return x.reshape(*x.shape[:at], math.prod(x.shape[at : at + 3]), *x.shape[at + 3 :])


class Coordinates(Strata):
    """Entries, chosen in each line by themselves; see `coordinates`."""

    def axis(self, spec: MatrixSpec) -> int:
        """Down each column, or along each row."""
        return -2 if self.is_left(spec) else -1

    def parts(self, spec: MatrixSpec) -> tuple[int, int]:
        """Whole tiles of a TPU's memory wide, where they fit: splitting rows moves nothing."""
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
    """Rows, or columns, as many together as a tile is wide; see `columns`."""

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """Draws one tile of each stratum."""
        return self._drawn(spec, clock, (1, 1), self.parts(spec)[0])

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> Projected:
        """The chosen lines; whole tiles of rows are read by themselves."""
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
        # XLA for TPUs would compute what follows before this reshape, and store it twice.
        return jax.lax.optimization_barrier(low)


class Blocks(Strata):
    """Whole matrices of a stack; see `blocks`."""

    per_matrix: ClassVar[bool] = False

    def axis(self, spec: MatrixSpec) -> int:
        """The stack's first axis."""
        return -len(spec.shape)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """Draws one layer of each stratum; for a matrix by itself, says whether it is drawn."""
        key = spec.key(self.seed, clock.refresh)
        draw = lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, self.every)
        if len(spec.shape) == 2:
            return draw(spec.layer // self.every) == spec.layer % self.every
        chosen = jax.vmap(draw)(jnp.arange(self.parts(spec)[0]))
        return chosen.reshape(-1, *(1,) * (len(spec.shape) - 1))

    def projected_shape(self, spec: MatrixSpec) -> tuple[int, ...]:
        """The shape of the chosen layers; of a matrix by itself, its own."""
        return spec.shape if len(spec.shape) == 2 else super().projected_shape(spec)

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> Projected:
        """The chosen layers: the stack is c times shorter. A matrix by itself: it, or zeros."""
        if len(spec.shape) == 2:
            return jnp.where(basis, gradient, 0)
        return super().down(spec, basis, gradient)

    def up(self, spec: MatrixSpec, basis: Basis, low: Projected) -> Stack:
        """The chosen layers in their places, zeros elsewhere."""
        if len(spec.shape) == 2:
            return jnp.where(basis, low, 0)
        return super().up(spec, basis, low)

    def residual(self, spec: MatrixSpec, basis: Basis, gradient: Stack, low: Projected) -> Stack:
        """The other layers."""
        if len(spec.shape) == 2:
            return jnp.where(basis, 0, gradient)
        return super().residual(spec, basis, gradient, low)


def columns(density: float = 0.25, *, side: str = "left", seed: int | Array = 0) -> Projector:
    """Random input features: whole lines of each matrix, density·mn entries of it.

    Of every 1/density lines one is drawn at each refresh; nothing of the choice is kept. Where
    they divide the side, 16 or 8 adjacent lines, whole tiles of a TPU's memory, are drawn
    together. They are what the authors' code calls columns: of a kernel (in, out) its rows.

    Args:
      density: ρ, one over a whole number.
      side: "left" chooses rows, "right" columns; "short" and "long" go by a matrix's shape.
      seed: what the draws depend on, besides parameter and refresh.

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


def coordinates(density: float = 0.25, *, side: str = "left", seed: int | Array = 0) -> Projector:
    """Random entries: density·mn of each matrix.

    Of every 1/density entries of a column (of a row with ``side="right"``) one is
    drawn at each refresh; nothing of the choice is kept.

    Args:
      density: ρ, one over a whole number.
      side: along which side entries are drawn.
      seed: what the draws depend on, besides parameter and refresh.

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


def blocks(density: float = 0.25, *, seed: int | Array = 0) -> Projector:
    """Whole matrices of a stack, density of them at a time.

    Of every 1/density successive layers one is drawn at each refresh. A stack of L layers
    keeps what the inner optimizer keeps for ⌈density·L⌉ of them. Layers that are no stack are
    told by the first number in their names and give the same numbers; but each has an array of
    its own that is idle while another is at work, so that nothing is saved.

    Args:
      density: ρ, one over a whole number.
      seed: what the draws depend on, besides parameter and refresh.

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
    """C of a density 1/c."""
    every = round(1 / density) if 0 < density <= 1 else 0
    if not every or abs(every * density - 1) > 1e-6:
        raise ValueError(f"density must be one over a whole number, such as 0.25, got {density}.")
    return every
