"""Projectors: the subspaces that `in_subspace` works in.

A matrix G (m×n) is projected on one side, by a basis P of rank r:

======== ============ ================ =================
side     P            down: R =        up: G ≈
======== ============ ================ =================
"left"   m×r          PᵀG   (r×n)      P R
"right"  n×r          G P   (m×r)      R Pᵀ
======== ============ ================ =================

``side="short"`` projects the shorter side (of a square the left one), so that R keeps the
longer; ``side="long"`` the other. All of them may carry leading stack axes; a P without them
serves the whole stack.
"""

import abc
import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from memopt.errors import check_at_least, check_choice
from memopt.state.precision import zeros_of


class Leaf(NamedTuple):
    """What a projector knows of a parameter.

    Attributes:
      name: its name in the tree.
      shape: ``(*stack, m, n)``.
      dtype: of the gradient's statistics.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any


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
    def at(cls, step: Array, refresh_every: Any) -> "When":
        """The place of a step in a run that refreshes every so many."""
        every = jnp.asarray(refresh_every).astype(jnp.int32)
        return cls(step, step // every, step % every == 0)

    @classmethod
    def first(cls) -> "When":
        """The first step."""
        return cls.at(jnp.zeros((), jnp.int32), 1)


@dataclasses.dataclass(frozen=True)
class Projector(abc.ABC):
    """A rule that gives every matrix a subspace; subclasses say how its basis is made.

    Attributes:
      rank: r, or a fraction of each matrix's shorter side.
      side: which side is projected: "short", "long", "left" or "right".
      stored: whether the basis is kept between refreshes, in an array of side×r numbers, or
        made anew at every step.
    """

    rank: int | float
    side: str = "short"
    stored: bool = False

    def __post_init__(self) -> None:
        check_choice("side", self.side, ("short", "long", "left", "right"))
        if isinstance(self.rank, float):
            if not 0 < self.rank <= 1:
                raise ValueError(f"a fractional rank must be in (0, 1], got {self.rank}.")
        else:
            check_at_least("rank", self.rank, 1)

    @abc.abstractmethod
    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """A fresh basis for a gradient ``(*stack, m, n)``: ``(*stack, side, r)`` or one for all."""

    def init(self, leaf: Leaf) -> Any:
        """What is kept between steps: a basis of zeros if stored, else nothing."""
        if not self.stored:
            return ()
        gradient = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return zeros_of(lambda g: self.basis(leaf, g, When.first()), gradient)

    def space(self, leaf: Leaf, state: Any, gradient: Array, when: When) -> tuple[Array, Any]:
        """The basis in force at this step and the state to keep."""
        if not self.stored:
            return self.basis(leaf, gradient, when), ()
        fresh = lambda: self.basis(leaf, gradient, when)
        state = jax.lax.cond(when.due, fresh, lambda: state)
        return state, state

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
                f"with the {'rows' if self.is_left(leaf) else 'columns'} projected; got {r}."
            )
        return side, r

    def down(self, leaf: Leaf, basis: Array, gradient: Array) -> Array:
        """The gradient in the subspace: PᵀG or G P."""
        if self.is_left(leaf):
            return jnp.einsum("...mr,...mn->...rn", _for_stack(basis, gradient), gradient)
        return jnp.einsum("...mn,...nr->...mr", gradient, basis)

    def up(self, leaf: Leaf, basis: Array, low: Array) -> Array:
        """What stands in the subspace, in full size: P R or R Pᵀ."""
        if self.is_left(leaf):
            return jnp.einsum("...mr,...rn->...mn", _for_stack(basis, low), low)
        return jnp.einsum("...mr,...nr->...mn", low, basis)


@dataclasses.dataclass(frozen=True)
class RandomProjector(Projector):
    """A basis drawn from (seed, parameter, refresh): the same numbers however it is sharded.

    A stack shares one basis, and so do layers that are kept apart: a parameter is known by its
    name without the numbers in it, so that ``layers/3/up`` has the basis of a stacked
    ``layers/up``. What random projections promise, they promise for each matrix by itself; and
    one basis is drawn, and held while it is used, instead of one for each layer.

    Attributes:
      seed: what the draws depend on, besides parameter and refresh.
    """

    seed: int | Array = 0

    @abc.abstractmethod
    def entries(self, key: Array, shape: tuple[int, int]) -> Array:
        """Independent entries of mean 0 and variance 1, float32."""

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """Entries of variance 1/r, ``(side, r)``."""
        side, r = self.size(leaf)
        seed = self.seed if isinstance(self.seed, int) else jnp.asarray(self.seed, jnp.int32)
        name = re.sub(r"[/_]?\d+", "", leaf.name)
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        key = jax.random.fold_in(key, when.refresh)
        return (self.entries(key, (side, r)) / np.sqrt(r)).astype(leaf.dtype)


class Gaussian(RandomProjector):
    """Normal entries; see `gaussian`."""

    def entries(self, key: Array, shape: tuple[int, int]) -> Array:
        """Standard normal numbers."""
        return jax.random.normal(key, shape, jnp.float32)


class Rademacher(RandomProjector):
    """Random signs; see `rademacher`."""

    def entries(self, key: Array, shape: tuple[int, int]) -> Array:
        """±1, one random bit each."""
        count = shape[0] * shape[1]
        words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
        bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return (2.0 * bits.astype(jnp.float32) - 1.0).reshape(-1)[:count].reshape(shape)


@dataclasses.dataclass(frozen=True)
class Replay(Projector):
    """Given bases; see `replay`.

    Attributes:
      matrices: {leaf name: {step first used: matrix}}.
    """

    matrices: Mapping[str, Mapping[int, ArrayLike]] = dataclasses.field(default_factory=dict)

    def is_left(self, leaf: Leaf) -> bool:
        """Read off the matrices' shape, unless `side` says."""
        if self.side in ("left", "right"):
            return self.side == "left"
        m, n = leaf.shape[-2:]
        given = np.shape(next(iter(self._steps(leaf).values())))[-2:]
        if max(given) not in (m, n):
            raise ValueError(
                f"the matrices to replay for {leaf.name!r} have shape {given}: "
                f"their longer side should be {m} (rows) or {n} (columns)."
            )
        return given[0] >= given[1] if m == n else max(given) == m

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """The matrix last begun at this step, in this module's orientation."""
        steps = self._steps(leaf)
        begins = jnp.asarray(sorted(steps), jnp.int32)
        bases = [np.asarray(steps[t]) for t in sorted(steps)]
        tall = jnp.asarray(np.stack([b if _is_tall(b) else b.swapaxes(-1, -2) for b in bases]))
        return tall[jnp.searchsorted(begins, when.step + 1, side="right") - 1].astype(leaf.dtype)

    def _steps(self, leaf: Leaf) -> Mapping[int, ArrayLike]:
        check_choice("replay: leaf", leaf.name, self.matrices)
        steps = self.matrices[leaf.name]
        if min(steps) != 1:
            raise ValueError(f"replay for {leaf.name!r} must begin at step 1, not {min(steps)}.")
        return steps


def gaussian(
    rank: int | float,
    *,
    side: str = "short",
    seed: int | Array = 0,
    stored: bool = False,
) -> Projector:
    """Random bases with entries N(0, 1/r), not orthogonalised; E[P Pᵀ] = identity.

    Args:
      rank: r, or a fraction of each matrix's shorter side.
      side: "short", "long", "left" or "right".
      seed: what the draws depend on, besides parameter and refresh.
      stored: keep the basis between refreshes (side×r numbers a parameter) and draw only
        then, for when drawing costs more than reading. By default nothing is kept.

    Raises:
      ValueError: if `rank` is below one, or larger than the side it projects.

    References:
      Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, section 4.1.

    Example:
      >>> gaussian(4).size(Leaf("w", (8, 512, 1376), jnp.float32))
      (512, 4)
    """
    return Gaussian(rank, side, stored, seed)


def rademacher(
    rank: int | float,
    *,
    side: str = "short",
    seed: int | Array = 0,
    stored: bool = False,
) -> Projector:
    """Random bases with entries ±1/√r: one random bit an entry, the cheapest to draw.

    Args:
      rank: r, or a fraction of each matrix's shorter side.
      side: "short", "long", "left" or "right".
      seed: what the draws depend on, besides parameter and refresh.
      stored: keep the basis between refreshes; see `gaussian`.

    Raises:
      ValueError: if `rank` is below one, or larger than the side it projects.

    References:
      Achlioptas, Database-friendly random projections, 2003.

    Example:
      >>> rademacher(0.25).size(Leaf("w", (96, 32), jnp.float32))
      (32, 8)
    """
    return Rademacher(rank, side, stored, seed)


def by_name(projector: Projector | str, rank: int | float, **options: Any) -> Projector:
    """A projector as it is, or "gaussian" or "rademacher" of this rank.

    Args:
      projector: a `Projector`, or the name of a random one.
      rank: r, or a fraction of each matrix's shorter side; for a name only.
      **options: further arguments, for a name only.

    Raises:
      ValueError: if the name is unknown.

    Example:
      >>> by_name("rademacher", 4) == rademacher(4)
      True
    """
    if isinstance(projector, Projector):
        return projector
    named = {"gaussian": gaussian, "rademacher": rademacher}
    check_choice("projector", projector, named)
    return named[projector](rank, **options)


def replay(matrices: Mapping[str, Mapping[int, ArrayLike]], *, side: str = "short") -> Projector:
    """Given bases, so that a run of another framework can be followed number by number.

    Args:
      matrices: {leaf name: {step first used, from 1: matrix}}. A matrix may be side×r or
        r×side. Which side it projects follows from its longer side; of a square one r×side
        projects the columns and side×r the rows, as the authors' codes of GaLore's family
        store them.
      side: "left" or "right" to say it instead.

    Raises:
      ValueError: if a leaf has no matrices, none from step 1, or of a wrong shape.

    Example:
      >>> replay({"w": {1: np.eye(4)[:2]}}).is_left(Leaf("w", (4, 4), jnp.float32))
      False
    """
    return Replay(1, side, matrices=matrices)


def _is_tall(matrix: np.ndarray) -> bool:
    return matrix.shape[-2] >= matrix.shape[-1]


def _for_stack(basis: Array, like: Array) -> Array:
    """The basis once for each matrix: a batched product that copies no transposed gradient."""
    stack = jax.typeof(like).sharding.spec[:-2]
    sharding = jax.P(*stack, None, None) if any(stack) else None
    shape = (*like.shape[:-2], *basis.shape[-2:])
    return jnp.broadcast_to(basis, shape, out_sharding=sharding)
