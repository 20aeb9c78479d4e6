"""What every projector has."""

import abc
import dataclasses
import re
import zlib
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.errors import check_at_least, check_choice
from memopt.matrices import group_name
from memopt.state.precision import zeros_of
from memopt.transforms.linalg import for_stack, product, undivided, whole

SIDES = ("short", "long", "left", "right")


class Leaf(NamedTuple):
    """What a projector knows of a parameter.

    Attributes:
      name: its name in the tree.
      shape: ``(*stack, m, n)``.
      dtype: of the gradient's statistics.
      sharding: of its matrices, where a mesh has explicit axes.
      given: the dtype in which the gradient comes, if not that of its statistics.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: Any = None
    given: Any = None

    @property
    def gradient(self) -> jax.ShapeDtypeStruct:
        """Of its matrices shape, dtype and sharding."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)

    @property
    def group(self) -> str:
        """The name without its numbers: one for all layers, stacked or not."""
        return group_name(self.name)

    @property
    def layer(self) -> int:
        """The first number in the name, 0 without one: the place in a stack not stacked."""
        number = re.search(r"\d+", self.name)
        return int(number[0]) if number else 0

    def key(self, seed: int | Array, refresh: Array) -> Array:
        """A random key of (seed, parameter, refresh)."""
        seed = seed if isinstance(seed, int) else jnp.asarray(seed, jnp.int32)
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(key, np.uint32(zlib.crc32(self.group.encode())))
        return jax.random.fold_in(key, refresh)


class When(NamedTuple):
    """Where in training a step stands.

    Attributes:
      step: steps taken before this one, int32.
      refresh: the number of refreshes before the basis in force, int32.
      due: whether this step begins with a refresh, bool.
    """

    step: Array
    refresh: Array
    due: Array

    @classmethod
    def at(cls, step: Array, refresh_every: Any, phase: int = 0) -> "When":
        """The place of a step in a run that refreshes every so many, `phase` of them early."""
        every = jnp.asarray(refresh_every).astype(jnp.int32)
        due = (step == 0) | ((step + phase) % every == 0)
        return cls(step, (step + phase) // every, due)

    @classmethod
    def first(cls) -> "When":
        """The first step."""
        return cls.at(jnp.zeros((), jnp.int32), 1)

    @property
    def before(self) -> "When":
        """The step before one that is due; for the refresh in force then."""
        return When(self.step - 1, self.refresh - 1, jnp.zeros((), bool))


@dataclasses.dataclass(frozen=True)
class Projector(abc.ABC):
    """A rule that gives every matrix a subspace; subclasses say how its basis is made.

    Attributes:
      rank: r, or a fraction of each matrix's shorter side.
      side: which side is projected: "short", "long", "left" or "right".
      stored: whether the basis is kept between refreshes, in an array of side×r numbers, or
        made anew at every step.
      orthonormal: whether up∘down is an orthogonal projection.
      per_matrix: whether R has a matrix for each of G's.
      moves: whether the basis moves between refreshes too.
    """

    rank: int | float
    side: str = "short"
    stored: bool = False

    orthonormal: ClassVar[bool] = True
    per_matrix: ClassVar[bool] = True
    moves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("side", self.side, SIDES)
        if isinstance(self.rank, float):
            if not 0 < self.rank <= 1:
                raise ValueError(f"a fractional rank must be in (0, 1], got {self.rank}.")
        else:
            check_at_least("rank", self.rank, 1)

    @abc.abstractmethod
    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """A fresh basis for a gradient ``(*stack, m, n)``: ``(*stack, side, r)`` or one for all."""

    @property
    def keeps(self) -> int:
        """The number of arrays that `init` returns, one and the same for all parameters."""
        return int(self.stored)

    def init(self, leaf: Leaf) -> tuple[Array, ...]:
        """The arrays kept between steps: a basis of zeros if stored, else none."""
        if not self.stored:
            return ()
        return (zeros_of(lambda g: self.basis(leaf, g, When.first()), leaf.gradient),)

    def space(
        self, leaf: Leaf, kept: tuple[Array, ...], gradient: Array, when: When, momentum: Any
    ) -> tuple[Array, tuple[Array, ...]]:
        """The basis in force at this step, and the arrays to keep.

        Args:
          leaf: the parameter.
          kept: what the step before kept.
          gradient: G, ``(*stack, m, n)``.
          when: the place of the step in training.
          momentum: the inner optimizer's first moment, in the subspace of the step before; None
            if it has none.
        """
        if not self.stored:
            return self.basis(leaf, gradient, when), ()
        fresh = lambda: self.basis(leaf, gradient, when)
        basis = jax.lax.cond(when.due, fresh, lambda: kept[0])
        return basis, (basis,)

    def before(self, leaf: Leaf, kept: tuple[Array, ...], gradient: Array, when: When) -> Array:
        """The basis that a refresh due now replaces."""
        return kept[0] if self.stored else self.basis(leaf, gradient, when.before)

    def low(self, leaf: Leaf) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a gradient in the subspace."""

        def down(gradient: Array) -> Array:
            basis, _ = self.space(leaf, self.init(leaf), gradient, When.first(), None)
            return self.down(leaf, basis, gradient)

        return jax.eval_shape(down, leaf.gradient)

    def is_left(self, leaf: Leaf) -> bool:
        """Whether the rows, not the columns, are projected."""
        if self.side in ("left", "right"):
            return self.side == "left"
        m, n = leaf.shape[-2:]
        return (m <= n) == (self.side == "short")

    def size(self, leaf: Leaf) -> tuple[int, int]:
        """The length of the projected side, and r."""
        m, n = leaf.shape[-2:]
        side = m if self.is_left(leaf) else n
        r = max(1, round(self.rank * min(m, n))) if isinstance(self.rank, float) else self.rank
        if r > side:
            raise ValueError(
                f"rank must be between 1 and {side} for {leaf.name!r}, whose matrices are {m}×{n} "
                f"with the {'rows' if self.is_left(leaf) else 'columns'} projected; got {r}; "
                "memopt.describe shows what each parameter is taken for."
            )
        return side, r

    def down(self, leaf: Leaf, basis: Array, gradient: Array) -> Array:
        """The gradient in the subspace: PᵀG or G P."""
        basis = undivided(basis, -1)
        if self.is_left(leaf):
            low = product("...mr,...mn->...rn", for_stack(basis, gradient), gradient)
            return undivided(low, -2)
        return undivided(product("...mn,...nr->...mr", gradient, basis), -1)

    def down_and_squares(self, leaf: Leaf, basis: Array, gradient: Array) -> tuple[Array, Array]:
        """The gradient in the subspace, and each of its channels' sum of squares."""
        axis = -2 if self.is_left(leaf) else -1
        return self.down(leaf, basis, gradient), jnp.square(gradient).sum(axis, keepdims=True)

    def up(self, leaf: Leaf, basis: Array, low: Array) -> Array:
        """What stands in the subspace, in full size: P R or R Pᵀ."""
        basis, low = undivided(basis, -1), undivided(low, -2 if self.is_left(leaf) else -1)
        if self.is_left(leaf):
            return product("...mr,...rn->...mn", for_stack(basis, low), low, like=leaf.sharding)
        return product("...mr,...nr->...mn", low, basis, like=leaf.sharding)

    def rest(self, leaf: Leaf, basis: Array, gradient: Array, low: Array) -> Array:
        """What of the gradient is outside the subspace, where `low` stands: G − up(R)."""
        return gradient - self.up(leaf, basis, low)

    def correlation(self, leaf: Leaf, gradient: Array, low: Array) -> Array:
        """How the projected side goes with what stands in a subspace: G Rᵀ or GᵀR, side×r."""
        spec = "...mn,...rn->...mr" if self.is_left(leaf) else "...mn,...mr->...nr"
        return whole(product(spec, gradient, low))

    def gram(self, leaf: Leaf, a: Array, b: Array) -> Array:
        """The inner products of the r dimensions of two low arrays: A Bᵀ or AᵀB, r×r."""
        return product("...rn,...sn->...rs" if self.is_left(leaf) else "...mr,...ms->...rs", a, b)

    def carry(self, leaf: Leaf, old: Array, new: Array, low: Array, *, power: int) -> Array:
        """What stands in an old subspace, in a new one: down_new(up_old(R)), by r×r numbers.

        Args:
          leaf: the parameter.
          old: the basis that was in force.
          new: the basis that is.
          low: R, or the second moment of its entries.
          power: to which those numbers are raised, 2 for a second moment.
        """
        turn = product("...ms,...mr->...sr", new, old)
        turn = turn**power
        if self.is_left(leaf):
            return product("...sr,...rn->...sn", for_stack(turn, low), low)
        return product("...mr,...sr->...ms", low, turn)
