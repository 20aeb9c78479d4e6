"""Projectors to the leading singular vectors of the gradient."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from memopt.checked import checked
from memopt.errors import check_at_least
from memopt.shapes import Basis, Stack
from memopt.transforms.linalg import leading_eigenvectors, orthonormal, product
from memopt.transforms.projectors.base import MatrixSpec, Projector, RefreshClock

MIN_COLUMNS = 64  # sketch columns for each group of lines; with fewer, a group may be missed


@dataclasses.dataclass(frozen=True)
class Svd(Projector):
    """The leading singular vectors; see `svd`."""

    stored: bool = True

    from_gradients: ClassVar[bool] = True

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """Eigenvectors of G Gᵀ or GᵀG, whichever is smaller, mapped to the projected side."""
        r = self.size(spec)[1]
        m, n = spec.shape[-2:]
        is_wide = m <= n
        gram = "...mn,...kn->...mk" if is_wide else "...mn,...mk->...nk"
        vectors = leading_eigenvectors(product(gram, gradient, gradient), min(r, m, n))
        if self.is_left(spec) == is_wide:
            return vectors
        across = "...mn,...mr->...nr" if is_wide else "...mn,...nr->...mr"
        return orthonormal(product(across, gradient, vectors))

    def size(self, spec: MatrixSpec) -> tuple[int, int]:
        """The length of the projected side, and r, at most the number of singular vectors."""
        side, r = super().size(spec)
        if r > min(spec.shape[-2:]):
            m, n = spec.shape[-2:]
            raise ValueError(
                f"rank must be at most {min(m, n)}, the number of singular vectors, for "
                f"{spec.name!r}, whose matrices are {m}×{n}; got {r}."
            )
        return side, r


@dataclasses.dataclass(frozen=True)
class RandomizedSvd(Svd):
    """Approximate leading singular vectors; see `randomized_svd`."""

    iterations: int = 0
    oversample: int | None = None
    seed: int | Array = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("iterations", self.iterations, 0)
        if self.oversample is not None:
            check_at_least("oversample", self.oversample, 0)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """The singular vectors of a sketch of G, or of G GᵀQ with Q an orthonormal basis of it."""
        r = self.size(spec)[1]
        sketch = self.sketch(spec, gradient, spec.key(self.seed, clock.refresh))
        squares = product("...mk,...ml->...kl", sketch, sketch)
        spans_all = sketch.shape[-1] == min(spec.shape[-2:])  # then one iteration is exact
        for _ in range(max(self.iterations, spans_all)):
            low = self.down(spec, orthonormal(sketch), gradient)
            sketch, squares = self.correlation(spec, gradient, low), self.gram(spec, low, low)
        # Nearly orthogonal columns, the longest first, keep their directions in a QR.
        rotation = leading_eigenvectors(squares, r)
        return orthonormal(product("...mk,...kr->...mr", sketch, rotation))

    def sketch(self, spec: MatrixSpec, gradient: Stack, key: Array) -> Basis:
        """Computes G Ω or GᵀΩ, side×k, with Ω = W ⊗ I: all groups of lines share the weights W."""
        axis = -1 if self.is_left(spec) else -2
        r, more = self.size(spec)[1], self.oversample
        # Up to 512 columns, the sketch costs little compared to the pass over G.
        k = max(r + 64, min(4 * r, 512)) if more is None else r + more
        k = min(k, *spec.shape[-2:])
        across = spec.shape[axis]
        groups = 1 << max(k // MIN_COLUMNS, 1).bit_length() - 1
        rows, columns = -(-across // groups), -(-k // groups)
        weights = jax.random.normal(key, (rows, columns), spec.dtype)
        padding = [(0, 0)] * gradient.ndim
        padding[axis] = (0, rows * groups - across)
        lines = jnp.pad(gradient, padding)
        if self.is_left(spec):
            lines = lines.reshape(*lines.shape[:-1], rows, groups)
            mixed = product("...mbg,bc->...mcg", lines, weights)
        else:
            lines = lines.reshape(*lines.shape[:-2], rows, groups, lines.shape[-1])
            mixed = product("...bgn,bc->...ncg", lines, weights)
        return mixed.reshape(*mixed.shape[:-2], columns * groups)[..., :k]


@checked
def svd(rank: int | float, *, side: str = "short") -> Projector:
    """The leading r singular vectors of the gradient at each refresh.

    They are the eigenvectors of the p×p Gram matrix of the shorter side, p. If that side is
    sharded, forming the Gram matrix moves each device's part of the gradient to other devices;
    under Auto axes XLA gathers the whole gradient. `randomized_svd` does neither, and costs far
    less. The basis is stored: side×r numbers per matrix.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".

    Raises:
        ValueError: if `rank` is below one, or larger than the matrix's shorter side.

    References:
        Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, section 4.

    Example:
        >>> import jax.numpy as jnp
        >>> g = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
        >>> p = svd(2).basis(MatrixSpec("w", (3, 3), jnp.float32), g, RefreshClock.first())
        >>> jnp.abs(p.T @ g).max(1).tolist()
        [3.0, 2.0]
    """
    return Svd(rank, side)


@checked
def randomized_svd(
    rank: int | float,
    *,
    side: str = "short",
    iterations: int = 0,
    oversample: int | None = None,
    seed: int | Array = 0,
) -> Projector:
    """Approximates the leading r singular vectors by one cheap pass over the gradient.

    G is mixed at random to a sketch of r + oversample columns, whose singular vectors are used.
    That is accurate if the singular values decay, as those of gradients do. If they hardly decay,
    power iterations by G Gᵀ improve the basis; each costs several times the sketch. If
    r + oversample is at least the shorter side, at least one iteration is made, and the vectors
    are exact.

    The sketch is structured: the lines are divided into g groups of every g-th line, each group is
    mixed by the same normal weights, and each gets 64 or more columns. That is g times cheaper
    than a dense sketch; below 128 columns g is 1. Nothing larger than side×(r + oversample) is
    factorised. The basis is stored: side×r numbers per matrix.

    Args:
        rank: r, or a fraction of each matrix's shorter side.
        side: "short", "long", "left" or "right".
        iterations: power iterations, two passes over the gradient and one QR each.
        oversample: columns of the sketch beyond r; by default the sketch has r + 64 columns, or
            min(4r, 512) if that is more.
        seed: the seed of the sketches, which also depend on parameter and refresh.

    Raises:
        ValueError: if `rank` is below one, or larger than the matrix's shorter side.

    References:
        Halko, Martinsson & Tropp, Finding structure with randomness, 2011,
        https://arxiv.org/abs/0909.4061, Algorithms 4.1 and 4.4, structured sketches in section 4.6.

    Example:
        >>> import jax.numpy as jnp
        >>> g = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
        >>> spec = MatrixSpec("w", (3, 3), jnp.float32)
        >>> p = randomized_svd(2).basis(spec, g, RefreshClock.first())
        >>> jnp.round(jnp.abs(p.T @ g).max(1)).tolist()
        [3.0, 2.0]
    """
    return RandomizedSvd(rank, side, True, iterations, oversample, seed)
