"""Subspaces of fixed orthogonal transforms, whose bases are computed rather than stored."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.checked import checked
from memopt.errors import check_choice
from memopt.shapes import Basis, LowRank, Stack
from memopt.transforms.projectors.base import MatrixSpec, Projector, RefreshClock


@dataclasses.dataclass(frozen=True)
class Dct(Projector):
    """Columns of the discrete cosine transform; see `dct`.

    The stored form of a basis is the numbers of its columns, ``(*stack, r, 1)``, counted from 1, so
    that zeros are no basis.

    Attributes:
        norm: the norm by which columns are chosen, "l1" or "l2".
    """

    stored: bool = True
    norm: str = "l1"

    from_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("norm", self.norm, ("l1", "l2"))

    def init(self, spec: MatrixSpec) -> tuple[Array, ...]:
        """Zeros in place of the numbers of columns."""
        return (jnp.zeros((*spec.stack, self.size(spec)[1], 1), jnp.int32),)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """The columns on which the gradient is largest."""
        return self.expand(spec, self.choose(spec, gradient, clock))

    def choose(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Array:
        """The numbers of the r columns on which the gradient is largest, in increasing order."""
        side, r = self.size(spec)
        every = self.expand(spec, jnp.arange(1, side + 1)[:, None])
        size = {"l1": jnp.abs, "l2": jnp.square}[self.norm](self.down(spec, every, gradient))
        sizes = size.sum(-1 if self.is_left(spec) else -2)
        return 1 + jnp.sort(jax.lax.top_k(sizes, r)[1])[..., None]

    def expand(self, spec: MatrixSpec, stored: Array) -> Basis:
        """The cosines in columns of given numbers."""
        side = self.size(spec)[0]
        odd = (2 * stored.mT - 1).astype(jnp.uint32)  # 2j + 1 for column j
        line = jnp.arange(side, dtype=jnp.uint32)[:, None]
        period = np.uint32(4 * side)
        # line · odd modulo the period, by digits of line, as the product may exceed 32 bits.
        phase = ((line >> 8) * odd % period * 256 + (line & 255) * odd) % period
        waves = jnp.cos(math.pi / 2 / side * phase.astype(spec.dtype))
        scale = jnp.where(line == 0, math.sqrt(1 / side), math.sqrt(2 / side))
        return jnp.where(stored.mT > 0, waves * scale, 0).astype(spec.dtype)


@dataclasses.dataclass(frozen=True)
class Haar(Projector):
    """Sums of adjacent lines; see `haar`.

    Attributes:
        width: the number of lines in a sum, 2^level.
    """

    width: int = 4

    def size(self, spec: MatrixSpec) -> tuple[int, int]:
        """The length of the projected side, and the number of sums."""
        side = spec.shape[self._axis(spec)]
        return side, -(-side // self.width)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """The matrix ``(side, r)`` by which `down` and `up` multiply, though they do not use it."""
        side, r = self.size(spec)
        of_group = np.arange(side)[:, None] // self.width == np.arange(r)
        return jnp.asarray(of_group / np.sqrt(of_group.sum(0)), spec.dtype)

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> LowRank:
        """Sums of adjacent lines, divided by the root of their number."""
        return self._groups(spec, gradient).sum(self._axis(spec)) * self._scales(spec)

    def up(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> Stack:
        """Repeats each line, divided by the same root."""
        axis = self._axis(spec)
        lines = jnp.repeat(low * self._scales(spec), self.width, axis)
        return jax.lax.slice_in_dim(lines, 0, spec.shape[axis], axis=axis % lines.ndim)

    def carry(
        self, spec: MatrixSpec, old: Basis, new: Basis, low: LowRank, *, power: int
    ) -> LowRank:
        """Returns the coordinates unchanged, since the subspace never changes."""
        return low

    def _axis(self, spec: MatrixSpec) -> int:
        return -2 if self.is_left(spec) else -1

    def _groups(self, spec: MatrixSpec, x: Stack) -> Array:
        """Splits the projected axis into groups and their lines, the last filled with zeros."""
        axis, (side, r) = self._axis(spec) % x.ndim, self.size(spec)
        x = jnp.pad(x, [(0, r * self.width - side if i == axis else 0) for i in range(x.ndim)])
        return x.reshape(*x.shape[:axis], r, self.width, *x.shape[axis + 1 :])

    def _scales(self, spec: MatrixSpec) -> np.ndarray:
        """One over the root of the number of lines in each group, to multiply a projection."""
        side, r = self.size(spec)
        lines = np.minimum(self.width, side - self.width * np.arange(r))
        scales = (1 / np.sqrt(lines)).astype(spec.dtype)
        return scales[:, None] if self.is_left(spec) else scales


@checked
def dct(rank: int | float, *, side: str = "short", norm: str = "l1") -> Projector:
    """The r columns of the discrete cosine transform on which the gradient is largest.

    The columns are cos(π i (2j + 1) / 2p) · √(2/p), divided by √2 for i = 0, orthonormal for a side
    of p. They are chosen at each refresh, which multiplies the gradient by all p of them; DCT-AdamW
    refreshes at each step. State: the numbers of the columns, r integers per matrix. The r columns
    are computed from them at each step.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        norm: the norm of the gradient's coefficients by which columns are chosen, "l1" or "l2".

    Raises:
        ValueError: if `rank` is below one, or larger than the side it projects, or `norm` is
            neither.

    References:
        Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of
        Large Language Models, 2025, https://arxiv.org/abs/2505.17967.

    Example:
        >>> spec, clock = MatrixSpec("w", (4, 6), jnp.float32), RefreshClock.first()
        >>> columns = dct(4).basis(spec, jnp.ones((4, 6)), clock)
        >>> g = jnp.outer(columns[:, 2], jnp.ones(6))
        >>> dct(1).choose(spec, g, clock).tolist()               # the third column, from 1
        [[3]]
    """
    return Dct(rank, side, True, norm)


@checked
def haar(density: float = 0.25, *, side: str = "left") -> Projector:
    """The approximation of the Haar wavelet transform: sums of 2^level adjacent lines.

    Each sum is divided by the root of the number of its lines, so that the basis is orthonormal;
    the last one may have fewer. The subspace never changes, and nothing is stored or multiplied.

    Args:
        density: 2^-level, the part of the coefficients that is kept: 0.25 is level 2.
        side: "left" sums adjacent rows (input features), "right" columns; "short" and "long" depend
            on a matrix's shape.

    Raises:
        ValueError: if `density` is not one over a power of two.

    References:
        Wen et al., Breaking Memory Limits: Gradient Wavelet Transform Enhances LLMs Training, 2025,
        https://arxiv.org/abs/2501.07237, section 3.

    Example:
        >>> spec, g = MatrixSpec("w", (8, 6), jnp.float32), jnp.ones((8, 6))
        >>> some = haar(0.25)
        >>> low = some.down(spec, some.basis(spec, g, RefreshClock.first()), g)
        >>> low.shape, low[0, 0].item(), some.up(spec, None, low)[0, 0].item()
        ((2, 6), 2.0, 1.0)
    """
    level = round(-math.log2(density)) if 0 < density <= 1 else -1
    if level < 0 or density != 2.0**-level:
        raise ValueError(f"density must be one over a power of two, such as 0.25, got {density}.")
    return Haar(float(density), side, False, 2**level)
