"""Random subspaces, drawn from a seed and by default not stored."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.checked import checked
from memopt.shapes import Basis, LowRank, Stack
from memopt.transforms.linalg import orthonormal
from memopt.transforms.project_and_norm import project_and_norm
from memopt.transforms.projectors.base import MatrixSpec, Projector, RefreshClock


@dataclasses.dataclass(frozen=True)
class RandomProjector(Projector):
    """A basis drawn from (seed, parameter, refresh), independent of how arrays are sharded.

    All layers share one basis, stacked or not: the key depends on the parameter's name without the
    index of its layer, so that ``layers/3/up`` has the basis of a stacked ``layers/up``. The
    guarantees of random projections hold for each matrix separately, so that one basis, drawn and
    held in memory while it is used, suffices for all layers.

    Attributes:
        seed: the seed of the draws, which also depend on parameter and refresh.
    """

    seed: int | Array = 0

    orthonormal: ClassVar[bool] = False

    @abc.abstractmethod
    def entries(self, key: Array, shape: tuple[int, int]) -> Basis:
        """Independent entries of mean 0 and variance 1, float32."""

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """A basis ``(side, r)`` with entries of variance 1/r."""
        side, r = self.size(spec)
        key = spec.key(self.seed, clock.refresh)
        return (self.entries(key, (side, r)) / np.sqrt(r)).astype(spec.dtype)

    def basis_shape(self, spec: MatrixSpec) -> tuple[int, ...]:
        """Returns ``(side, r)``, since a stack shares one basis."""
        return self.size(spec)

    def down_and_squares(
        self, spec: MatrixSpec, basis: Basis, gradient: Stack
    ) -> tuple[LowRank, Array]:
        """Computes both in one pass over the gradient if there is a kernel for it."""
        given = gradient.astype(spec.gradient_dtype or spec.dtype)
        return project_and_norm(basis, given, self.is_left(spec), spec.split)


class Gaussian(RandomProjector):
    """Normal entries; see `gaussian`."""

    def entries(self, key: Array, shape: tuple[int, int]) -> Basis:
        """Standard normal numbers."""
        return jax.random.normal(key, shape, jnp.float32)


class Rademacher(RandomProjector):
    """Random signs; see `rademacher`."""

    def entries(self, key: Array, shape: tuple[int, int]) -> Basis:
        """Random signs, ±1, from one random bit each."""
        count = shape[0] * shape[1]
        words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
        bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
        return (2.0 * bits.astype(jnp.float32) - 1.0).reshape(-1)[:count].reshape(shape)


class Sparse(RandomProjector):
    """Mostly zeros; see `sparse`."""

    def entries(self, key: Array, shape: tuple[int, int]) -> Basis:
        """√3 times -1, 0 or 1; two in three entries are 0."""
        third = jax.random.randint(key, shape, 0, 6, jnp.int32)
        return np.sqrt(3.0) * jnp.where(third < 2, 2.0 * third - 1.0, 0.0).astype(jnp.float32)


class Orthogonal(Gaussian):
    """Columns of a random rotation; see `orthogonal`."""

    orthonormal: ClassVar[bool] = True

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """Orthonormal columns with the span of a Gaussian basis."""
        return orthonormal(super().basis(spec, gradient, clock))


@checked
def gaussian(
    rank: int | float, *, side: str = "short", seed: int | Array = 0, stored: bool = False
) -> Projector:
    """Random bases with entries N(0, 1/r), not orthogonalised; E[P Pᵀ] = identity.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        seed: the seed of the draws, which also depend on parameter and refresh.
        stored: store the basis (side×r numbers per parameter) and draw only at refreshes; useful if
            drawing costs more than reading. By default nothing is stored.

    Raises:
        ValueError: if `rank` is below one, or larger than the side it projects.

    References:
        Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, section 4.1.

    Example:
        >>> gaussian(4).size(MatrixSpec("w", (8, 512, 1376), jnp.float32))
        (512, 4)
    """
    return Gaussian(rank, side, stored, seed)


@checked
def rademacher(
    rank: int | float, *, side: str = "short", seed: int | Array = 0, stored: bool = False
) -> Projector:
    """Random bases with entries ±1/√r: the cheapest to draw, with one random bit per entry.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        seed: the seed of the draws, which also depend on parameter and refresh.
        stored: store the basis between refreshes; see `gaussian`.

    Raises:
        ValueError: if `rank` is below one, or larger than the side it projects.

    References:
        Achlioptas, Database-friendly random projections, 2003, Theorem 1.1.

    Example:
        >>> rademacher(0.25).size(MatrixSpec("w", (96, 32), jnp.float32))
        (32, 8)
    """
    return Rademacher(rank, side, stored, seed)


@checked
def sparse(
    rank: int | float, *, side: str = "short", seed: int | Array = 0, stored: bool = False
) -> Projector:
    """Random bases with entries √(3/r)·{-1, 0, 1}; two in three entries are 0.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        seed: the seed of the draws, which also depend on parameter and refresh.
        stored: store the basis between refreshes; see `gaussian`.

    Raises:
        ValueError: if `rank` is below one, or larger than the side it projects.

    References:
        Achlioptas, Database-friendly random projections, 2003, Theorem 1.1.

    Example:
        >>> spec = MatrixSpec("w", (300, 300), jnp.float32)
        >>> p = sparse(100).basis(spec, None, RefreshClock.first())
        >>> 0.6 < (p == 0).mean() < 0.7
        Array(True, dtype=bool)
    """
    return Sparse(rank, side, stored, seed)


@checked
def orthogonal(
    rank: int | float, *, side: str = "short", seed: int | Array = 0, stored: bool = True
) -> Projector:
    """Random orthonormal bases: PᵀP = identity.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        seed: the seed of the draws, which also depend on parameter and refresh.
        stored: store the basis between refreshes, side×r numbers per parameter; False draws and
            orthogonalises it at every step.

    Raises:
        ValueError: if `rank` is below one, or larger than the side it projects.

    References:
        Zmushko et al., FRUGAL, 2024, https://arxiv.org/abs/2411.07837, section 5.1.

    Example:
        >>> spec = MatrixSpec("w", (4, 6), jnp.float32)
        >>> p = orthogonal(2).basis(spec, None, RefreshClock.first())
        >>> jnp.abs(p.T @ p - jnp.eye(2)).max() < 1e-6
        Array(True, dtype=bool)
    """
    return Orthogonal(rank, side, stored, seed)
