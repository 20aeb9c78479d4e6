"""Subspaces of chosen entries: the rest of the matrix is outside of them."""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from memopt.transforms.linalg import explicit_axes
from memopt.transforms.projectors.base import Leaf, Projector, When


@dataclasses.dataclass(frozen=True)
class Selected(Projector):
    """Entries of G as they are; `up` puts them back in their places among zeros."""

    @abc.abstractmethod
    def down(self, leaf: Leaf, basis: Array, gradient: Array) -> Array:
        """The chosen entries."""

    @abc.abstractmethod
    def up(self, leaf: Leaf, basis: Array, low: Array) -> Array:
        """The chosen entries in their places, zeros elsewhere."""

    def carry(self, leaf: Leaf, old: Array, new: Array, low: Array, *, power: int) -> Array:
        """What is chosen again stays; zeros for what is new."""
        return self.down(leaf, new, self.up(leaf, old, low))


@dataclasses.dataclass(frozen=True)
class Strata(Selected):
    """One of every c successive lines, entries or layers, drawn from (seed, parameter, refresh).

    Attributes:
      every: c; `rank` is 1/c.
      seed: what the draws depend on, besides parameter and refresh.
    """

    every: int = 4
    seed: int | Array = 0

    @abc.abstractmethod
    def axis(self, leaf: Leaf) -> int:
        """The axis of G along which one of every c is chosen."""

    def _drawn(self, leaf: Leaf, when: When, shape: tuple[int, ...]) -> Array:
        key = leaf.key(self.seed, when.refresh)
        return jax.random.randint(key, shape, 0, self.every, jnp.int32)

    def _count(self, length: int) -> int:
        return math.ceil(length / self.every)

    def down(self, leaf: Leaf, basis: Array, gradient: Array) -> Array:
        """The chosen entries: the axis is c times shorter."""
        axis = self.axis(leaf)
        strata = self._split(gradient, axis)
        return jnp.where(self._chosen(leaf, basis), strata, 0).sum(axis)

    def up(self, leaf: Leaf, basis: Array, low: Array) -> Array:
        """The chosen entries in their places, zeros elsewhere."""
        axis = self.axis(leaf)
        strata = jnp.where(self._chosen(leaf, basis), jnp.expand_dims(low, axis), 0)
        return self._merge(leaf, strata, axis)

    def _chosen(self, leaf: Leaf, basis: Array) -> Array:
        """Where the entries stand, in an array whose axis is split into (strata, c)."""
        axis = self.axis(leaf)
        within = jnp.arange(self.every).reshape(-1, *(1,) * (-axis - 1))
        return jnp.expand_dims(basis, axis) == within

    def _split(self, x: Array, axis: int) -> Array:
        """An axis as (strata, c), the last stratum filled up with zeros."""
        at = x.ndim + axis
        length, count = x.shape[at], self._count(x.shape[at])
        spec, sharding = explicit_axes(x), None
        if spec is not None:
            mesh = jax.typeof(x).sharding.mesh
            names = spec[at] if isinstance(spec[at], tuple) else (spec[at],)
            shards = math.prod(mesh.shape[name] for name in names if name)
            if count * self.every > length or count % shards:
                x = jax.sharding.reshard(x, jax.P(*spec[:at], None, *spec[at + 1 :]))
            strata = jax.typeof(x).sharding.spec[at]
            sharding = jax.P(*spec[:at], strata, None, *spec[at + 1 :])
        if count * self.every > length:
            x = jnp.pad(
                x, [(0, count * self.every - n if i == at else 0) for i, n in enumerate(x.shape)]
            )
        shape = (*x.shape[:at], count, self.every, *x.shape[at + 1 :])
        return x.reshape(shape, out_sharding=sharding)

    def _merge(self, leaf: Leaf, x: Array, axis: int) -> Array:
        """The inverse of `_split`."""
        at = x.ndim + axis
        spec = explicit_axes(x)
        sharding = None if spec is None else jax.P(*spec[:at], *spec[at + 1 :])
        shape = (*x.shape[: at - 1], x.shape[at - 1] * x.shape[at], *x.shape[at + 1 :])
        x = x.reshape(shape, out_sharding=sharding)
        x = jax.lax.slice_in_dim(x, 0, leaf.shape[axis], axis=at - 1)
        return x if spec is None else jax.sharding.reshard(x, leaf.sharding)


class Lines(Strata):
    """Whole rows, or columns; see `columns`."""

    def axis(self, leaf: Leaf) -> int:
        """Rows or columns."""
        return -2 if self.is_left(leaf) else -1

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """Of each stratum the place of the chosen line."""
        shape = [1, 1]
        shape[self.axis(leaf)] = self._count(leaf.shape[self.axis(leaf)])
        return self._drawn(leaf, when, tuple(shape))


class Coordinates(Lines):
    """Entries, chosen in each line by themselves; see `coordinates`."""

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """Of each stratum of each line the place of the chosen entry."""
        shape = list(leaf.shape[-2:])
        shape[self.axis(leaf)] = self._count(leaf.shape[self.axis(leaf)])
        return self._drawn(leaf, when, tuple(shape))


class Blocks(Strata):
    """Whole matrices of a stack; see `blocks`."""

    per_matrix: ClassVar[bool] = False

    def axis(self, leaf: Leaf) -> int:
        """The stack's first axis."""
        return -len(leaf.shape)

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """Of each stratum the chosen layer; of a matrix by itself, whether it is one."""
        key = leaf.key(self.seed, when.refresh)
        draw = lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, self.every)
        if len(leaf.shape) == 2:
            return draw(leaf.layer // self.every) == leaf.layer % self.every
        chosen = jax.vmap(draw)(jnp.arange(self._count(leaf.shape[0])))
        return chosen.reshape(-1, *(1,) * (len(leaf.shape) - 1))

    def down(self, leaf: Leaf, basis: Array, gradient: Array) -> Array:
        """The chosen layers: the stack is c times shorter. A matrix by itself: it, or zeros."""
        if len(leaf.shape) == 2:
            return jnp.where(basis, gradient, 0)
        return super().down(leaf, basis, gradient)

    def up(self, leaf: Leaf, basis: Array, low: Array) -> Array:
        """The chosen layers in their places, zeros elsewhere."""
        if len(leaf.shape) == 2:
            return jnp.where(basis, low, 0)
        return super().up(leaf, basis, low)


def columns(density: float = 0.25, *, side: str = "left", seed: int | Array = 0) -> Projector:
    """Random input features: whole lines of each matrix, density·mn entries of it.

    Of every 1/density successive lines one is drawn at each refresh; nothing of the choice is
    kept. They are what the authors' code calls columns: of a kernel (in, out) its rows.

    Args:
      density: ρ, one over a whole number.
      side: "left" chooses rows, "right" columns; "short" and "long" go by a matrix's shape.
      seed: what the draws depend on, besides parameter and refresh.

    Raises:
      ValueError: if `density` is not one over a whole number.

    References:
      Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, section 4.

    Example:
      >>> leaf, g = Leaf("w", (8, 6), jnp.float32), jnp.ones((8, 6))
      >>> some = columns(0.25)
      >>> low = some.down(leaf, some.basis(leaf, g, When.first()), g)
      >>> low.shape, some.up(leaf, some.basis(leaf, g, When.first()), low).sum()
      ((2, 6), Array(12., dtype=float32))
    """
    return Lines(density, side, False, _one_in(density), seed)


def coordinates(density: float = 0.25, *, side: str = "left", seed: int | Array = 0) -> Projector:
    """Random entries: density·mn of each matrix.

    Of every 1/density successive entries of a column (of a row with ``side="right"``) one is
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
      >>> leaf, g = Leaf("w", (8, 6), jnp.float32), jnp.ones((8, 6))
      >>> some = coordinates(0.5)
      >>> some.down(leaf, some.basis(leaf, g, When.first()), g).shape
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
      >>> leaf, g = Leaf("w", (8, 3, 5), jnp.float32), jnp.ones((8, 3, 5))
      >>> some = blocks(0.25)
      >>> some.down(leaf, some.basis(leaf, g, When.first()), g).shape
      (2, 3, 5)
    """
    return Blocks(density, "short", False, _one_in(density), seed)


def _one_in(density: float) -> int:
    """C of a density 1/c."""
    every = round(1 / density) if 0 < density <= 1 else 0
    if not every or abs(every * density - 1) > 1e-6:
        raise ValueError(f"density must be one over a whole number, such as 0.25, got {density}.")
    return every
